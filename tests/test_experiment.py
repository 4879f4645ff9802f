"""Interventions in families, against the model with one activation replaced by hand and against patched files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Array, Reference, Subject, build, random, residual, run, save
from onnx import helper, numpy_helper

from onnxcare.errors import ModelError
from onnxcare.experiment import Activations, Experiment, Suffix, class_scores
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import load_model
from onnxcare.graph.parameters import read
from onnxcare.graph.patch import Patch
from onnxcare.graph.sites import Site
from onnxcare.runtime import Session

PLENTY = 1 << 26
SIZE = 7


def operate(subject: Subject, folder: Path, memory: int = PLENTY) -> Experiment:
    return Experiment(save(subject.proto, folder), "cpu", memory, subject.samples(SIZE))


def original(subject: Subject, x: dict[str, Array], *tensors: str) -> list[Array]:
    """Run the untouched model row by row, so that a fixed batch of one is no hindrance."""
    rows = [{k: v[i : i + 1] for k, v in x.items()} for i in range(len(next(iter(x.values()))))]
    return [np.concatenate(parts) for parts in zip(*(run(subject.proto, r, *tensors) for r in rows), strict=True)]


def assert_close(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


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


@pytest.mark.parametrize("name", ["mlp", "residual", "keras", "acas"])
def test_one_byte_of_memory_gives_the_same(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]()
    (tmp_path / "poor").mkdir()
    rich, poor = operate(subject, tmp_path), operate(subject, tmp_path / "poor", memory=1)
    assert_family_in_pieces(rich, poor, subject)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 15, 34, 1000])
def test_any_size_of_the_pieces_gives_the_same(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = residual()
    (tmp_path / "pieces").mkdir()
    whole, pieces = operate(subject, tmp_path), operate(subject, tmp_path / "pieces")
    monkeypatch.setattr(pieces, "_rows", lambda part: rows)
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


# -- graphs that make cutting harder -------------------------------------------------------------


def assert_cuts(subject: Subject, folder: Path, boundary: dict[str, set[str]] | None = None) -> Experiment:
    """Check identity, forced values and a span at every layer output and site, two members at once."""
    experiment = operate(subject, folder)
    x = subject.samples(3)
    scores = original(subject, x, subject.logits)[0]
    cuts = [layer.output for layer in experiment.layers] + [site.tensor for site in experiment.sites]
    assert cuts
    for tensor in dict.fromkeys(cuts):
        suffix = experiment.suffix(tensor, "affine")
        at = suffix.cache(x)
        if boundary and tensor in boundary:
            assert set(at.boundary) == boundary[tensor]
        forced = random(*at.base.shape, seed=21, dtype=subject.dtype)
        keep = np.stack([np.ones_like(forced), np.zeros_like(forced)])
        found = suffix.affine(at, keep, forced[None])
        by_hand = Reference(subject.proto, tensor, subject.logits)
        assert_close(found[0], scores)
        assert_close(found[1], by_hand.scores(x, lambda h, row, forced=forced: forced[row : row + 1]))
        span = experiment.suffix(tensor, "span")
        found = span.span(span.cache(x), np.array([[1.0], [2.0]]), forced[None])
        expected = by_hand.scores(x, lambda h, row, forced=forced: h + 2 * forced[row : row + 1])
        assert_close(found[1], expected)
    return experiment


def dense_subject(nodes: str, weights: dict[str, Array], *, opset: int = 17, width: int = 6) -> Subject:
    proto = build(f"g (float[N, {width}] x) => (float[N, 4] y) {{ {nodes} }}", weights, opset=opset)
    return Subject(proto, "x", (width,), "y")


W1, W2, W3 = random(6, 8), random(8, 6, seed=1), random(6, 4, seed=2)


def test_a_skip_connection_crosses_the_cut(tmp_path: Path) -> None:
    assert_cuts(
        residual_subject := residual(),
        tmp_path,
        {"s": set(), "h": set(), "c1": {"h"}, "r1": {"h"}, "c2": {"h"}, "r2": set(), "g": set()},
    )
    assert residual_subject.logits == "scores"


def test_the_input_itself_may_cross_the_cut(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = MatMul (x, W1) h = Relu (z) p = MatMul (h, W2) s = Add (p, x) y = MatMul (s, W3)",
        {"W1": W1, "W2": W2, "W3": W3},
    )
    assert_cuts(subject, tmp_path, {"z": {"x"}, "h": {"x"}, "p": {"x"}, "s": set()})


def test_tensors_of_any_rank_and_type_cross_the_cut(tmp_path: Path) -> None:
    proto = build(
        """g (double[N, 6] x) => (double[N, 4] y) <int64[1] last = {1}> {
            z = MatMul (x, W1)
            h = Relu (z)
            s = ReduceMax <axes = [1], keepdims = 0> (x)
            u = Unsqueeze (s, last)
            positive = Greater (u, zero)
            a = Add (h, u)
            w = Where (positive, a, h)
            y = MatMul (w, V)
        }""",
        {"W1": W1.astype(np.float64), "V": random(8, 4, dtype=np.float64), "zero": np.float64(1)},
    )
    assert_cuts(Subject(proto, "x", (6,), "y", np.float64), tmp_path, {"h": {"u", "positive"}})


def test_tokens_are_part_of_a_sample(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 3, 6] x) => (float[N, 4] y) {
            p = MatMul (x, W1)
            z = Add (p, b)
            h = Relu (z)
            q = MatMul (h, W2)
            m = ReduceMean <axes = [1], keepdims = 0> (q)
            y = Gemm (m, W3)
        }""",
        {"W1": W1, "b": random(8), "W2": W2, "W3": W3},
    )
    experiment = assert_cuts(Subject(proto, "x", (3, 6), "y"), tmp_path)
    assert [(site.tensor, site.axis, site.units) for site in experiment.sites] == [("h", -1, 8), ("m", -1, 6)]


def test_a_function_of_the_models_own(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 6] x) => (float[N, 4] y) {
            z = Gemm (x, W1)
            h = own.Relu (z)
            y = Gemm (h, V)
        }
        <domain: "own", opset_import: ["": 17]>
        Relu (a) => (c) { b = Neg (a) c = Abs (b) }"""
    )
    for name, values in (("W1", W1), ("V", random(8, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    experiment = assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)
    assert [(site.tensor, site.writers) for site in experiment.sites] == [("h", ())]


def test_quantised_weights_are_no_layers(tmp_path: Path) -> None:
    subject = dense_subject(
        "v = DequantizeLinear (W, scale) z = MatMul (x, v) h = Relu (z) y = MatMul (h, V)",
        {"W": np.int8(W1 * 20), "scale": np.float32(0.05), "V": random(8, 4)},
        opset=19,
    )
    experiment = assert_cuts(subject, tmp_path)
    assert [layer.weight.name for layer in experiment.layers] == ["V"]


def test_a_mask_that_is_an_output(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) r = Relu (z) h, mask = Dropout (r) y = Gemm (h, V)", {"W1": W1, "V": random(8, 4)}
    )
    subject.proto.graph.output.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, ["N", 8]))
    experiment = assert_cuts(subject, tmp_path)
    assert [(site.tensor, site.refusal) for site in experiment.sites] == [("r", None)]


def test_a_shape_taken_from_the_input(tmp_path: Path) -> None:
    # What PyTorch writes for h.view(x.size(0), -1).
    proto = build(
        """g (float[N, 1, 4, 4] x) => (float[N, 4] y) <int64 zero = {0}, int64[1] rest = {-1}, int64[1] first = {0}> {
            c = Conv (x, W1, b1)
            h = Relu (c)
            shape = Shape (x)
            samples = Gather <axis = 0> (shape, zero)
            batch = Unsqueeze (samples, first)
            target = Concat <axis = 0> (batch, rest)
            f = Reshape (h, target)
            y = Gemm (f, W2)
        }""",
        {"W1": random(2, 1, 3, 3), "b1": random(2), "W2": random(8, 4)},
    )
    subject = Subject(proto, "x", (1, 4, 4), "y")
    experiment = assert_cuts(subject, tmp_path, {"h": {"x"}})
    sent = random(2, 2, 2, 2, seed=22)
    np.testing.assert_array_equal(experiment.between("h", "f", sent), sent.reshape(2, 8))


def test_shapes_in_floating_point(tmp_path: Path) -> None:
    # The scale of attention: the square root of a dimension.
    proto = build(
        """g (float[N, 3, 4] x) => (float[N, 4] y) <int64 last = {2}, int64[1] tokens = {1}> {
            q = MatMul (x, W1)
            k = MatMul (x, W2)
            shape = Shape (q)
            size = Gather <axis = 0> (shape, last)
            width = Cast <to = 1> (size)
            root = Sqrt (width)
            t = Transpose <perm = [0, 2, 1]> (k)
            products = MatMul (q, t)
            scaled = Div (products, root)
            weights = Softmax (scaled)
            v = MatMul (x, W3)
            mixed = MatMul (weights, v)
            pooled = ReduceMean <axes = [1], keepdims = 0> (mixed)
            y = MatMul (pooled, W4)
        }""",
        {"W1": random(4, 5), "W2": random(4, 5, seed=1), "W3": random(4, 6), "W4": random(6, 4)},
    )
    assert_cuts(Subject(proto, "x", (3, 4), "y"), tmp_path, {"k": {"q", "v"}, "v": {"weights"}})


def test_weights_that_are_computed_do_not_cross_the_cut(tmp_path: Path) -> None:
    # Weight normalisation, and a weight that is transposed before its use: neither has samples on axis 0.
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        squares = Mul (V, V)
        sums = ReduceSum <keepdims = 1> (squares, first)
        norms = Sqrt (sums)
        direction = Div (V, norms)
        p = MatMul (h, direction)
        t = Transpose (U)
        y = MatMul (p, t)""",
        {"W1": W1, "V": W2, "U": W3.T.copy(), "first": np.int64([0])},
    )
    experiment = assert_cuts(subject, tmp_path, {"z": set(), "h": set()})
    assert [layer.name for layer in experiment.layers] == ["MatMul#0", "MatMul#8"]


def test_tensors_made_for_every_sample_cross_the_cut(tmp_path: Path) -> None:
    # An initial state as large as the batch, and a mask computed from the input.
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        shape = Shape (x)
        samples = Gather <axis = 0> (shape, zero)
        batch = Unsqueeze (samples, first)
        size = Concat <axis = 0> (batch, width)
        state = ConstantOfShape <value = float[1] {0.5}> (size)
        some = ReduceMax <axes = [1], keepdims = 1> (x)
        mask = Greater (some, bound)
        a = Add (h, state)
        m = Where (mask, a, h)
        p = MatMul (m, W2)
        y = MatMul (p, W3)""",
        {
            "W1": W1,
            "W2": W2,
            "W3": W3,
            "zero": np.int64(0),
            "first": np.int64([0]),
            "width": np.int64([8]),
            "bound": np.float32(1),
        },
    )
    assert_cuts(subject, tmp_path, {"h": {"mask", "x"}})


def test_whole_numbers_computed_from_the_input_cross_the_cut(tmp_path: Path) -> None:
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        class = ArgMax <axis = 1, keepdims = 0> (x)
        shift = Gather (table, class)
        s = Add (h, shift)
        p = MatMul (s, W2)
        y = MatMul (p, W3)""",
        {"W1": W1, "W2": W2, "W3": W3, "table": random(6, 8)},
    )
    assert_cuts(subject, tmp_path)


IF = """g (float[N, 6] x) => (float[N, 4] y) {
    z = MatMul (x, W1)
    h = Relu (z)
    c = Greater (two, one)
    p = MatMul (h, W2)
    i = If (c) <
        then_branch = then () => (float[N, 6] t) { m = MatMul (h, V) t = Add (m, p) },
        else_branch = else () => (float[N, 6] e) { e = Identity (p) }
    >
    y = MatMul (i, W3)
}"""


def branching(two: float) -> Subject:
    weights = {"W1": W1, "W2": W2, "W3": W3, "V": W2 * 2, "one": np.float32(1), "two": np.float32(two)}
    return Subject(build(IF, weights), "x", (6,), "y")


@pytest.mark.parametrize("two", [0, 2])
def test_a_branch_that_captures_tensors(two: float, tmp_path: Path) -> None:
    assert_cuts(branching(two), tmp_path, {"z": set(), "h": set(), "p": {"h"}})


def test_a_loop_that_captures_tensors(tmp_path: Path) -> None:
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        p = MatMul (h, W2)
        s = Loop (times, yes, p) <
            body = step (int64 i, bool c, float[N, 6] before) => (bool on, float[N, 6] after) {
                on = Identity (c)
                m = MatMul (h, V)
                scaled = Mul (m, tenth)
                after = Add (before, scaled)
            }
        >
        y = MatMul (s, W3)""",
        {
            "W1": W1,
            "W2": W2,
            "W3": W3,
            "V": W2 * 2,
            "times": np.int64(3),
            "yes": np.bool_(True),
            "tenth": np.float32(0.1),
        },
    )
    assert_cuts(subject, tmp_path, {"p": {"h"}})


def test_names_that_are_empty_or_hold_colons(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) h = Relu (z) p = Gemm (h, W2) r = Relu (p) y = Gemm (r, W3)", {"W1": W1, "W2": W2, "W3": W3}
    )
    # onnxruntime itself refuses a name that two nodes share.
    rename = {"z": "model/z:0", "h": "model/h:0", "p": "/p/out put", "W1": "kernel:0"}
    for node, name in zip(subject.proto.graph.node, ("fc", "", "", "a b", "fc:0"), strict=True):
        node.name = name
        node.input[:] = [rename.get(n, n) for n in node.input]
        node.output[:] = [rename.get(n, n) for n in node.output]
    subject.proto.graph.initializer[0].name = "kernel:0"
    experiment = assert_cuts(subject, tmp_path)
    assert [layer.name for layer in experiment.layers] == ["fc", "Gemm#2", "fc:0"]


def test_optional_inputs_left_out_and_outputs_not_used(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 6] x) => (float[N, 4] y) {
            z = Gemm (x, W1)
            c = Clip (z, , high)
            h, mask = Dropout (c)
            y = Gemm (h, W4)
        }""",
        {"W1": W1, "W4": random(8, 4), "high": np.float32(1), "unused": random(3)},
    )
    assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)


def test_an_activation_that_is_also_an_output(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) h = Relu (z) p = Gemm (h, W2) r = Relu (p) y = Gemm (r, W3)", {"W1": W1, "W2": W2, "W3": W3}
    )
    for name, size in (("z", 8), ("r", 6)):
        subject.proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size]))
    assert_cuts(subject, tmp_path)


def test_a_model_of_one_layer_can_be_cut_at_its_scores(tmp_path: Path) -> None:
    experiment = assert_cuts(dense_subject("y = Gemm (x, W3, b)", {"W3": W3, "b": random(4)}), tmp_path)
    assert experiment.sites == []


def test_weights_in_constant_nodes(tmp_path: Path) -> None:
    subject = dense_subject("z = Gemm (x, W1) h = Relu (z) y = Gemm (h, V)", {})
    for name, values in (("V", random(8, 4)), ("W1", W1)):
        node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))
        subject.proto.graph.node.insert(0, node)
    assert_cuts(subject, tmp_path)


def test_several_inputs(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 6] a, float[N, 2] b) => (float[N, 4] y) {
            z = MatMul (a, W1)
            r = Relu (z)
            j = Concat <axis = 1> (r, b)
            y = MatMul (j, W4)
        }""",
        {"W1": W1, "W4": random(10, 4)},
    )
    x = {"a": random(SIZE, 6, seed=3), "b": random(SIZE, 2, seed=4)}
    experiment = Experiment(save(proto, tmp_path), "cpu", PLENTY, x)
    suffix = experiment.suffix("z", "affine")
    at = suffix.cache(x)
    assert set(at.boundary) == {"b"}
    keep = np.float32([1, 0.5]).reshape(2, 1, 1)
    expected = run(proto, x)[0]
    found = suffix.affine(at, keep, np.zeros((1, 1, 1)))
    assert_close(found[0], expected)
    halved = np.concatenate([np.maximum(x["a"] @ W1 * 0.5, 0), x["b"]], axis=1) @ random(10, 4)
    assert_close(found[1], halved)
    assert_close(experiment.tensors(["b", "z", "a"], x)[1], x["a"] @ W1)


# -- samples that do not lie on axis 0 -----------------------------------------------------------


def tokens_merged() -> Subject:
    """A dense layer over tokens that are merged into the batch, as tf2onnx writes it."""
    proto = build(
        """g (float[N, 3, 6] x) => (float[N, 4] y)
        <int64[2] merged = {-1, 6}, int64[3] apart = {-1, 3, 8}, int64[1] one = {1}> {
            m = Reshape (x, merged)
            [tokens] z = MatMul (m, W1)
            r = Relu (z)
            h = Reshape (r, apart)
            s = ReduceSum <keepdims = 0> (h, one)
            [last] y = MatMul (s, W4)
        }""",
        {"W1": W1, "W4": random(8, 4)},
    )
    return Subject(proto, "x", (3, 6), "y")


def tokens_first() -> Subject:
    """A dense layer over [tokens, samples, features], as recurrent networks have it."""
    proto = build(
        """g (float[N, 3, 6] x) => (float[N, 4] y) <int64[1] zero = {0}> {
            m = Transpose <perm = [1, 0, 2]> (x)
            [tokens] z = MatMul (m, W1)
            r = Relu (z)
            s = ReduceSum <keepdims = 0> (r, zero)
            [last] y = MatMul (s, W4)
        }""",
        {"W1": W1, "W4": random(8, 4)},
    )
    return Subject(proto, "x", (3, 6), "y")


@pytest.mark.parametrize("make", [tokens_merged, tokens_first])
def test_layers_without_samples_on_axis_0_are_refused_by_name(make: Callable[[], Subject], tmp_path: Path) -> None:
    subject = make()
    experiment = operate(subject, tmp_path)
    refusals = {layer.name: layer.refusal for layer in experiment.layers}
    assert refusals == {"tokens": "axis 0 of 'm' does not hold the samples", "last": None}
    assert [site.tensor for site in experiment.sites] == ["s"]
    with pytest.raises(ModelError, match="axis 0 of 'z' does not hold the samples"):
        experiment.suffix("z", "span").cache(subject.samples(3))


def test_layers_of_another_head_are_set_aside(tmp_path: Path) -> None:
    subject = dense_subject(
        """[first] z = Gemm (x, W1) h = Relu (z) [second] y = Gemm (h, W2)
        [other] a = Gemm (x, W3) r = Relu (a) [last] o = Gemm (r, W4)""",
        {"W1": W1, "W2": random(8, 4), "W3": W1 * 2, "W4": random(8, 4, seed=1)},
    )
    subject.proto.graph.output.append(helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, ["N", 4]))
    experiment = operate(subject, tmp_path)
    assert [site.tensor for site in experiment.sites] == ["h"]
    unread = "'y' does not depend on it"
    refusals = {layer.name: layer.refusal for layer in experiment.layers}
    assert refusals == {"first": None, "second": None, "other": unread, "last": unread}


# -- the batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_is_relaxed_in_the_copy_alone(size: int, tmp_path: Path) -> None:
    proto = build(
        f"""g (float[{size}, 2, 3] x) => (float[{size}, 4] y)
        <int64[2] flat = {{{size}, -1}}, int64[2] wide = {{{size}, 8}}> {{
            f = Reshape (x, flat)
            z = Gemm (f, W1)
            r = Relu (z)
            g = Reshape (r, wide)
            y = Gemm (g, V)
        }}""",
        {"W1": W1, "V": random(8, 4)},
    )
    model = save(proto, tmp_path)
    before = model.path.read_bytes()
    x = {"x": random(7, 2, 3, seed=3)}
    experiment = Experiment(model, "cpu", PLENTY, x)
    assert_close(experiment.scores(x), np.maximum(x["x"].reshape(7, 6) @ W1, 0) @ random(8, 4))
    suffix = experiment.suffix("r", "affine")
    at = suffix.cache(x)
    assert_close(suffix.affine(at, np.ones((4, 1, 1)), np.ones((1, 1, 1))), np.stack([experiment.scores(x)] * 4))
    assert model.path.read_bytes() == before == model.data
    assert model.proto == onnx.ModelProto.FromString(before)


FIXED = """g (float[1, 6] x) => (float[1, 4] y) {{ z = Gemm (x, W1) h = Relu (z) {nodes} y = Gemm (f, V) }}"""


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("c = Constant <value_ints = [1, -1]> () f = Reshape (h, c)", {}),
        ("c = Constant <value = int64[2] {1, -1}> () f = Reshape (h, c)", {}),
        ("f = Reshape <allowzero = 1> (h, c)", {"c": np.int64([1, 8])}),
        ("f = Reshape (h, c)", {"c": np.int64([-1, 8])}),
        ("c = Identity (d) f = Reshape (h, c)", {"d": np.int64([1, -1])}),
        ("b = Reshape (k, c) f = Add (h, b)", {"k": random(8), "c": np.int64([1, 8])}),
        ("b = Reshape (k, c) a = Add (h, b) f = Reshape (a, c)", {"k": random(8), "c": np.int64([1, -1])}),
        ("f = Add (h, b)", {"b": random(1, 8)}),
    ],
)
def test_reshapes_with_the_batch_in_their_target(nodes: str, weights: dict[str, Array], tmp_path: Path) -> None:
    proto = build(FIXED.format(nodes=nodes), {"W1": W1, "V": random(8, 4)} | weights)
    assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("m = ReduceMax <keepdims = 1> (h) f = Sub (h, m)", {}),
        ("f = Reshape (h, c)", {"c": np.int64([8])}),
        ("t = Squeeze (h, c) f = Unsqueeze (t, c)", {"c": np.int64([0])}),
        ("s = Softmax <axis = 0> (h) f = Add (s, h)", {}),
        ("t = Transpose (h) m = MatMul (h, t) f = Mul (h, m)", {}),
    ],
)
def test_rows_that_mix_cannot_be_relaxed(nodes: str, weights: dict[str, Array], tmp_path: Path) -> None:
    text = (
        FIXED
        if "[8]" not in str(weights)
        else FIXED.replace("y = Gemm (f, V)", "u = Unsqueeze (f, z0) y = Gemm (u, V)")
    )
    proto = build(text.format(nodes=nodes), {"W1": W1, "V": random(8, 4), "z0": np.int64([0])} | weights)
    with pytest.raises(ModelError, match=r"model\.onnx: .*batch"):
        operate(Subject(proto, "x", (6,), "y"), tmp_path)


def test_a_computed_target_that_fits_by_chance_is_refused(tmp_path: Path) -> None:
    # With as many rows as the file fixes, the target [3, -1] would look as if it were free.
    proto = build(
        """g (float[3, 6] x) => (float[3, 4] y) {
            z = Gemm (x, W1)
            target = Concat <axis = 0> (three, rest)
            h = Reshape (z, target)
            y = Gemm (h, V)
        }""",
        {"W1": W1, "V": random(8, 4), "three": np.int64([3]), "rest": np.int64([-1])},
    )
    with pytest.raises(ModelError, match=r"model\.onnx: its batch size is fixed in a way that cannot be relaxed"):
        operate(Subject(proto, "x", (6,), "y"), tmp_path)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("per_run", [1, 2, 1024])
def test_rows_of_a_fixed_batch_are_padded(size: int, rows: int, per_run: int, tmp_path: Path) -> None:
    proto = build(f"g (float[{size}, 6] x) => (float[{size}, 4] y) {{ y = Gemm (x, W) }}", {"W": W3})
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    x = random(rows, 6, seed=3)
    (found,) = Session(path).run_rows({"x": x}, rows_per_run=per_run)
    assert_close(found, x @ W3)


def test_rows_that_mix_in_a_free_batch_are_refused_as_well(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) m = ReduceMax <keepdims = 1> (z) f = Sub (z, m) y = Gemm (f, V)",
        {"W1": W1, "V": random(8, 4)},
    )
    with pytest.raises(ModelError, match=r"model\.onnx: several rows in one run do not answer as single rows do"):
        operate(subject, tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_probe_rows_are_enough(rows: int, tmp_path: Path) -> None:
    subject = SUBJECTS["acas"]()
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", PLENTY, subject.samples(rows))
    assert_close(experiment.scores(subject.samples(4)), original(subject, subject.samples(4), "costs")[0])


def test_an_old_operator_set_is_refused(tmp_path: Path) -> None:
    subject = dense_subject("y = MatMul (x, W3)", {"W3": W3}, opset=7)
    with pytest.raises(ModelError, match="opset 7; experiments need opset 8"):
        operate(subject, tmp_path)


def test_external_data_is_taken_inside(tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]()
    x = subject.samples(SIZE)
    expected = run(subject.proto, x)[0]
    path = tmp_path / "model.onnx"
    onnx.save(subject.proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    experiment = Experiment(load_model(path), "cpu", PLENTY, x)
    assert len(experiment.model.external_files()) == 1
    assert_close(experiment.scores(x), expected)
    suffix = experiment.suffix("h1", "affine")
    assert_close(suffix.affine(suffix.cache(x), np.ones((2, 1, 1)), np.ones((1, 1, 1)))[1], expected)


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
