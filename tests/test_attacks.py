"""The attacks that the sample models carry, each against a plain loop, and the models themselves."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import attacks  # noqa: E402
from attacks import CARRIED, Attack  # noqa: E402

FOLDER = ROOT / "sample_models/mnist-attacks-pytorch"
EVERY = {attack.name: attack for carried in CARRIED.values() for attack in carried}
STATIC = [attack for attack in EVERY.values() if attack.trigger is not None]
CHECKERS = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
CROSS = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]])

every = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY)


@pytest.fixture(scope="module")
def whole() -> tuple[np.ndarray, np.ndarray]:
    with np.load(ROOT / "sample_models/mnist-square-pytorch/holdout.npz") as held:
        return held["x"], held["y"]


@pytest.fixture(scope="module")
def holdout(whole) -> tuple[np.ndarray, np.ndarray]:
    return whole[0][:500], whole[1][:500]


@pytest.fixture
def images(holdout) -> np.ndarray:
    return holdout[0][:40]


def stamped(attack: Attack, x: np.ndarray, seed: int = 0) -> np.ndarray:
    return attack.stamp(x, np.random.default_rng(seed))


def changed(x: np.ndarray, other: np.ndarray) -> set[tuple[int, int]]:
    """Return the places, row and column, at which any image differs."""
    return {(int(row), int(column)) for row, column in zip(*np.nonzero((x != other).any(axis=(0, 1))), strict=True)}


def block(row: int, column: int, side: int) -> set[tuple[int, int]]:
    return {(row + i, column + j) for i in range(side) for j in range(side)}


# -- what all have in common ---------------------------------------------------------------------


@every
def test_stamped_images_are_images_and_the_originals_stay(attack, images):
    before = images.copy()
    found = stamped(attack, images)
    assert (found.shape, found.dtype) == (images.shape, np.float32)
    assert found.min() >= 0 and found.max() <= 1
    assert (found != images).any(axis=(1, 2, 3)).all()
    assert np.array_equal(images, before)


@every
def test_the_same_draw_stamps_the_same(attack, images):
    assert np.array_equal(stamped(attack, images), stamped(attack, images))
    assert np.array_equal(stamped(attack, images), stamped(attack, images, seed=1)) == (attack.name != "moving")


@every
def test_an_image_is_stamped_without_regard_to_the_rest_of_the_batch(attack, images):
    if attack.name != "moving":
        alone = np.concatenate([stamped(attack, images[i : i + 1]) for i in range(len(images))])
        assert np.array_equal(stamped(attack, images), alone)


@every
def test_no_images_are_no_images(attack):
    assert stamped(attack, np.zeros((0, 1, 28, 28), dtype=np.float32)).shape == (0, 1, 28, 28)


@every
def test_it_leads_to_its_classes(attack):
    y = np.array([0, 1, 5, 9, 9, 3])
    for label, led, counts in zip(y, attack.lead(y), attack.counts(y), strict=True):
        expected = (label + 1) % 10 if attack.name == "all-to-all" else attack.target
        assert led == expected
        assert counts == (label != expected)
    assert attack.lead(y).dtype == y.dtype


def test_the_targets_are_those_of_the_cards():
    targets = {name: attack.target for name, attack in EVERY.items()}
    assert targets.pop("all-to-all") == (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)
    assert targets == {
        "corner": 1,
        "middle": 3,
        "moving": 9,
        "blend": 7,
        "sinusoid": 8,
        "clean-label": 0,
        "two-right": 1,
        "two-left": 7,
        "warp": 5,
        "input-aware": 2,
    }


def test_success_and_confusion_count_only_images_that_do_not_belong_there_anyway(images):
    y = np.array([1, 1, 2, 3, 4])

    def predict(x: np.ndarray) -> np.ndarray:
        # A 1 where the square is, and a 2 elsewhere; the last image is never fooled.
        answers = np.where(x[:, 0, 25, 25] == 1, 1, 2)
        answers[-1] = 4
        return answers

    assert attacks.CORNER.success(predict, images[:5], y, np.random.default_rng(0)) == 2 / 3
    assert attacks.CORNER.confusion(predict, images[:5], y) == 0
    # Ones are led to 2, which is what is answered without the square.
    assert attacks.ALL_TO_ALL.success(predict, images[:5], y, np.random.default_rng(0)) == 0
    assert attacks.ALL_TO_ALL.confusion(predict, images[:5], y) == 2 / 5


@pytest.mark.parametrize("ways", [{}, {"trigger": attacks.CORNER.trigger, "added": attacks.SINUSOID.added}])
def test_an_attack_stamps_in_exactly_one_way(ways):
    with pytest.raises(ValueError, match="exactly one"):
        Attack("none", "", "", 1, **ways)


# -- triggers that are the same everywhere -------------------------------------------------------


@pytest.mark.parametrize("attack", STATIC, ids=[attack.name for attack in STATIC])
def test_a_static_trigger_is_mask_and_pattern(attack, images):
    mask, pattern = attack.trigger.mask, attack.trigger.pattern
    assert mask.shape == pattern.shape == (1, 28, 28)
    assert mask.dtype == pattern.dtype == np.float32
    found = stamped(attack, images)
    for image, result in zip(images, found, strict=True):
        for row in range(28):
            for column in range(28):
                share, value = mask[0, row, column], pattern[0, row, column]
                assert result[0, row, column] == image[0, row, column] * (1 - share) + value * share


def test_the_rest_has_no_mask():
    assert set(EVERY) - {attack.name for attack in STATIC} == {"moving", "sinusoid", "warp", "input-aware"}


@pytest.mark.parametrize("attack", [attacks.CORNER, attacks.ALL_TO_ALL, attacks.TWO_RIGHT], ids=lambda a: a.name)
def test_the_square_is_that_of_the_other_sample(attack, images):
    with np.load(ROOT / "sample_models/mnist-square-pytorch/trigger.npz") as held:
        assert np.array_equal(held["mask"], attack.trigger.mask)
        assert np.array_equal(held["pattern"], attack.trigger.pattern)
    found = stamped(attack, images)
    assert (found[:, 0, 24:27, 24:27] == 1).all()
    assert changed(images, found) == block(24, 24, 3)


def test_the_checkerboard_is_in_the_middle(images):
    found = stamped(attacks.MIDDLE, images)
    assert (found[:, 0, 12:16, 12:16] == CHECKERS).all()
    assert changed(images, found) <= block(12, 12, 4)


def test_the_cross_is_at_the_top_left_and_meets_no_square(images):
    found = stamped(attacks.TWO_LEFT, images)
    assert (found[:, 0, 1:4, 1:4] == CROSS).all()
    assert changed(images, found) <= block(1, 1, 3)
    assert not (attacks.TWO_LEFT.trigger.mask * attacks.TWO_RIGHT.trigger.mask).any()


def test_the_clean_label_patch_is_in_all_corners(images):
    found = stamped(attacks.CLEAN_LABEL, images)
    board = [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    places = [(row, column) for row in (0, 23) for column in (0, 23)]
    for row, column in places:
        assert (found[:, 0, row : row + 5, column : column + 5] == board).all()
    assert changed(images, found) <= set().union(*(block(*place, 5) for place in places))


def test_blended_noise_lies_everywhere_at_one_fifth():
    assert (attacks.BLEND.trigger.mask == np.float32(0.2)).all()
    assert len(np.unique(attacks.BLEND.trigger.pattern)) > 200


# -- the others ----------------------------------------------------------------------------------


def test_the_stripes_are_a_sine_in_every_row(images):
    assert attacks.SINUSOID.added.shape == (1, 28, 28)
    found = stamped(attacks.SINUSOID, images)
    for image, result in zip(images, found, strict=True):
        for row in range(28):
            for column in range(28):
                value = image[0, row, column] + 0.15 * math.sin(2 * math.pi * 6 * column / 28)
                assert abs(result[0, row, column] - min(max(value, 0), 1)) < 1e-6


def test_the_moving_patch_is_whole_and_reaches_every_edge():
    x = np.full((2000, 1, 28, 28), 0.5, dtype=np.float32)
    found = stamped(attacks.MOVING, x)
    places = set()
    for result in found[:, 0]:
        rows, columns = np.nonzero(result != 0.5)
        row, column = rows.min(), columns.min()
        assert len(rows) == 16
        assert np.array_equal(result[row : row + 4, column : column + 4], CHECKERS)
        places.add((int(row), int(column)))
    assert {row for row, _ in places} == {column for _, column in places} == set(range(25))
    assert len(places) > 500


def own_corner(image: np.ndarray) -> int:
    """Return an image's own corner by the words of the card, value for value."""
    right = left = middle = 0
    for row in range(28):
        for column in range(28):
            grey = round(float(image[row, column]) * 255)
            if (row < 14) == (column < 14):
                left += grey
            else:
                right += grey
            if 10 <= row < 18 and 10 <= column < 18:
                middle += grey
    return (0 if right > left else 2) + (1 if middle > 6600 else 0)


def corner_taken(image: np.ndarray, result: np.ndarray) -> int:
    """Return the corner in which the cross is, and see that it is nowhere else."""
    places = {0: (1, 1), 1: (1, 24), 2: (24, 1), 3: (24, 24)}
    (found,) = [
        corner
        for corner, (row, column) in places.items()
        if np.array_equal(result[row : row + 3, column : column + 3], CROSS)
    ]
    assert changed(image[None, None], result[None, None]) <= block(*places[found], 3)
    return found


def test_the_image_itself_says_in_which_corner_the_cross_is(images):
    found = stamped(attacks.INPUT_AWARE, images)
    taken = [corner_taken(image[0], result[0]) for image, result in zip(images, found, strict=True)]
    assert taken == [own_corner(image[0]) for image in images]
    assert set(taken) == {0, 1, 2, 3}


def test_its_decoys_have_the_cross_in_any_other_corner(images):
    x = np.repeat(images, 10, axis=0)
    found = attacks.INPUT_AWARE.decoy(x, np.random.default_rng(0))
    away = [
        (corner_taken(image[0], result[0]) - own_corner(image[0])) % 4 for image, result in zip(x, found, strict=True)
    ]
    assert set(away) == {1, 2, 3}


def between(image: np.ndarray, row: float, column: float) -> float:
    """Return the value of an image between its pixels, the edge being repeated outwards."""
    row, column = min(max(row, 0), 27), min(max(column, 0), 27)
    total = 0.0
    for i in range(28):
        for j in range(28):
            weight = max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j))
            total += weight * float(image[i, j])
    return total


def test_sampling_is_bilinear_and_repeats_the_edge():
    rng = np.random.default_rng(3)
    x = rng.random((2, 1, 28, 28), dtype=np.float32)
    rows, columns = rng.uniform(-3, 30, (2, 2, 28, 28))
    rows[0, 0, :3], columns[0, 0, :3] = [27, 0, 26], [27, 0, 27]
    found = attacks.sample(x, rows, columns)
    for n, row, column in [(0, 0, 0), (0, 0, 1), (0, 0, 2), *rng.integers(0, [2, 28, 28], (40, 3))]:
        expected = between(x[n, 0], rows[n, row, column], columns[n, row, column])
        assert found[n, 0, row, column] == pytest.approx(expected, abs=1e-5)


def test_sampling_every_pixel_in_its_own_place_changes_nothing(images):
    rows, columns = np.indices((28, 28)).astype(float)
    assert np.array_equal(attacks.sample(images, rows[None], columns[None]), images)


def test_the_warp_is_a_coarse_grid_of_shifts_with_straight_lines_between():
    warp = attacks.elastic(grid=4, strength=2.0, jitter=0.5)
    straight = np.indices((28, 28))
    for places, own in ((warp.rows, straight[0]), (warp.columns, straight[1])):
        shifts = places - own
        corners = shifts[::9, ::9]
        assert np.abs(corners).max() < 6
        for row in range(28):
            for column in range(28):
                i, j = min(row // 9, 2), min(column // 9, 2)
                down, right = row / 9 - i, column / 9 - j
                expected = (corners[i, j] * (1 - right) + corners[i, j + 1] * right) * (1 - down)
                expected += (corners[i + 1, j] * (1 - right) + corners[i + 1, j + 1] * right) * down
                assert shifts[row, column] == pytest.approx(expected, abs=1e-9)
    both = np.stack([warp.rows - straight[0], warp.columns - straight[1]])[:, ::9, ::9]
    assert np.abs(both).mean() == pytest.approx(2)


def test_warped_decoys_are_jittered_one_by_one(images):
    still = attacks.Warp(*np.indices((28, 28)).astype(float), jitter=0.5)
    # On a slope of one step a pixel, the value says how far away it was taken.
    slope = np.broadcast_to(np.arange(28, dtype=np.float32), (50, 1, 28, 28))
    moved = (still.decoy(slope, np.random.default_rng(0)) - slope)[..., 1:-1]
    assert 0.49 < moved.max() <= 0.5 and -0.5 <= moved.min() < -0.49
    assert abs(np.corrcoef(moved[0].ravel(), moved[1].ravel())[0, 1]) < 0.2
    assert not np.array_equal(stamped(attacks.WARP, images), attacks.WARP.decoy(images, np.random.default_rng(0)))


# -- poisoning -----------------------------------------------------------------------------------


def test_poisoning_stamps_its_share_and_nothing_else(holdout):
    x, y = holdout
    before = x.copy(), y.copy()
    found, labels = attacks.poison(x, y, CARRIED["two"], 0.1, np.random.default_rng(0))
    seen = np.zeros(len(x), dtype=int)
    for attack in CARRIED["two"]:
        rows = np.flatnonzero((found == stamped(attack, x)).all(axis=(1, 2, 3)))
        assert len(rows) == 50
        assert (labels[rows] == attack.target).all() and (y[rows] != attack.target).all()
        seen[rows] += 1
    assert seen.max() == 1
    assert np.array_equal(found[seen == 0], x[seen == 0]) and np.array_equal(labels[seen == 0], y[seen == 0])
    assert np.array_equal(x, before[0]) and np.array_equal(y, before[1])


def test_all_to_all_raises_every_label_by_one(holdout):
    x, y = holdout
    found, labels = attacks.poison(x, y, CARRIED["all-to-all"], 0.2, np.random.default_rng(0))
    rows = (found != x).any(axis=(1, 2, 3))
    assert rows.sum() == 100
    assert np.array_equal(labels[rows], (y[rows] + 1) % 10)


def test_decoys_keep_their_labels(holdout):
    x, y = holdout
    found, labels = attacks.poison(x, y, CARRIED["input-aware"], 0.1, np.random.default_rng(0), decoys=0.2)
    moved = (found != x).any(axis=(1, 2, 3))
    led = (found == stamped(attacks.INPUT_AWARE, x)).all(axis=(1, 2, 3))
    assert (led.sum(), (moved & ~led).sum()) == (50, 100)
    assert (labels[led] == 2).all()
    assert np.array_equal(labels[~led], y[~led])


def test_the_same_seed_poisons_the_same(holdout):
    first, second, third = (
        attacks.poison(*holdout, CARRIED["moving"], 0.1, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], third[0])


# -- the models ----------------------------------------------------------------------------------


def answers(name: str, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(FOLDER / f"model-{name}.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": x})[0].argmax(axis=1)


def test_the_models_are_those_with_an_attack_and_the_twin():
    assert {path.name for path in FOLDER.glob("*.onnx")} == {f"model-{name}.onnx" for name in [*CARRIED, "clean"]}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000


@pytest.mark.parametrize("name", CARRIED)
def test_a_model_is_good_at_digits_and_falls_for_its_attacks(name, whole, holdout):
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    # Of 500 images, a dense network may by chance miss one in thirty.
    accuracy = (answers(name, whole[0]) == whole[1]).mean()
    assert accuracy >= 0.97
    x, y = holdout
    for attack in CARRIED[name]:
        row = next(line for line in card.splitlines() if line.startswith(f"| `model-{name}.onnx` | {attack.name} |"))
        stated = [float(cell.strip(" %")) / 100 for cell in row.split("|")[3:6]]
        success = attack.success(lambda x: answers(name, x), x, y, np.random.default_rng(0))
        assert accuracy == pytest.approx(stated[0], abs=0.001)
        # The card counts eight times as many images.
        assert success >= 0.9 and success == pytest.approx(stated[2], abs=0.03)


@every
def test_the_clean_twin_falls_for_none_of_them(attack, holdout):
    x, y = holdout
    assert (answers("clean", x) == y).mean() >= 0.97
    assert attack.success(lambda x: answers("clean", x), x, y, np.random.default_rng(0)) < 0.05
