"""Restored triggers: what they do in a plain session, and which classes stand out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hidden
import numpy as np
import pytest
from graph.models import build
from graph.models import run as run_outputs
from hidden import CHANNEL_FIRST, CHANNEL_LAST, FLAT, GREY, OTHER_PIXEL, OTHER_TARGET, PIXEL, TARGET
from onnx import helper, numpy_helper

from onnxcare.data import Dataset
from onnxcare.decision import Decision
from onnxcare.errors import DataError
from onnxcare.properties import inversion
from onnxcare.properties.inversion import FEWEST_CLASSES, Scan, reinforced, scan, smallest_patch, stand_out
from onnxcare.properties.trigger import Trigger
from onnxcare.properties.trigger_search import Restored

Array = np.ndarray

TWO = {PIXEL: TARGET, OTHER_PIXEL: OTHER_TARGET}
SHAPES = [FLAT, CHANNEL_FIRST, CHANNEL_LAST]


def scanned(folder: Path, shape: tuple[int, ...] = FLAT, seed: int = 1, corners: dict | None = None) -> Scan:
    data = hidden.samples(300, 1, shape)
    return scan(hidden.opened(hidden.model(corners, shape), data, folder), data, seed)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], Scan]:
    """Scans of the model with one hidden trigger, by the shape of its images."""
    return functools.cache(lambda shape: scanned(tmp_path_factory.mktemp("scan"), shape))


@pytest.fixture(params=SHAPES, ids=["flat", "channel first", "channel last"])
def found(request: pytest.FixtureRequest, scans: Callable[[tuple[int, ...]], Scan]) -> tuple[tuple[int, ...], Scan]:
    """The shape of images, and a scan of the model that takes them."""
    return request.param, scans(request.param)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """A scan of the model with two hidden triggers."""
    return scanned(tmp_path_factory.mktemp("two"), corners=TWO)


# -- what is restored ----------------------------------------------------------------------------


def test_a_restored_patch_sends_nearly_all_other_samples_to_its_class(tmp_path, found):
    shape, result = found
    fresh = hidden.samples(600, 9, shape)
    proto = hidden.model(shape=shape)
    for item in result.patches:
        if item.trigger is None:
            continue
        others = fresh.inputs["x"][fresh.truth != item.target]
        mask, pattern = item.trigger.mask, item.trigger.pattern
        stamped = np.stack([sample * (1 - mask) + pattern * mask for sample in others]).astype(np.float32)
        share = (run_outputs(proto, {"x": stamped})[0].argmax(axis=1) == item.target).mean()
        assert share >= (0.85 if item.target == TARGET else 0.75)
    assert sum(item.trigger is not None for item in result.patches) >= 5


def test_of_the_right_class_alone_a_small_trigger_is_found_where_it_lies(found):
    shape, result = found
    (suspect,) = result.suspects
    assert suspect.target == TARGET
    patch = suspect.triggers[0]
    by_pixel = patch.mask if shape == FLAT else patch.mask.mean(axis=0 if shape == CHANNEL_FIRST else 2)
    place = np.unravel_index(by_pixel.reshape(hidden.SIDE, hidden.SIDE).argmax(), (hidden.SIDE, hidden.SIDE))
    assert tuple(place) == PIXEL
    assert patch.mask.mean() < 0.02


def test_the_size_is_the_mean_of_the_mask_and_one_where_there_is_no_trigger(found):
    shape, result = found
    for target, item in enumerate(result.patches):
        assert (item.target, item.form) == (target, "patch")
        if item.trigger is None:
            assert item.size == 1
            continue
        assert item.trigger.source == "restored patch"
        assert item.trigger.mask.shape == item.trigger.pattern.shape == shape
        total = sum(float(value) for value in item.trigger.mask.reshape(-1))
        assert item.size == pytest.approx(total / int(np.prod(shape)), rel=1e-5)


def every_trigger(result: Scan) -> Iterator:
    for item in result.patches:
        if item.trigger is not None:
            yield item.trigger
    for suspect in result.suspects:
        yield from suspect.triggers


def test_masks_are_shares_and_patterns_lie_in_the_range_of_the_data(found):
    shape, result = found
    values = hidden.samples(300, 1, shape).inputs["x"]
    for trigger in every_trigger(result):
        assert trigger.mask.dtype == trigger.pattern.dtype == np.float32
        assert trigger.mask.min() >= 0 and trigger.mask.max() <= 1
        assert trigger.pattern.min() >= values.min() and trigger.pattern.max() <= values.max()


def test_channels_of_an_image_share_a_mask_and_not_a_pattern(found):
    shape, result = found
    for item in result.patches:
        if item.trigger is None:
            continue
        mask, pattern = item.trigger.mask, item.trigger.pattern
        if shape == FLAT:
            assert len(np.unique(mask)) > 32
            continue
        axis = 0 if shape == CHANNEL_FIRST else 2
        np.testing.assert_array_equal(mask, np.repeat(mask.take([0], axis), 3, axis))
        other_way = 2 if shape == CHANNEL_FIRST else 0
        assert (mask.max(axis=other_way) > mask.min(axis=other_way)).all()
        assert (pattern.max(axis=axis) > pattern.min(axis=axis)).all()


def test_a_blend_has_one_share_for_the_whole_input(both):
    blends = [trigger for suspect in both.suspects for trigger in suspect.triggers if "blend" in trigger.source]
    assert blends
    for trigger in blends:
        assert trigger.source == "restored blend"
        assert len(np.unique(trigger.mask)) == 1
        assert len(np.unique(trigger.pattern)) > 32


def test_two_hidden_triggers_give_two_suspects(both):
    assert sorted(item.target for item in both.suspects) == sorted(TWO.values())
    assert both.suspects[0].index >= both.suspects[1].index
    for suspect in both.suspects:
        assert suspect.triggers[0].source == "restored patch"
        np.testing.assert_array_equal(suspect.triggers[0].mask, both.patches[suspect.target].trigger.mask)


def test_without_a_hidden_trigger_no_class_stands_out(tmp_path):
    assert scanned(tmp_path, corners={}).suspects == []


def test_bounds_take_the_place_of_the_range_of_the_data(tmp_path):
    """A corner that may hold 0.5 at most: the pattern keeps to it value by value, whatever the data holds."""
    data = hidden.samples(300, 1)
    rng = np.random.default_rng(4)
    low, high = rng.uniform(-0.5, 0, FLAT), rng.uniform(0.4, 0.6, FLAT)
    result = scan(hidden.opened(hidden.model(), data, tmp_path), data, 1, bounds=(low, high))
    triggers = list(every_trigger(result))
    assert triggers and [item.target for item in result.suspects] == [TARGET]
    for trigger in triggers:
        assert (trigger.pattern >= low - 1e-6).all() and (trigger.pattern <= high + 1e-6).all()
    assert any((trigger.pattern < -0.1).any() for trigger in triggers)


def test_pixels_share_a_range_and_columns_of_different_scales_do_not():
    rng = np.random.default_rng(6)
    pixels = rng.uniform(size=(40, 1, 3, 3)).astype(np.float32)
    pixels[:, 0, 0, 0] = 0
    low, high = inversion._range(pixels)
    assert low.shape == high.shape == (1, 3, 3)
    assert (low == pixels.min()).all() and (high == pixels.max()).all()
    table = (rng.uniform(size=(40, 4)) * [1, 2, 1, 5000]).astype(np.float32)
    low, high = inversion._range(table)
    for column in range(4):
        assert low[column] == table[:, column].min() and high[column] == table[:, column].max()


def test_samples_of_a_class_itself_are_no_part_of_the_search_for_its_trigger(tmp_path):
    """Those of the target would make any mask look as if it worked: what they hold must not matter."""
    data = hidden.samples(300, 1)
    spoilt = {"x": data.inputs["x"].copy()}
    spoilt["x"][data.truth == TARGET] = spoilt["x"][data.truth == TARGET][:, ::-1]
    experiment = hidden.opened(hidden.model(), data, tmp_path)
    first = smallest_patch(experiment, data, TARGET, 1)
    second = smallest_patch(experiment, Dataset(spoilt, data.labels), TARGET, 1)
    assert first.trigger is not None and second.trigger is not None
    np.testing.assert_array_equal(first.trigger.mask, second.trigger.mask)


def fingerprint(result: Scan) -> list[object]:
    found: list[object] = [(item.target, item.form, item.size) for item in result.patches]
    found += [(item.target, item.index, item.confidence, item.ratio) for item in result.suspects]
    return found + [(t.source, t.mask.tobytes(), t.pattern.tobytes()) for t in every_trigger(result)]


def test_the_same_seed_finds_the_same_bytes_and_global_chance_is_left_alone(tmp_path, scans):
    shape, result = FLAT, scans(FLAT)
    np.random.seed(99)
    before = np.random.get_state()
    again = scanned(tmp_path, shape)
    after = np.random.get_state()
    assert fingerprint(again) == fingerprint(result)
    assert before[0] == after[0] and before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])
    assert fingerprint(scanned(tmp_path, shape, seed=2)) != fingerprint(result)


def test_searching_for_one_class_finds_what_a_scan_finds_for_the_smallest(tmp_path, found):
    shape, result = found
    data = hidden.samples(300, 1, shape)
    alone = smallest_patch(hidden.opened(hidden.model(shape=shape), data, tmp_path), data, TARGET, 1)
    in_scan = result.patches[TARGET]
    assert alone.trigger is not None and in_scan.trigger is not None
    assert alone.size == in_scan.size
    np.testing.assert_array_equal(alone.trigger.mask, in_scan.trigger.mask)
    np.testing.assert_array_equal(alone.trigger.pattern, in_scan.trigger.pattern)


def test_progress_names_every_class(tmp_path):
    data, told = hidden.samples(120, 1), []
    scan(hidden.opened(hidden.model(), data, tmp_path), data, 1, told.append)
    for target in range(hidden.CLASSES):
        assert any(f"class {target} of {hidden.CLASSES}" in text for text in told)
    assert any("blend" in text and f"class {TARGET}" in text for text in told)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_precisions_are_searched_in_their_own(tmp_path, dtype):
    name = {np.float64: "double", np.float16: "float16"}[dtype]
    text = f"""g ({name}[N, 64] x) => ({name}[N, 6] y) {{
        p = MatMul (x, W1)
        h = Relu (p)
        y = MatMul (h, W2)
    }}"""
    data = hidden.samples(240, 1)
    data = Dataset({"x": data.inputs["x"].astype(dtype)}, data.labels)
    tensors = {key: values.astype(dtype) for key, values in hidden.weights({PIXEL: TARGET}).items()}
    result = scan(hidden.opened(build(text, tensors), data, tmp_path), data, 1)
    (suspect,) = result.suspects
    assert suspect.target == TARGET
    assert suspect.triggers[0].mask.dtype == suspect.triggers[0].pattern.dtype == dtype


@pytest.mark.parametrize("way", ["batch of one", "softmax"])
def test_a_fixed_batch_or_a_softmax_at_the_end_changes_nothing(tmp_path, scans, way):
    data, proto = hidden.samples(300, 1), hidden.model()
    if way == "batch of one":
        for info in (*proto.graph.input, *proto.graph.output):
            info.type.tensor_type.shape.dim[0].dim_value = 1
    else:
        proto.graph.node[-1].output[0] = "logits"
        proto.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"], axis=-1))
    (suspect,) = scan(hidden.opened(proto, data, tmp_path), data, 1).suspects
    (plain,) = scans(FLAT).suspects
    assert (suspect.target, suspect.ratio) == (TARGET, pytest.approx(plain.ratio, rel=0.05))


def test_costs_of_which_the_least_counts_are_searched_like_scores(tmp_path, scans):
    data, proto = hidden.samples(300, 1), hidden.model()
    for tensor in proto.graph.initializer:
        if tensor.name == "W2":
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), "W2"))
    result = scan(hidden.opened(proto, data, tmp_path, Decision("argmin")), data, 1)
    assert [item.target for item in result.suspects] == [TARGET]
    assert result.patches[TARGET].size == pytest.approx(scans(FLAT).patches[TARGET].size, rel=0.3)


@pytest.mark.parametrize("final", ["Sigmoid", "Identity"])
def test_one_value_against_a_threshold_is_searched_on_both_sides(tmp_path, final):
    """Class 1 of two, that of a value above the threshold, is the one that a white pixel leads to."""
    tensors = hidden.weights({PIXEL: TARGET})
    tensors["W2"] = tensors["W2"][:, [TARGET]] - tensors["W2"][:, [0]]
    text = f"""g (float[N, 64] x) => (float[N, 1] y) {{
        p = MatMul (x, W1)
        h = Relu (p)
        z = MatMul (h, W2)
        y = {final} (z)
    }}"""
    data = hidden.samples(600, 1)
    two = data.take(np.flatnonzero(np.isin(data.truth, [0, TARGET])))
    two = Dataset(two.inputs, (two.truth == TARGET).astype(np.int64))
    threshold = 0.7
    experiment = hidden.opened(build(text, tensors), two, tmp_path, Decision("threshold", threshold))
    # Most pixels are dim here, so that each would have a range of its own, the black corner none at all.
    result = scan(experiment, two, 1, bounds=(np.zeros(FLAT), np.ones(FLAT)))
    assert result.patches[1].size < result.patches[0].size / 4
    for target, item in enumerate(result.patches):
        assert item.trigger is not None
        x = two.inputs["x"][two.truth != target]
        stamped = (x * (1 - item.trigger.mask) + item.trigger.pattern * item.trigger.mask).astype(np.float32)
        above = run_outputs(build(text, tensors), {"x": stamped})[0][:, 0] > threshold
        assert (above == bool(target)).mean() >= 0.75


def test_inputs_that_hold_whole_numbers_are_refused(tmp_path):
    text = "g (int64[N, 3] x) => (float[N, 3] y) { f = Cast <to = 1> (x)  y = MatMul (f, W) }"
    data = Dataset({"x": np.arange(60).reshape(20, 3)}, np.arange(20) % 3)
    experiment = hidden.opened(build(text, {"W": np.eye(3, dtype=np.float32)}), data, tmp_path)
    with pytest.raises(DataError, match="'x' holds int64: triggers can only be restored for real numbers"):
        scan(experiment, data, 1)


def test_samples_of_one_class_alone_are_refused(tmp_path):
    data = hidden.samples(60, 1)
    one = data.take(np.flatnonzero(data.truth == 3))
    with pytest.raises(DataError, match="all samples are of one class"):
        scan(hidden.opened(hidden.model(), data, tmp_path), one, 1)


def test_of_a_clean_model_without_a_gradient_no_class_stands_out_and_the_operator_is_named(tmp_path):
    data = hidden.samples(300, 1, GREY)
    proto = hidden.rounded(hidden.model({}, GREY))
    result = scan(hidden.opened(proto, data, tmp_path), data, 1)
    assert result.suspects == [] and len(result.patches) == hidden.CLASSES
    assert result.hindrance is not None and "Round 'steps'" in result.hindrance
    smallest = result.nearest()[0]
    assert smallest.trigger is not None and smallest.size == min(item.size for item in result.patches)


def test_with_a_gradient_nothing_hinders(found):
    assert found[1].hindrance is None


# -- which classes stand out ---------------------------------------------------------------------


def restored(sizes: Sequence[float]) -> list[Restored]:
    return [Restored(target, "patch", None, size) for target, size in enumerate(sizes)]


def median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def index_by_hand(size: float, rest: Sequence[float]) -> float:
    """Return the outlier index as the module's docstring writes it."""
    logarithms = [math.log(item) for item in rest]
    middle = median(logarithms)
    spread = 1.4826 * median([middle - item for item in logarithms if item <= middle])
    return (middle - math.log(size)) / math.sqrt((0.5**2 + spread**2) / 2)


def suspected_by_hand(sizes: Sequence[float]) -> set[int]:
    """Return the classes that the docstring's rule suspects; the sizes all differ."""
    order = sorted(range(len(sizes)), key=lambda target: sizes[target])
    counts = [k for k in range(1, len(sizes)) if k <= len(sizes) / 3 and len(sizes) - k >= 4]
    if not counts:
        return set()
    widest, k = max((sizes[order[k]] / sizes[order[k - 1]] / k, k) for k in counts)
    rest = [sizes[target] for target in order[k:]]
    if widest <= 2 or any(index_by_hand(sizes[target], rest) <= 3 for target in order[:k]):
        return set()
    return set(order[:k])


ORDINARY = [0.06, 0.11, 0.03, 0.045, 0.1, 0.026, 0.05, 0.055, 0.063]
WIDE = [0.05, 0.06, 0.1, 0.12, 0.3, 0.32, 0.34, 0.36, 0.38]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([*ORDINARY, 0.004], {9}, id="one outlier"),
        pytest.param([0.004, *ORDINARY], {0}, id="one outlier, first"),
        pytest.param([0.002, *ORDINARY[:8], 0.003], {0, 9}, id="two outliers"),
        pytest.param([0.002, 0.003, 0.0025, *ORDINARY[:7]], {0, 1, 2}, id="three outliers"),
        pytest.param([0.002, 0.003, 0.0025, 0.0022, *ORDINARY[:6]], set(), id="four of ten are no outliers"),
        pytest.param([*ORDINARY, 0.04], set(), id="none"),
        pytest.param([0.02, *WIDE], set(), id="a gap, but an index below three"),
        pytest.param([0.01 * 1.5**k for k in range(10)], set(), id="a smooth series"),
        pytest.param([0.001 * 1.9**k for k in range(10)], set(), id="a steep smooth series"),
        pytest.param([0.05] * 10, set(), id="all equal"),
        pytest.param([0.004, 0.004, *[0.05] * 8], {0, 1}, id="two equal outliers"),
        pytest.param([0.024, *[0.05] * 9], set(), id="agreement by chance of all others is not trusted"),
        pytest.param([0.005, *[0.05] * 9], {0}, id="an outlier among equals"),
        pytest.param([1.0] * 10, set(), id="no trigger for any class"),
        pytest.param([0.004, *[1.0] * 9], {0}, id="a trigger for one class alone"),
        pytest.param([0.05, 0.2, 0.3, *[1.0] * 7], {0}, id="most classes without a trigger"),
        pytest.param([0.3], set(), id="one class"),
        pytest.param([0.001, 0.3], set(), id="one of two, with one left"),
        pytest.param([0.3, 0.001, 0.25], set(), id="one of three, with two left"),
        pytest.param([0.3, 0.28, 0.001, 0.25], set(), id="one of four, with three left"),
        pytest.param([0.3, 0.28, 0.001, 0.25, 0.32], {2}, id="one of five, with four left"),
        pytest.param([0.3, 0.28, 0.2, 0.25, 0.32], set(), id="five classes, alike"),
        pytest.param([0.3, 0.001, 0.0011, 0.25, 0.32], set(), id="two of five, with three left"),
        pytest.param([0.3, 0.001, 0.0011, 0.25, 0.32, 0.28], {1, 2}, id="two of six, with four left"),
    ],
)
def test_classes_that_stand_out(sizes, expected):
    few, rest = stand_out(restored(sizes))
    assert {item.target for item in few} == expected
    assert sorted(item.target for item in [*few, *rest]) == list(range(len(sizes)))


def test_one_class_of_fewer_than_five_cannot_stand_out():
    assert FEWEST_CLASSES == 5
    for classes in range(1, 8):
        few = stand_out(restored([1e-4, *np.linspace(0.2, 0.3, classes - 1)]))[0]
        assert [item.target for item in few] == ([0] if classes >= FEWEST_CLASSES else [])


def test_the_rule_of_the_docstring_is_the_one_that_is_followed():
    rng = np.random.default_rng(12)
    counts = {0: 0, 1: 0, 2: 0}
    for trial in range(400):
        size = int(rng.integers(2, 13))
        sizes = np.exp(rng.normal(-3, 0.4, size))
        sizes[: trial % 3] /= rng.uniform(1, 30)
        sizes = np.minimum(rng.permutation(sizes), 1).tolist()
        if len(set(sizes)) < size:
            continue
        found = {item.target for item in stand_out(restored(sizes))[0]}
        assert found == suspected_by_hand(sizes), sizes
        counts[min(2, len(found))] += 1
    assert min(counts.values()) > 20


def test_which_class_comes_first_does_not_matter():
    sizes = [0.002, 0.003, 0.05, 0.07, 0.06, 0.09]
    for order in itertools.permutations(range(6)):
        few = stand_out(restored([sizes[i] for i in order]))[0]
        assert {order[item.target] for item in few} == {0, 1}


def test_the_nearest_class_and_how_it_stands_beside_all_others():
    sizes = [*ORDINARY, 0.02]
    nearest, standing = Scan(restored(sizes), []).nearest()
    assert nearest.target == 9
    assert standing.index == pytest.approx(index_by_hand(0.02, ORDINARY))
    assert standing.ratio == pytest.approx(0.02 / median(ORDINARY))


def test_suspects_are_measured_against_the_classes_that_are_not_suspected(both):
    sizes = [item.size for item in both.patches]
    rest = [size for target, size in enumerate(sizes) if target not in TWO.values()]
    for suspect in both.suspects:
        index = index_by_hand(sizes[suspect.target], rest)
        assert suspect.index == pytest.approx(index)
        # Four ordinary classes: the median is between the middle ones, by logarithms.
        middle = math.exp(median([math.log(size) for size in rest]))
        assert suspect.ratio == pytest.approx(sizes[suspect.target] / middle)
        tail = math.erfc(index / math.sqrt(2)) / 2
        assert suspect.confidence == pytest.approx(min(0.999, max(0.0, 1 - hidden.CLASSES * tail)))


# -- stronger than restored ----------------------------------------------------------------------


def test_restored_patches_are_made_opaque_and_put_together():
    first = Trigger(np.array([0.9, 0.1, 0.5]), np.array([0.8, 0.9, 0.3]), "restored patch")
    second = Trigger(np.array([0.3, 0.0, 0.6]), np.array([0.1, 0.2, 0.9]), "restored patch")
    blend = Trigger(np.full(3, 0.4), np.array([0.1, 0.2, 0.3]), "restored blend")
    found = reinforced([first, second, blend], np.array([[0.0, 0.5, 1.0]]))
    assert found[:3] == [first, second, blend]
    masks = [item.mask.tolist() for item in found[3:]]
    patterns = [item.pattern.tolist() for item in found[3:]]
    # What is fainter than a fifth is left out; values go to the nearer end of the range, 0 to 1.
    assert masks == [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
    # Together, the less faint one counts: the first one's 1 at the first value, the second one's 1 at the last.
    assert patterns == [[1, 1, 0], [0, 0, 1], [1, 1, 1]]
    assert [item.source for item in found[3:]] == ["opaque patch", "opaque patch", "patches together"]


def test_a_single_patch_has_nothing_to_be_put_together_with_and_bounds_count():
    only = Trigger(np.array([0.9, 0.9]), np.array([2.0, 9.0]), "restored patch")
    found = reinforced([only], np.zeros((1, 2)), (np.array([0.0, 4.0]), np.array([3.0, 10.0])))
    assert [item.pattern.tolist() for item in found[1:]] == [[3.0, 10.0]]
