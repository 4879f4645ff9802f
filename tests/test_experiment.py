"""Interventions in families, against the model with one activation replaced by hand and against patched files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Array, Reference, Subject, build, random, residual, run, save
from graph.operating import PLENTY, SIZE, W1, W3, assert_close, assert_cuts, dense_subject, operate, original
from onnx import helper

from onnxcare.errors import ModelError
from onnxcare.experiment import Activations, Experiment, Suffix, class_scores
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import load_model
from onnxcare.graph.parameters import read
from onnxcare.graph.patch import Patch
from onnxcare.graph.sites import Site


class Table:
    """A subject on the operating table, shared by the tests of this module."""

    def __init__(self, name: str, folder: Path) -> None:
        self.subject = SUBJECTS[name]()
        self.experiment = operate(self.subject, folder)
        self.x = self.subject.samples(SIZE)
        self.scores = original(self.subject, self.x, self.subject.logits)[0]

    @property
    def cuts(self) -> list[str]:
        layers, sites = self.experiment.layers, self.experiment.sites
        return list(dict.fromkeys([layer.output for layer in layers] + [site.tensor for site in sites]))

    def cut(self, tensor: str, kind: str) -> tuple[Suffix, Activations]:
        suffix = self.experiment.suffix(tensor, kind)
        return suffix, suffix.cache(self.x)


@pytest.fixture(scope="module", params=SUBJECTS)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(request.param, tmp_path_factory.mktemp("model"))


def spread(values: Array, site: Site, rank: int) -> Array:
    """Place [P, units] values on the unit axis of [P, 1, ...] arrays; rank counts the samples' axis."""
    shape = [len(values), 1] + [1] * (rank - 1)
    shape[site.axis % rank + 1] = site.units
    return values.reshape(shape)


# -- nothing changes -----------------------------------------------------------------------------


def test_the_copy_answers_as_the_original(table: Table) -> None:
    assert table.experiment.logits == table.subject.logits
    assert_close(table.experiment.scores(table.x), table.scores)


def test_inner_tensors_are_those_of_the_original(table: Table) -> None:
    names = [layer.input for layer in table.experiment.layers] + table.cuts
    for found, expected in zip(
        table.experiment.tensors(names, table.x), original(table.subject, table.x, *names), strict=True
    ):
        assert found.dtype == table.subject.dtype
        assert_close(found, expected)


def test_an_empty_intervention_changes_nothing_at_any_cut(table: Table) -> None:
    for tensor in table.cuts:
        suffix, at = table.cut(tensor, "affine")
        assert_close(at.base, original(table.subject, table.x, tensor)[0])
        whole = (1, *at.base.shape)
        for keep in (np.ones((3, *[1] * at.base.ndim)), np.ones((2, *whole[1:]))):
            scores = suffix.affine(at, keep, np.full((1, *[1] * at.base.ndim), 7.0))
            assert_close(scores, np.stack([table.scores] * len(keep)))


def test_a_span_of_nothing_changes_nothing_at_any_cut(table: Table) -> None:
    for tensor in table.cuts:
        suffix, at = table.cut(tensor, "span")
        directions = random(2, *at.base.shape)
        assert_close(suffix.span(at, np.zeros((3, 2)), directions), np.stack([table.scores] * 3))
        assert_close(suffix.span(at, np.ones((1, 2)), 0 * directions), table.scores[None])


# -- interventions -------------------------------------------------------------------------------


def chosen_units(site: Site) -> list[int]:
    return sorted({0, site.units // 2, site.units - 1})


def test_forcing_units_is_replacing_their_values_by_hand(table: Table) -> None:
    x = {name: values[:3] for name, values in table.x.items()}
    for site in table.experiment.sites:
        pairs = [(unit, value) for unit in chosen_units(site) for value in (-1.5, 0.0, 2.0)]
        keep = np.ones((len(pairs), site.units))
        reference = np.zeros((len(pairs), site.units))
        for member, (unit, value) in enumerate(pairs):
            keep[member, unit], reference[member, unit] = 0, value
        suffix = table.experiment.suffix(site.tensor, "affine")
        at = suffix.cache(x)
        found = suffix.affine(at, spread(keep, site, at.base.ndim), spread(reference, site, at.base.ndim))
        by_hand = Reference(table.subject.proto, site.tensor, table.subject.logits)
        expected = np.stack([by_hand.scores(x, force(site, unit, value)) for unit, value in pairs])
        assert_close(found, expected)
        assert np.abs(found - table.scores[:3]).max() > 1e-2, "the units chosen here do something"


def force(site: Site, unit: int, value: float) -> Callable[[Array, int], Array]:
    def change(h: Array, row: int) -> Array:
        np.moveaxis(h, site.axis, 0)[unit] = value
        return h

    return change


def test_multipliers_are_multiplying_by_hand(table: Table) -> None:
    x = {name: values[:3] for name, values in table.x.items()}
    for site in table.experiment.sites:
        factors = random(4, site.units, seed=13, dtype=table.subject.dtype) * 2
        suffix = table.experiment.suffix(site.tensor, "affine")
        at = suffix.cache(x)
        zero = np.zeros((1, *[1] * at.base.ndim))
        found = suffix.affine(at, spread(factors, site, at.base.ndim), zero)
        by_hand = Reference(table.subject.proto, site.tensor, table.subject.logits)
        expected = np.stack([by_hand.scores(x, multiply(site, row)) for row in factors])
        assert_close(found, expected)


def multiply(site: Site, factors: Array) -> Callable[[Array, int], Array]:
    def change(h: Array, row: int) -> Array:
        return np.moveaxis(np.moveaxis(h, site.axis, -1) * factors, -1, site.axis)

    return change


def test_values_may_differ_from_sample_to_sample(table: Table) -> None:
    x = {name: values[:3] for name, values in table.x.items()}
    for tensor in table.cuts:
        suffix = table.experiment.suffix(tensor, "affine")
        at = suffix.cache(x)
        keep = random(2, *at.base.shape, seed=14, dtype=table.subject.dtype)
        reference = random(2, *at.base.shape, seed=15, dtype=table.subject.dtype)
        by_hand = Reference(table.subject.proto, tensor, table.subject.logits)
        expected = [
            by_hand.scores(x, lambda h, row, k=k, b=b: h * k[row] + b[row] * (1 - k[row]))
            for k, b in zip(keep, reference, strict=True)
        ]
        assert_close(suffix.affine(at, keep, reference), np.stack(expected))
        shared = suffix.affine(at, keep, reference[:1])
        assert_close(shared[0], expected[0])


def test_a_span_is_a_change_of_the_weights_in_the_file(table: Table) -> None:
    model = table.experiment.model
    for layer in table.experiment.layers:
        values = {p.name: read(model.proto, p, model.path.parent) for p in (layer.weight, layer.bias) if p}
        matrix = layer.matrix(values[layer.weight.name], values[layer.bias.name] if layer.bias else None)
        changes = random(2, *matrix.shape, seed=16, dtype=table.subject.dtype)
        coefficients = np.array([[1.0, 0.0], [-0.5, 2.0], [0.3, 0.3]])
        suffix, at = table.cut(layer.output, "span")
        rows = layer.rows(table.experiment.tensors([layer.input], table.x)[0])
        directions = np.stack([layer.from_rows(layer.product(rows, c), at.base.shape) for c in changes])
        found = suffix.span(at, coefficients, directions)
        for member, mix in enumerate(coefficients):
            assert_close(found[member], patched_scores(table, layer, np.tensordot(mix, changes, 1), values))


def patched_scores(table: Table, layer: Layer, change: Array, values: dict[str, Array]) -> Array:
    new = layer.add(change, values)
    known = [p for p in (layer.weight, layer.bias) if p is not None]
    data = Patch({p: new[p.name] for p in known}).apply(table.experiment.model)
    changed = Subject(onnx.ModelProto.FromString(data), table.subject.input, table.subject.shape, "")
    return original(changed, table.x, table.subject.logits)[0]


def test_a_multiplier_folded_into_the_readers_is_the_multiplier(table: Table) -> None:
    foldable = [site for site in table.experiment.sites if site.refusal is None]
    assert foldable
    for site in foldable:
        factors = random(site.units, seed=23, dtype=np.float64) * 2
        suffix, at = table.cut(site.tensor, "affine")
        zero = np.zeros((1, *[1] * at.base.ndim))
        found = suffix.affine(at, spread(factors[None], site, at.base.ndim), zero)[0]
        assert_close(folded_scores(table, site, factors, at.base.shape[1:]), found)


def folded_scores(table: Table, site: Site, factors: Array, shape: tuple[int, ...]) -> Array:
    """Fold by the unit that each input of a reader shows when unit numbers are sent through the model."""
    model = table.experiment.model
    numbers = np.zeros((1, *shape), np.float32)
    np.moveaxis(numbers, site.axis, -1)[...] = np.arange(site.units)
    values = {}
    for layer in site.readers:
        sent = numbers if layer.input == site.tensor else table.experiment.between(site.tensor, layer.input, numbers)
        channels_first = np.moveaxis(sent[0], 0 if layer.convolution else -1, 0)
        units = channels_first.reshape(layer.inputs, -1)[:, 0].astype(int)
        weight = read(model.proto, layer.weight, model.path.parent)
        values[layer.weight] = layer.scale_inputs(factors[units], weight)
    changed = Subject(onnx.ModelProto.FromString(Patch(values).apply(model)), "", (), "")
    return original(changed, table.x, table.subject.logits)[0]


# -- pieces of a family --------------------------------------------------------------------------


def memory_for(experiment: Experiment, x: dict[str, Array], tensors: list[str]) -> int:
    """Return the least memory with which the activations at these cuts may be cached."""
    cached = [experiment.suffix(tensor, "affine").cache(x) for tensor in tensors]
    return max(4 * at.base.nbytes * (1 + len(at.boundary)) for at in cached)


@pytest.mark.parametrize("name", ["mlp", "residual", "keras", "acas"])
def test_the_least_memory_gives_the_same(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]()
    (tmp_path / "poor").mkdir()
    rich = operate(subject, tmp_path)
    least = memory_for(rich, subject.samples(SIZE), [rich.layers[0].output, rich.sites[1].tensor])
    poor = operate(subject, tmp_path / "poor", memory=least)
    assert poor.rows_of(poor.copy) < SIZE, "nothing would be cut into pieces"
    assert_family_in_pieces(rich, poor, subject)


def test_less_memory_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]()
    (tmp_path / "poor").mkdir()
    x = subject.samples(SIZE)
    least = memory_for(operate(subject, tmp_path), x, ["h1"])
    poor = operate(subject, tmp_path / "poor", memory=least - 1)
    with pytest.raises(ModelError, match=r"model\.onnx: the activations of 7 samples at 'h1' take about"):
        poor.suffix("h1", "affine").cache(x)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 15, 34, 1000])
def test_any_size_of_the_pieces_gives_the_same(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = residual()
    (tmp_path / "pieces").mkdir()
    whole, pieces = operate(subject, tmp_path), operate(subject, tmp_path / "pieces")
    monkeypatch.setattr(pieces, "rows_of", lambda part: rows)
    assert_family_in_pieces(whole, pieces, subject)


def test_wider_numbers_count_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, int] = {}
    for name in ("mlp", "mlp-float64"):
        subject = SUBJECTS[name]()
        (tmp_path / name).mkdir()
        suffix = operate(subject, tmp_path / name, memory=20_000).suffix("h1", "affine")
        at = suffix.cache(subject.samples(SIZE))
        assert suffix._session is not None
        plain = suffix._session.run
        rows[name] = 0

        def counted(feeds: dict[str, Array], run=plain, name: str = name) -> list[Array]:  # type: ignore[no-untyped-def]
            found = run(feeds)
            rows[name] = max(rows[name], len(found[0]))
            return found

        monkeypatch.setattr(suffix._session, "run", counted)
        suffix.affine(at, np.ones((300, 1, 1)), np.ones((1, 1, 1)))
    assert SIZE < rows["mlp-float64"] <= rows["mlp"] // 2 + SIZE < 300 * SIZE


def assert_family_in_pieces(whole: Experiment, pieces: Experiment, subject: Subject) -> None:
    x = subject.samples(SIZE)
    assert_close(pieces.scores(x), whole.scores(x))
    for tensor in (whole.layers[0].output, whole.sites[1].tensor):
        found = []
        for experiment in (whole, pieces):
            affine, span = (experiment.suffix(tensor, kind) for kind in ("affine", "span"))
            at = affine.cache(x)
            keep = random(5, 1, *at.base.shape[1:], seed=17)
            reference = random(1, *at.base.shape, seed=18)
            directions = random(2, *at.base.shape, seed=19)
            coefficients = random(5, 2, seed=20)
            spans = span.span(span.cache(x), coefficients, directions)
            found.append((affine.affine(at, keep, reference), spans))
        for one, other in zip(*found, strict=True):
            assert one.shape == (5, SIZE, one.shape[-1])
            assert_close(other, one)


def test_activations_can_be_thinned(table: Table) -> None:
    tensor = table.cuts[1]
    suffix, at = table.cut(tensor, "affine")
    ones = np.ones((1, *[1] * at.base.ndim))
    assert len(at) == SIZE
    for rows in (slice(2, 5), np.array([6, 0, 0])):
        part = at.take(rows)
        assert len(part) == 3
        assert_close(suffix.affine(part, ones, ones)[0], table.scores[rows])


def test_a_suffix_is_made_once(table: Table) -> None:
    tensor = table.cuts[0]
    assert table.experiment.suffix(tensor, "affine") is table.experiment.suffix(tensor, "affine")
    assert table.experiment.suffix(tensor, "affine") is not table.experiment.suffix(tensor, "span")


# -- scores --------------------------------------------------------------------------------------


def test_a_softmax_in_the_middle_is_no_end(tmp_path: Path) -> None:
    subject = dense_subject("z = Gemm (x, W1) s = Softmax (z) y = Gemm (s, V)", {"W1": W1, "V": random(8, 4)})
    assert operate(subject, tmp_path).logits == "y"


def test_the_scores_are_the_first_output_with_classes(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 6] x) => (int64[N] label, float[N, 1] best, float[N, 4] y) {
            y = MatMul (x, W3)
            label = ArgMax <axis = 1, keepdims = 0> (y)
            best = ReduceMax <axes = [1]> (y)
        }""",
        {"W3": W3},
    )
    assert class_scores(save(proto, tmp_path)) == "y"


@pytest.mark.parametrize(
    ("outputs", "nodes", "shown"),
    [
        ("float[N, 1] y", "p = MatMul (x, W3) y = ReduceMax <axes = [1]> (p)", r"y \['N', 1\]"),
        ("int64[N, 6] y", "y = Cast <to = 7> (x)", r"y \['N', 6\]"),
        ("float[N] y", "p = MatMul (x, W3) y = ReduceMax <axes = [1], keepdims = 0> (p)", r"y \['N'\]"),
    ],
)
def test_a_model_without_scores_per_class_is_refused(outputs: str, nodes: str, shown: str, tmp_path: Path) -> None:
    proto = build(f"g (float[N, 6] x) => ({outputs}) {{ {nodes} }}", {"W3": W3})
    with pytest.raises(ModelError, match=rf"model\.onnx: no output with one score per class.*{shown}"):
        class_scores(save(proto, tmp_path))


def test_an_output_that_is_an_input_is_no_hindrance(tmp_path: Path) -> None:
    subject = dense_subject("y = MatMul (x, W3)", {"W3": W3})
    subject.proto.graph.output.append(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6]))
    assert_cuts(subject, tmp_path)


ZIPMAP = """g (float[N, 6] x) => (int64[N] label, {scores}) {{
    z = MatMul (x, W1)
    h = Relu (z)
    p = MatMul (h, V)
    y = Softmax (p)
    label = ArgMax <axis = 1, keepdims = 0> (y)
    maps = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1, 2, 3]> (y)
}}"""


def zipmap(scores: str) -> onnx.ModelProto:
    proto = build(ZIPMAP.format(scores=scores), {"W1": W1, "V": random(8, 4)})
    maps = helper.make_map_type_proto(onnx.TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    proto.graph.output.append(helper.make_value_info("maps", helper.make_sequence_type_proto(maps)))
    return proto


def test_maps_behind_the_scores_are_cut_off(tmp_path: Path) -> None:
    proto = zipmap("float[N, 4] y")
    x = {"x": random(SIZE, 6)}
    experiment = Experiment(save(proto, tmp_path), "cpu", PLENTY, x)
    assert (experiment.output, experiment.logits) == ("y", "p")
    assert [(site.tensor, site.refusal) for site in experiment.sites] == [("h", None)]
    expected = run(proto, x, "p")[0]
    for tensor in ("z", "h", "p"):
        suffix = experiment.suffix(tensor, "affine")
        scores = suffix.affine(suffix.cache(x), np.ones((2, 1, 1)), np.zeros((1, 1, 1)))
        assert_close(scores, np.stack([expected, expected]))


def test_scores_that_are_maps_are_refused(tmp_path: Path) -> None:
    proto = zipmap("float[N, 1] unused").SerializeToString()
    model = onnx.ModelProto.FromString(proto)
    del model.graph.output[1]
    loaded = save(model, tmp_path)
    assert [output.name for output in loaded.outputs] == ["label", "maps"]
    with pytest.raises(ModelError, match="no output with one score per class"):
        Experiment(loaded, "cpu", PLENTY, {"x": random(3, 6)})


@pytest.mark.parametrize(
    "name",
    ["mnist-square-pytorch/model.onnx", "mnist-square-pytorch/model-dynamo.onnx", "mnist-blend-keras/model.onnx"],
)
def test_an_empty_intervention_changes_nothing_in_the_samples(samples: Path, name: str) -> None:
    model = load_model(samples / name)
    (signature,) = model.inputs
    x = {signature.name: np.abs(random(3, *signature.shape[1:])).clip(0, 1)}  # type: ignore[arg-type]
    experiment = Experiment(model, "cpu", PLENTY, x)
    expected = run(model.path, x)[0]
    assert_close(experiment.tensors([experiment.output], x)[0], expected)
    logits = run(model.proto, x, experiment.logits)[0]
    for tensor in [layer.output for layer in experiment.layers] + [site.tensor for site in experiment.sites]:
        suffix = experiment.suffix(tensor, "span")
        at = suffix.cache(x)
        assert_close(suffix.span(at, np.zeros((2, 1)), at.base[None]), np.stack([logits, logits]))


# -- what methods ask of it ----------------------------------------------------------------------


def test_the_sum_behind_a_layer(tmp_path: Path) -> None:
    experiment = operate(residual(), tmp_path)
    behind = {layer.name: experiment.sum_behind(layer) for layer in experiment.layers}
    assert behind == {"stem": None, "conv1": None, "conv2": "a", "down": None, "fc": None}


def test_a_constant_behind_a_layer_is_no_sum(tmp_path: Path) -> None:
    subject = dense_subject(
        "p = Gemm (x, W1) s = Add (p, c) r = Relu (s) y = MatMul (r, V)",
        {"W1": W1, "c": np.float32([2]), "V": random(8, 4)},
    )
    experiment = operate(subject, tmp_path)
    assert [experiment.sum_behind(layer) for layer in experiment.layers] == [None, None]


def test_between_sends_values_through_rearranging_steps(table: Table) -> None:
    for site in table.experiment.sites:
        h = table.experiment.tensors([site.tensor], table.x)[0]
        for layer in site.readers:
            expected = original(table.subject, table.x, layer.input)[0]
            if layer.input == site.tensor:
                continue
            assert_close(table.experiment.between(site.tensor, layer.input, h.astype(np.float32)), expected)


def test_between_takes_any_number_type(tmp_path: Path) -> None:
    proto = build(
        """g (double[N, 6] x) => (double[N, 4] y) {
            z = MatMul (x, W1) h = Relu (z) f = Flatten (h) y = MatMul (f, V)
        }""",
        {"W1": W1.astype(np.float64), "V": random(8, 4, dtype=np.float64)},
    )
    experiment = operate(Subject(proto, "x", (6,), "y", np.float64), tmp_path)
    numbers = np.arange(8, dtype=np.float32)[None]
    np.testing.assert_array_equal(experiment.between("h", "f", numbers), numbers)
