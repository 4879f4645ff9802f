"""Interventions in families, against the model with one activation replaced by hand and against patched files."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph.models import SUBJECTS, Array, Reference, Subject, build, random, residual, run, save
from graph.operating import (
    PLENTY,
    SIZE,
    W1,
    W3,
    Sent,
    assert_close,
    assert_cuts,
    assert_identical,
    dense_subject,
    operate,
    original,
)
from onnx import helper

from onnxcare import experiment as experiments
from onnxcare import runtime
from onnxcare.decision import Decision
from onnxcare.errors import ModelError, SpecError, UsageError
from onnxcare.experiment import Experiment, _Kept, judged_output
from onnxcare.graph import surgery
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import load_model
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.patch import Patch
from onnxcare.graph.sites import Site
from onnxcare.graph.storage import Source
from onnxcare.runtime import Session
from onnxcare.suffix import Activations, Family, Suffix


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
        values = {
            p.name: p.storage.read(Source(model.proto, model.path.parent)) for p in (layer.weight, layer.bias) if p
        }
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
        weight = layer.weight.storage.read(Source(model.proto, model.path.parent))
        values[layer.weight] = layer.scale_inputs(factors[units], weight)
    changed = Subject(onnx.ModelProto.FromString(Patch(values).apply(model)), "", (), "")
    return original(changed, table.x, table.subject.logits)[0]


# -- pieces of a family --------------------------------------------------------------------------


def memory_for(experiment: Experiment, x: dict[str, Array], tensors: list[str]) -> int:
    """Return the least memory with which the activations at these cuts may be cached."""
    cached = [experiment.suffix(tensor, "affine").cache(x) for tensor in tensors]
    return max(4 * (at.base.nbytes + sum(values.nbytes for values in at.boundary.values())) for at in cached)


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
        session = suffix.part.session
        plain = session.run
        rows[name] = 0

        def counted(feeds: dict[str, Array], run=plain, name: str = name) -> list[Array]:  # type: ignore[no-untyped-def]
            found = run(feeds)
            rows[name] = max(rows[name], len(found[0]))
            return found

        monkeypatch.setattr(session, "run", counted)
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


def test_only_the_latest_family_holds_on_to_its_samples(tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]()
    experiment = operate(subject, tmp_path)
    held = []
    for tensor in ("h1", "h2"):
        suffix = experiment.suffix(tensor, "affine")
        at = suffix.cache(subject.samples(SIZE))
        ones = np.ones((1, *[1] * at.base.ndim))
        suffix.affine(at, ones, ones)
        held.append(weakref.ref(at))
        del at
    gc.collect()
    assert [item() is None for item in held] == [True, False]


def test_a_suffix_is_made_once(table: Table) -> None:
    tensor = table.cuts[0]
    assert table.experiment.suffix(tensor, "affine") is table.experiment.suffix(tensor, "affine")
    assert table.experiment.suffix(tensor, "affine") is not table.experiment.suffix(tensor, "span")


# -- side by side --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_family_that_travels_answers_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS[name]()
    experiment, x = operate(subject, tmp_path), subject.samples(SIZE)
    monkeypatch.setattr(experiment, "rows_of", lambda part: 5)
    tensors = [layer.output for layer in experiment.layers] + [site.tensor for site in experiment.sites]

    def answers() -> list[Array]:
        found = []
        for tensor in dict.fromkeys(tensors):
            affine, span = (experiment.suffix(tensor, kind) for kind in ("affine", "span"))
            at = affine.cache(x)
            keep, reference = random(4, 1, *at.base.shape[1:], seed=25), random(1, *at.base.shape, seed=26)
            found.append(affine.affine(at, keep, reference))
            found.append(span.span(span.cache(x), random(4, 2, seed=27), random(2, *at.base.shape, seed=28)))
        return found

    alone = answers()
    experiment.pool = sent = Sent()
    for shared, expected in zip(answers(), alone, strict=True):
        assert_identical(shared, expected)
    assert sent.jobs == SIZE * len(alone)


def use_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(runtime, "cores", lambda: count)
    monkeypatch.setattr(runtime, "_threads", functools.cache(runtime._threads.__wrapped__))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["affine", "span"])
def test_threads_answer_what_one_job_after_another_does(
    table: Table, kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cores(monkeypatch, count)
    threads: set[str] = set()

    def doubled(answer: Array) -> Array:
        threads.add(threading.current_thread().name)
        return 2 * answer

    for tensor in table.cuts:
        suffix, at = table.cut(tensor, kind)
        family, jobs = family_of(suffix, at, kind)
        one_by_one = [2 * family(*job) for job in jobs]
        found = table.experiment.map(family, jobs, doubled)
        assert len(found) == len(jobs) == 20
        for answer, expected in zip(found, one_by_one, strict=True):
            assert_identical(answer, expected)
    assert (threading.current_thread().name in threads) == (count == 1)


def family_of(suffix: Suffix, at: Activations, kind: str) -> tuple[Family, list[tuple[dict[str, Array], slice]]]:
    """Return a family, and jobs of one member and some of the samples each."""
    dtype, shape = at.base.dtype.type, at.base.shape
    if kind == "affine":
        constant = {surgery.REFERENCE: random(1, *shape, seed=36, dtype=dtype)}
        varying = {surgery.KEEP: random(10, *shape, seed=37, dtype=dtype)}
    else:
        constant = {surgery.DIRECTIONS: random(2, *shape, seed=38, dtype=dtype)}
        varying = {surgery.COEFFICIENTS: random(10, 2, seed=39, dtype=dtype)}
    members = [{name: values[i : i + 1] for name, values in varying.items()} for i in range(10)]
    jobs = [(member, rows) for member in members for rows in (slice(0, 4), slice(4, SIZE))]
    return Family(suffix.part, at, constant), jobs


def test_an_error_in_one_thread_is_raised_and_cancels_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = operate(SUBJECTS["mlp"](), tmp_path)
    use_cores(monkeypatch, 2)
    begun: list[int] = []
    gate = threading.Event()

    def runner(number: int) -> Array:
        begun.append(number)
        if number == 0:
            raise ModelError("model.onnx: no good")
        assert gate.wait(10)
        return np.full(1, number)

    with pytest.raises(ModelError, match=r"^model\.onnx: no good$"):
        experiment.map(runner, [(number,) for number in range(50)], np.copy)
    gate.set()
    runtime._threads().shutdown()
    # Both threads may have taken one more job before the error was seen.
    assert set(begun) <= {0, 1, 2}


def test_an_error_in_what_becomes_of_an_answer_is_raised_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = operate(SUBJECTS["mlp"](), tmp_path)

    def refuse(answer: Array) -> Array:
        raise ModelError(f"answer {answer[0]}")

    for count in (1, 4):
        use_cores(monkeypatch, count)
        with pytest.raises(ModelError, match="answer 0"):
            experiment.map(np.atleast_1d, [(number,) for number in range(9)], refuse)


# -- sessions that are kept ----------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    nbytes: int


class Shelf:
    """What is kept within ten bytes, and the names of all that was made."""

    def __init__(self) -> None:
        self.kept, self.made = _Kept(10), ""

    def get(self, name: str, nbytes: int = 4) -> Item:
        def make() -> Item:
            self.made += name
            return Item(nbytes)

        return self.kept.get((name,), make)


def test_what_was_used_last_is_kept_as_far_as_it_fits() -> None:
    shelf = Shelf()
    assert shelf.get("a") is shelf.get("a")
    for name in "bacaba":  # c takes the place of b, and b that of c, but a is used again and again
        shelf.get(name)
    assert shelf.made == "abcb"
    shelf = Shelf()
    for name in "abacdefab":  # five of two bytes fit
        shelf.get(name, 2)
    assert shelf.made == "abcdefb"


def test_what_fits_exactly_is_kept_and_a_byte_more_is_not() -> None:
    for last, made in ((2, "abc"), (3, "abca")):
        shelf = Shelf()
        for name, nbytes in (("a", 4), ("b", 4), ("c", last), ("a", 4)):
            shelf.get(name, nbytes)
        assert shelf.made == made


def test_what_is_larger_than_the_bound_is_kept_alone() -> None:
    shelf = Shelf()
    for name, nbytes in (("a", 4), ("x", 99), ("x", 99), ("a", 4), ("x", 99)):
        shelf.get(name, nbytes)
    assert shelf.made == "axax"


def test_nothing_is_left_on_a_cleared_shelf() -> None:
    shelf = Shelf()
    shelf.get("a")
    shelf.kept.clear()
    shelf.get("a")
    assert shelf.made == "aa"


def count_sessions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every session that an experiment opens."""
    opened: list[str] = []

    class Counted(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            opened.append(options.get("what", ""))
            super().__init__(*args, **options)

    monkeypatch.setattr(experiments, "Session", Counted)
    return opened


@pytest.mark.parametrize("name", SUBJECTS)
def test_one_session_serves_all_tensors_of_a_large_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = SUBJECTS[name]()
    x = subject.samples(SIZE)
    (tmp_path / "large").mkdir()
    small = operate(subject, tmp_path)
    monkeypatch.setattr(experiments, "_KEPT", 1)
    large = operate(subject, tmp_path / "large")
    names = sorted({t for layer in small.layers for t in (layer.input, layer.output)} | {small.logits})
    opened = count_sessions(monkeypatch)
    values = large.tensors(names, x)
    for subset in (*([one] for one in names), names[::-1], [small.logits, subject.input]):
        for one, value in zip(subset, large.tensors(subset, x), strict=True):
            expected = x[one] if one in x else values[names.index(one)]
            assert_identical(value, expected)
    assert len(opened) == 1
    for value, expected in zip(values, small.tensors(names, x), strict=True):
        assert_close(value, expected)
    assert_close(large.scores(x), small.scores(x))
    # A candidate has a session of its own, with its own weights.
    changed = disturbed(large, seed=41)
    candidate, expected = large.patched(changed), small.patched(changed).scores(x)
    opened.clear()
    assert_close(candidate.scores(x), expected)
    candidate.tensors(names, x)
    assert len(opened) == 1
    assert_close(large.scores(x), small.scores(x))
    assert len(opened) == 1, "that of the original is kept"


def test_tensors_of_a_small_model_have_sessions_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS["mlp"]()
    experiment, x = operate(subject, tmp_path), subject.samples(SIZE)
    opened = count_sessions(monkeypatch)
    for names in (["h1"], ["h2"], ["h1", "h2"], ["h1"], ["h2"]):
        experiment.tensors(names, x)
    assert len(opened) == 3


def test_room_is_made_by_letting_go_of_the_sessions_of_a_large_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = SUBJECTS["cnn"]()
    experiment, x = operate(subject, tmp_path), subject.samples(SIZE)
    tensor = experiment.layers[0].output
    before, scores = experiment.suffix(tensor, "span"), experiment.scores(x)
    known = experiment.once(("fact",), object)
    experiment.make_room()
    assert experiment.suffix(tensor, "span") is before, "a small one keeps them"
    monkeypatch.setattr(experiments, "_LARGE", 0)
    experiment.make_room()
    opened = count_sessions(monkeypatch)
    assert_identical(experiment.scores(x), scores)
    assert len(opened) == 1
    assert experiment.suffix(tensor, "span") is not before
    assert experiment.once(("fact",), object) is known


# -- candidates ----------------------------------------------------------------------------------


def as_written(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    return proto


def as_constant_nodes(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    tensors = list(proto.graph.initializer)
    fed = [info for info in proto.graph.input if info.name not in {tensor.name for tensor in tensors}]
    del proto.graph.initializer[:], proto.graph.input[:]
    proto.graph.input.extend(fed)
    for tensor in tensors:
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    return proto


def as_external_data(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Write the sidecar; the proto refers to it."""
    onnx.save(proto, folder / "whole.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return onnx.load(folder / "whole.onnx", load_external_data=False)


def disturbed(experiment: Experiment, seed: int, layers: slice = slice(None)) -> dict[Parameter, Array]:
    """Return other values for the weights and biases of the layers."""
    known = {p for layer in experiment.layers[layers] for p in (layer.weight, layer.bias) if p is not None}
    ordered = sorted(known, key=lambda p: p.name)
    return {p: experiment.read(p) + 0.3 * random(*p.shape, seed=seed, dtype=p.dtype.type) for p in ordered}


def written(experiment: Experiment, values: dict[Parameter, Array], name: str) -> Path:
    """Write a candidate as a file, beside the sidecars of the original."""
    path = experiment.model.path.parent / name
    path.write_bytes(Patch(values).apply(experiment.model))
    return path


def answered(path: Path, experiment: Experiment, x: dict[str, Array]) -> Array:
    """Return what a file answers, row by row."""
    session = ort.InferenceSession(path)
    rows = [{name: values[i : i + 1] for name, values in x.items()} for i in range(SIZE)]
    return np.concatenate([session.run([experiment.output], row)[0] for row in rows])


@pytest.mark.parametrize("write", [as_written, as_constant_nodes, as_external_data])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_patched_experiment_answers_as_the_patched_file(name: str, write: Callable, tmp_path: Path) -> None:
    subject = SUBJECTS[name]()
    x = subject.samples(SIZE)
    experiment = Experiment(save(write(subject.proto, tmp_path), tmp_path), "cpu", PLENTY, x)
    held, copied = experiment.model.proto.SerializeToString(), experiment.copy.SerializeToString()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    scores = experiment.scores(x)
    first = experiment.layers[0]
    experiment.suffix(first.output, "span")  # what was opened already must not be taken for the candidate's
    values = disturbed(experiment, seed=31)
    assert len(values) > 3
    candidate = experiment.patched(values)
    expected = answered(written(experiment, values, "patched.onnx"), experiment, x)
    assert_close(candidate.tensors([candidate.output], x)[0], expected)
    assert np.abs(candidate.scores(x) - scores).max() > 0.1
    suffix = candidate.suffix(first.output, "span")
    at = suffix.cache(x)
    assert_close(suffix.span(at, np.zeros((1, 1)), at.base[None])[0], candidate.scores(x))
    for parameter, new in values.items():
        np.testing.assert_array_equal(candidate.read(parameter), new)
        assert (experiment.read(parameter) != new).any()
    # Nothing of the original has changed.
    assert_close(experiment.scores(x), scores, 0)
    assert experiment.model.proto.SerializeToString() == held
    assert experiment.copy.SerializeToString() == copied
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before


def test_a_candidate_can_be_worked_on_further(tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]()
    experiment, x = operate(subject, tmp_path), subject.samples(SIZE)
    first, second = disturbed(experiment, 32, slice(0, 2)), disturbed(experiment, 33, slice(1, 3))
    assert set(first) & set(second) and set(first) - set(second)
    candidate = experiment.patched(first).patched(second)
    expected = answered(written(experiment, first | second, "patched.onnx"), experiment, x)
    assert_close(candidate.scores(x), expected)
    assert (candidate.model, candidate.probe, candidate.sites) == (experiment.model, experiment.probe, experiment.sites)
    assert_close(experiment.patched({}).scores(x), experiment.scores(x))


def test_values_of_another_shape_are_no_candidate(tmp_path: Path) -> None:
    experiment = operate(SUBJECTS["mlp"](), tmp_path)
    weight = experiment.layers[0].weight
    with pytest.raises(ValueError, match="does not fit"):
        experiment.patched({weight: np.zeros((3, 3))})


# -- several inputs ------------------------------------------------------------------------------


def two_inputs() -> onnx.ModelProto:
    weights = {"W1": W1, "U": random(3, 8, seed=5), "V": random(8, 4, seed=6), "b": random(4, seed=7)}
    return build(
        """g (float[N, 6] x, float[N, 3] more) => (float[N, 4] y) {
            a = MatMul (x, W1)
            c = MatMul (more, U)
            s = Add (a, c)
            h = Relu (s)
            y = Gemm (h, V, b)
        }""",
        weights,
    )


def test_a_model_of_two_inputs(tmp_path: Path) -> None:
    proto = two_inputs()
    x = {"x": random(SIZE, 6), "more": random(SIZE, 3, seed=8)}
    experiment = Experiment(save(proto, tmp_path), "cpu", PLENTY, x)
    scores = run(proto, x, "y")[0]
    assert_close(experiment.scores(x), scores)
    assert [layer.output for layer in experiment.layers] == ["a", "c", "y"]
    for tensor in ("a", "c", "h"):
        suffix = experiment.suffix(tensor, "affine")
        at = suffix.cache(x)
        forced = random(*at.base.shape, seed=9)
        keep = np.stack([np.ones_like(forced), np.zeros_like(forced)])
        expected = Reference(proto, tensor, "y").scores(x, lambda h, row, forced=forced: forced[row : row + 1])
        assert_close(suffix.affine(at, keep, forced[None]), np.stack([scores, expected]))
    values = disturbed(experiment, seed=34)
    expected = answered(written(experiment, values, "patched.onnx"), experiment, x)
    assert_close(experiment.patched(values).scores(x), expected)
    found = experiment.tensors(["more", "h", "x"], x)
    assert found[0] is x["more"] and found[2] is x["x"]
    assert_close(found[1], run(proto, x, "h")[0])


# -- scores --------------------------------------------------------------------------------------


def test_a_softmax_in_the_middle_is_no_end(tmp_path: Path) -> None:
    subject = dense_subject("z = Gemm (x, W1) s = Softmax (z) y = Gemm (s, V)", {"W1": W1, "V": random(8, 4)})
    assert operate(subject, tmp_path).logits == "y"


HEADS = """g (float[N, 6] x) => (int64[N] label, float[N, 1] best, float[N, 4] y, float[N, 4] more, float[N] mean) {
    y = MatMul (x, W3)
    label = ArgMax <axis = 1, keepdims = 0> (y)
    best = ReduceMax <axes = [1]> (y)
    mean = ReduceMean <axes = [1], keepdims = 0> (y)
    more = Softmax (y)
}"""
THRESHOLD = Decision("threshold", 0.5)


@pytest.mark.parametrize(
    ("wanted", "decision", "found"),
    [
        (None, Decision(), "y"),
        (None, Decision("argmin"), "y"),
        (None, THRESHOLD, "best"),
        ("more", Decision(), "more"),
        ("y", Decision("argmin"), "y"),
        ("mean", THRESHOLD, "mean"),
    ],
)
def test_the_output_is_the_first_that_fits_or_the_one_that_is_asked_for(
    wanted: str | None, decision: Decision, found: str, tmp_path: Path
) -> None:
    model = save(build(HEADS, {"W3": W3}), tmp_path)
    assert judged_output(model, wanted, decision) == found
    x = {"x": random(SIZE, 6)}
    experiment = Experiment(model, "cpu", PLENTY, x, wanted, decision)
    assert experiment.output == found
    assert experiment.logits == ("y" if found == "more" else found)
    assert_close(experiment.tensors([found], x)[0], run(model.proto, x, found)[0])


@pytest.mark.parametrize(("axis", "logits"), [(1, "maps"), (-1, "y")])
def test_a_softmax_stands_for_the_classes_only_along_their_axis(axis: int, logits: str, tmp_path: Path) -> None:
    subject = build(
        f"""g (float[N, 6] x) => (float[N, 4, 1, 1] y) <int64[2] axes = {{2, 3}}> {{
            flat = MatMul (x, W3)
            maps = Unsqueeze (flat, axes)
            y = Softmax <axis = {axis}> (maps)
        }}""",
        {"W3": W3},
    )
    x = {"x": random(SIZE, 6)}
    experiment = Experiment(save(subject, tmp_path), "cpu", PLENTY, x)
    assert (experiment.logits, experiment.classes, experiment.decision.ones) == (logits, 4, 2)
    flat, y = run(subject, x, "flat", "y")
    assert_close(experiment.scores(x), flat if axis == 1 else y[..., 0, 0])


def test_an_output_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    model = save(build(HEADS, {"W3": W3}), tmp_path)
    with pytest.raises(SpecError, match=r"model\.onnx has no output 'labl' \(did you mean 'label'\?\)") as error:
        judged_output(model, "labl", Decision())
    assert str(error.value).startswith("output: ")
    assert "it answers label ['N'], best ['N', 1], y ['N', 4], more ['N', 4], mean ['N']" in str(error.value)
    with pytest.raises(SpecError, match="has no output 'qqq'; it answers label"):
        judged_output(model, "qqq", THRESHOLD)


@pytest.mark.parametrize(
    ("wanted", "decision", "needed"),
    [
        ("label", Decision(), "one score per class"),
        ("best", Decision(), "one score per class"),
        ("mean", Decision("argmin"), "one score per class"),
        ("label", THRESHOLD, "one score a sample"),
        ("y", THRESHOLD, "one score a sample"),
    ],
)
def test_an_output_that_does_not_fit_the_decision(wanted: str, decision: Decision, needed: str, tmp_path: Path) -> None:
    model = save(build(HEADS, {"W3": W3}), tmp_path)
    with pytest.raises(ModelError, match=rf"model\.onnx: output '{wanted}' does not hold {needed}.*mean \['N'\]"):
        judged_output(model, wanted, decision)


@pytest.mark.parametrize(
    ("outputs", "nodes", "shown", "advice"),
    [
        ("float[N, 1] y", "p = MatMul (x, W3) y = ReduceMax <axes = [1]> (p)", r"y \['N', 1\]", True),
        ("int64[N, 6] y", "y = Cast <to = 7> (x)", r"y \['N', 6\]", False),
        ("float[N] y", "p = MatMul (x, W3) y = ReduceMax <axes = [1], keepdims = 0> (p)", r"y \['N'\]", True),
    ],
)
def test_a_model_without_scores_per_class_is_refused(
    outputs: str, nodes: str, shown: str, advice: bool, tmp_path: Path
) -> None:
    model = save(build(f"g (float[N, 6] x) => ({outputs}) {{ {nodes} }}", {"W3": W3}), tmp_path)
    with pytest.raises(ModelError, match=rf"model\.onnx: no output with one score per class.*{shown}") as error:
        judged_output(model, None, Decision())
    assert str(error.value).endswith("; for y give decision: {threshold: 0.5}") == advice


def test_scores_per_class_have_no_threshold(tmp_path: Path) -> None:
    model = save(build("g (float[N, 6] x) => (float[N, 4] y) { y = MatMul (x, W3) }", {"W3": W3}), tmp_path)
    with pytest.raises(ModelError, match=r"model\.onnx: no output with one score a sample.*y \['N', 4\]") as error:
        judged_output(model, None, THRESHOLD)
    assert str(error.value).endswith("; for y give decision: argmax")


# Text behind the output's shape: rule, the tensor that is computed, the decisions by hand.
DECISIONS: dict[str, tuple[str, Decision, str, Callable[[Array], Array]]] = {
    "argmin": ("float[N, 4] y) { y = MatMul (h, V) }", Decision("argmin"), "y", lambda y: y.argmin(axis=1)),
    "argmin of probabilities": (
        "float[N, 4] y) { p = MatMul (h, V) y = Softmax (p) }",
        Decision("argmin"),
        "y",
        lambda y: y.argmin(axis=1),
    ),
    "argmax behind Identity": (
        "float[N, 4] y) { p = MatMul (h, V) q = Softmax (p) y = Identity (q) }",
        Decision(),
        "p",
        lambda y: y.argmax(axis=1),
    ),
    "a column": (
        "float[N, 1] y) { y = MatMul (h, U) }",
        Decision("threshold", 0.25),
        "y",
        lambda y: (y[:, 0] > 0.25).astype(int),
    ),
    "no column": (
        "float[N] y) { p = MatMul (h, U) y = Squeeze (p, one) }",
        Decision("threshold", -0.25),
        "y",
        lambda y: (y > -0.25).astype(int),
    ),
    "a column behind Sigmoid": (
        "float[N, 1] y) { p = MatMul (h, U) y = Sigmoid (p) }",
        Decision("threshold", 0.6),
        "p",
        lambda y: (y[:, 0] > 0.6).astype(int),
    ),
    "no column behind Sigmoid": (
        "float[N] y) { q = MatMul (h, U) p = Squeeze (q, one) y = Sigmoid (p) }",
        Decision("threshold", 0.4),
        "p",
        lambda y: (y > 0.4).astype(int),
    ),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_scores_stand_for_the_decision(name: str, tmp_path: Path) -> None:
    text, decision, logits, by_hand = DECISIONS[name]
    weights = {"W1": W1, "V": random(8, 4, seed=6), "U": random(8, 1, seed=6), "one": np.array([1])}
    used = {key: values for key, values in weights.items() if key == "W1" or f", {key})" in text}
    nodes = text.replace("{", "{ z = MatMul (x, W1) h = Relu (z)")
    proto = build(f"g (float[N, 6] x) => ({nodes}", used)
    x = {"x": random(60, 6, seed=10)}
    experiment = Experiment(save(proto, tmp_path), "cpu", PLENTY, x, None, decision)
    (y,) = run(proto, x, "y")
    decided = by_hand(y)
    assert len(np.unique(decided)) > 1
    assert (experiment.output, experiment.logits) == ("y", logits)
    scores = experiment.scores(x)
    assert scores.shape == (60, experiment.classes) == (60, 2 if decision.rule == "threshold" else 4)
    np.testing.assert_array_equal(scores.argmax(axis=-1), decided)
    assert_close(experiment.decision.outputs(scores).reshape(y.shape), y)
    # Interventions and candidates are read in the same way.
    few = {"x": x["x"][:9]}
    for kind in ("affine", "span"):
        suffix = experiment.suffix("z", kind)
        at = suffix.cache(few)
        forced = random(*at.base.shape, seed=11)
        if kind == "affine":
            found = suffix.affine(at, np.stack([np.ones_like(forced), np.zeros_like(forced)]), forced[None])
        else:
            found = suffix.span(at, np.array([[0.0], [1.0]]), (forced - at.base)[None])
        replaced = Reference(proto, "z", "y").scores(few, lambda h, row, forced=forced: forced[row : row + 1])
        assert_close(found[0], scores[:9])
        np.testing.assert_array_equal(found[1].argmax(axis=-1), by_hand(replaced))
    values = disturbed(experiment, seed=35)
    session = ort.InferenceSession(Patch(values).apply(experiment.model))
    np.testing.assert_array_equal(
        experiment.patched(values).scores(x).argmax(axis=-1), by_hand(session.run(["y"], x)[0])
    )


def test_scores_that_are_no_logits_are_scaled_by_all_that_is_given(tmp_path: Path) -> None:
    """The order of magnitude comes from up to 1,000 samples, not from the few that things are tried out on."""
    model = save(build("g (float[N, 6] x) => (float[N, 4] y) { y = MatMul (x, W3) }", {"W3": W3}), tmp_path)
    x = {"x": random(400, 6) * np.linspace(1, 100, 400, dtype=np.float32)[:, None]}
    experiment = Experiment(model, "cpu", PLENTY, x, None, Decision("argmin"))
    margins = np.sort(experiment.scores(x), axis=1)
    assert np.median(margins[:, -1] - margins[:, -2]) == pytest.approx(5, rel=1e-4)
    assert len(experiment.probe["x"]) == 2


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


def test_scores_that_are_maps_are_read_as_what_they_are_made_of(tmp_path: Path) -> None:
    model = zipmap("float[N, 1] unused")
    del model.graph.output[1]
    loaded = save(model, tmp_path)
    assert [output.name for output in loaded.outputs] == ["label", "maps"]
    x = {"x": random(SIZE, 6)}
    experiment = Experiment(loaded, "cpu", PLENTY, x)
    assert (experiment.output, experiment.logits) == ("maps", "p")
    maps = run(model, x, "maps")[0]
    expected = [[one[label] for label in range(4)] for one in maps]
    np.testing.assert_allclose(Session(loaded.path).run_rows(x, ["maps"], rows_per_run=3)[0], expected)


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
    # The stem's normalisation leads into a Relu.
    assert behind == {"stem": None, "conv1": None, "conv2": ("a", None), "down": None, "fc": None}


NORMS = {
    "scale": np.float32([1, -2, 0.5, 3, 1, 1, 1, 4]),
    "shift": random(8, seed=2),
    "mean": random(8, seed=3),
    "var": np.float32([1, 4, 0.25, 9, 1, 2, 3, 16]),
}
NORMALISED = "BatchNormalization{} (z, scale, shift, mean, var)"


@pytest.mark.parametrize(("epsilon", "written"), [(1e-5, ""), (0.5, " <epsilon = 0.5>")])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_the_sum_behind_a_normalisation(tmp_path: Path, kind: str, epsilon: float, written: str) -> None:
    norm = NORMALISED.format(written)
    if kind == "dense":
        nodes = f"[in] z = Gemm (x, W1) n = {norm} [skip] k = MatMul (x, W2) s = Add (k, n) y = MatMul (s, V)"
        weights = {"W1": W1, "W2": random(6, 8, seed=4), "V": random(8, 4)}
        subject = dense_subject(nodes, weights | NORMS)
    else:
        proto = build(
            f"""g (float[N, 2, 3, 3] x) => (float[N, 4] y) {{
                [in] z = Conv (x, W1) n = {norm} [skip] k = Conv (x, W2) s = Add (k, n)
                f = Flatten (s) y = MatMul (f, V)
            }}""",
            {"W1": random(8, 2, 2, 2), "W2": random(8, 2, 2, 2, seed=4), "V": random(32, 4)} | NORMS,
        )
        subject = Subject(proto, "x", (2, 3, 3), "y")
    experiment = operate(subject, tmp_path)
    layers = {layer.name: layer for layer in experiment.layers}
    tensor, factor = experiment.sum_behind(layers["in"])
    assert tensor == "s" and experiment.sum_behind(layers["skip"]) == ("s", None)
    np.testing.assert_allclose(np.ravel(factor), NORMS["scale"] / np.sqrt(NORMS["var"] + epsilon), rtol=1e-6)
    # What is added to the output comes out of the sum multiplied with it.
    x = subject.samples(5)
    z, before = original(subject, x, "z", "s")
    added = random(*z.shape, seed=5)
    by_hand = Reference(subject.proto, "z", "s").scores(x, lambda h, row: h + added[row : row + 1])
    assert_close(added * factor, by_hand - before)


@pytest.mark.parametrize(
    "nodes",
    [
        "n = {norm} s = Relu (n)",
        "n = {norm} s = Add (n, z)",
        "n = {norm} m = Relu (n) k = MatMul (x, W2) q = Add (k, n) s = Mul (q, m)",
        "n = {norm} s = Add (n, shift)",
        "n = {norm} s = Add (n, n)",
        "t = Abs (scale) n = BatchNormalization (z, t, shift, mean, var) k = MatMul (x, W2) s = Add (k, n)",
    ],
    ids=["no sum", "read by others", "normalised one read by others", "constant", "twice", "computed factor"],
)
def test_what_is_no_sum_behind_a_normalisation(tmp_path: Path, nodes: str) -> None:
    text = "[in] z = Gemm (x, W1) " + nodes.format(norm=NORMALISED.format("")) + " y = MatMul (s, V)"
    subject = dense_subject(text, {"W1": W1, "W2": random(6, 8, seed=4), "V": random(8, 4)} | NORMS)
    experiment = operate(subject, tmp_path)
    assert experiment.sum_behind(next(layer for layer in experiment.layers if layer.name == "in")) is None


# -- only some layers ----------------------------------------------------------------------------


def test_only_some_layers(tmp_path: Path) -> None:
    experiment = operate(residual(), tmp_path)
    some = experiment.only(["conv*", "fc"])
    refused = {layer.name for layer in some.layers if layer.refusal is not None}
    assert refused == {"stem", "down"}
    assert {layer.refusal for layer in some.layers if layer.name in refused} == {"--layers leaves it out"}
    # Whoever reads the multipliers of a site has to take them.
    readers = {site.tensor: {reader.name for reader in site.readers} for site in experiment.sites}
    for before, after in zip(experiment.sites, some.sites, strict=True):
        left_out = not readers[before.tensor] <= {"conv1", "conv2", "fc"}
        assert (after.refusal is None) == (before.refusal is None and not left_out)
    # The one it was made from is as before, and so are the answers.
    assert all(layer.refusal is None for layer in experiment.layers)
    x = residual().samples(4)
    np.testing.assert_array_equal(some.scores(x), experiment.scores(x))
    assert all(layer.refusal is None for layer in experiment.only(["*"]).layers)


def test_reasons_for_a_refusal_stay(tmp_path: Path) -> None:
    subject = dense_subject("[in] z = Gemm <alpha = 0.0> (x, W1) h = Relu (z) [out] y = MatMul (h, V)",
                            {"W1": W1, "V": random(8, 4)})  # fmt: skip
    experiment = operate(subject, tmp_path)
    (reason,) = [layer.refusal for layer in experiment.layers if layer.name == "in"]
    assert reason is not None
    for patterns in (["in"], ["out"]):
        assert experiment.only(patterns).layers[0].refusal == reason


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["cnov1"], ["--layers cnov1: ", "has no such layer (did you mean 'conv1'?)", "stem, conv1, conv2, down, fc"]),
        (["conv1", "block*"], ["--layers block*: ", "has no such layer", "it has stem, "]),
    ],
)
def test_a_pattern_that_matches_no_layer(tmp_path: Path, patterns: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        operate(residual(), tmp_path).only(patterns)
    assert all(word in str(caught.value) for word in words)


def test_a_constant_behind_a_layer_is_no_sum(tmp_path: Path) -> None:
    subject = dense_subject(
        "p = Gemm (x, W1) s = Add (p, c) r = Relu (s) y = MatMul (r, V)",
        {"W1": W1, "c": np.float32([2]), "V": random(8, 4)},
    )
    experiment = operate(subject, tmp_path)
    assert [experiment.sum_behind(layer) for layer in experiment.layers] == [None, None]


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    nodes = "[a] z = MatMul (x, W1) h = Relu (z) [b] p = MatMul (h, W2) [c] y = MatMul (p, W3)"
    subject = dense_subject(nodes, {"W1": W1, "W2": random(8, 6), "W3": W3})
    for node, name in zip([n for n in subject.proto.graph.node if n.op_type == "MatMul"], ["m[1]", "m1", "m[2]"],
                          strict=True):  # fmt: skip
        node.name = name
    experiment = operate(subject, tmp_path)
    for pattern, allowed in (("m[1]", ["m[1]"]), ("m[12]", ["m1"]), ("m[2]", ["m[2]"]), ("m*", ["m[1]", "m1", "m[2]"])):
        assert [layer.name for layer in experiment.only([pattern]).layers if layer.refusal is None] == allowed


def test_of_many_layers_some_are_named(tmp_path: Path) -> None:
    nodes = "".join(f"[layer{i}] z{i + 1} = MatMul (z{i}, V) " for i in range(1, 40))
    subject = dense_subject(f"[layer0] z1 = MatMul (x, V) {nodes} y = MatMul (z40, W3)", {"V": random(6, 6), "W3": W3})
    with pytest.raises(UsageError) as caught:
        operate(subject, tmp_path).only(["layer99"])
    assert "(did you mean 'layer9'?); it has layer0, layer1, " in str(caught.value)
    assert str(caught.value).endswith("layer7 and 33 more") and "layer8," not in str(caught.value)


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
