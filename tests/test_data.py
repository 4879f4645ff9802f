from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from onnxcare.data import Dataset, check_fits, check_labels, joined, load_arrays, load_dataset, split, without_overlap
from onnxcare.errors import DataError
from onnxcare.graph.model import Signature

FLAT = Signature("input", np.dtype(np.float32), ("batch", 8))
IMAGE = Signature("image", np.dtype(np.uint8), (1, 3, "height", None))


def dataset(size: int, classes: int = 4, seed: int = 0) -> Dataset:
    """Rows that can be told apart by their first value, and labels of uneven frequency."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    x[:, 0] = np.arange(size)
    labels = np.minimum(rng.geometric(0.4, size) - 1, classes - 1)
    return Dataset({"input": x, "more": x[:, ::-1].copy()}, labels)


def rows(part: Dataset) -> list[int]:
    return part.inputs["input"][:, 0].astype(int).tolist()


def save(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


# -- reading -------------------------------------------------------------------------------------


def test_load_dataset(tmp_path: Path) -> None:
    x, y = np.ones((5, 8), np.float32), np.array([3, 2, 1, 0, 3], np.uint8)
    found = load_dataset(save(tmp_path, input=x, y=y, more=np.zeros(3)), [FLAT])
    assert len(found) == 5
    assert list(found.inputs) == ["input"]
    assert (found.inputs["input"] == x).all()
    assert found.truth.dtype == np.int64 and found.truth.tolist() == [3, 2, 1, 0, 3]


def test_x_stands_for_the_only_input(tmp_path: Path) -> None:
    path = save(tmp_path, x=np.ones((5, 8), np.float32), truth=np.zeros(5, int))
    assert list(load_dataset(path, [FLAT], "truth").inputs) == ["input"]
    with pytest.raises(DataError, match="no array named 'input' for the model's input; it holds truth, x"):
        load_dataset(path, [FLAT, Signature("other", FLAT.dtype, FLAT.shape)])


def test_the_name_of_the_input_comes_before_x(tmp_path: Path) -> None:
    path = save(tmp_path, x=np.zeros(1), input=np.ones((5, 8), np.float32))
    assert (load_dataset(path, [FLAT]).inputs["input"] == 1).all()


def test_labels_are_optional(tmp_path: Path) -> None:
    found = load_dataset(save(tmp_path, x=np.ones((5, 8), np.float32)), [FLAT])
    assert found.labels is None
    assert found.take(slice(2)).labels is None
    with pytest.raises(ValueError, match="no labels"):
        _ = found.truth
    with pytest.raises(DataError, match=r"file\.npz: holds no labels"):
        check_labels(found, 4, "file.npz")


def test_several_inputs_need_as_many_samples(tmp_path: Path) -> None:
    other = Signature("other", FLAT.dtype, FLAT.shape)
    path = save(tmp_path, input=np.ones((5, 8), np.float32), other=np.ones((4, 8), np.float32))
    with pytest.raises(DataError, match=r"different numbers of samples: input 5, other 4; every input"):
        load_dataset(path, [FLAT, other])


def test_samples_on_another_axis_and_values_for_all_of_them(tmp_path: Path) -> None:
    state = Signature("state", FLAT.dtype, ("batch", 2, 3), axis=1)
    rate = Signature("rate", np.dtype(np.int64), (None,), axis=None)
    values = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    path = save(tmp_path, input=np.ones((5, 8), np.float32), state=values, rate=np.int64(7), y=np.arange(5))
    found = load_dataset(path, [rate, FLAT, state])
    assert len(found) == 5
    np.testing.assert_array_equal(found.inputs["rate"], [7] * 5)
    for row in range(5):
        np.testing.assert_array_equal(found.inputs["state"][row], values[:, row])
    path = save(tmp_path, state=values[0, 0], rate=np.int64(7))
    with pytest.raises(DataError, match=r"state has shape \[3\]; the spec's sample_axes has the samples on axis 1"):
        load_dataset(path, [state, rate])
    path = save(tmp_path, state=values, rate=np.array([7, 7]))
    with pytest.raises(DataError, match=r"rate has shape .*takes"):
        load_dataset(path, [state, rate])


def test_no_arrays_of_python_objects(tmp_path: Path) -> None:
    path = save(tmp_path, x=np.array([{}, []], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        load_arrays(path)


def test_other_members_of_a_zip_file(tmp_path: Path) -> None:
    import zipfile

    path = save(tmp_path, x=np.ones(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(DataError, match=r"notes\.txt is no array"):
        load_arrays(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = save(tmp_path, x=np.ones(3))
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(DataError, match=r"data\.npz: cannot be read: Permission denied"):
        load_arrays(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_explained(tmp_path: Path, compressed: bool) -> None:
    """A byte changed or the end cut off: the same arrays, or an error that names the file."""
    path, rng = tmp_path / "data.npz", np.random.default_rng(1)
    arrays = {"x": rng.normal(size=(40, 8)), "y": np.arange(40)}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    whole = path.read_bytes()
    refused = 0
    for trial in range(400):
        damaged = bytearray(whole)
        if trial % 4:
            damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        else:
            del damaged[rng.integers(len(whole)) :]
        path.write_bytes(damaged)
        try:
            load_arrays(path)
        except DataError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 200


# -- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (1, 3, 1, 1)])
def test_fits(shape: tuple[int, ...]) -> None:
    check_fits(np.zeros(shape, np.uint8), IMAGE, "x")
    check_fits(np.zeros(shape[1:], np.uint8), IMAGE, "mask", batched=False)


@pytest.mark.parametrize("shape", [(7, 1, 5, 9), (7, 3, 5), (7, 3, 5, 9, 1), (), (0,)])
def test_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"^x has shape .* but the model's input 'image' takes \['samples', 3, "):
        check_fits(np.zeros(shape, np.uint8), IMAGE, "x")


def test_does_not_fit_without_the_batch_axis() -> None:
    with pytest.raises(DataError, match=r"mask has shape \[1, 3, 5, 9\].* takes \[3, 'height', None\]"):
        check_fits(np.zeros((1, 3, 5, 9), np.uint8), IMAGE, "mask", batched=False)


def test_anything_fits_an_input_of_unknown_rank_that_has_samples() -> None:
    unranked = Signature("input", FLAT.dtype, (), ranked=False)
    check_fits(np.zeros((5, 8), np.float32), unranked, "x")
    check_fits(np.zeros(8, np.float32), unranked, "mask", batched=False)
    with pytest.raises(DataError, match=r"x has shape \[\]"):
        check_fits(np.zeros((), np.float32), unranked, "x")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, ">f4", "U3"])
def test_other_types(dtype: object) -> None:
    with pytest.raises(DataError, match=f"x is {np.dtype(dtype)}, but the model's input 'input' takes float32"):
        check_fits(np.zeros((5, 8), dtype), FLAT, "x")


def test_types_that_numpy_lacks_are_left_to_the_runtime() -> None:
    check_fits(np.zeros((5, 8)), Signature("input", None, FLAT.shape), "x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    x = np.zeros((5, 8), np.float32)
    x[2, 3] = value
    with pytest.raises(DataError, match="x holds 1 NaN or infinite values; remove those samples"):
        check_fits(x, FLAT, "x")
    with pytest.raises(DataError, match=r"mask holds 1 NaN or infinite values$"):
        check_fits(x[2], FLAT, "mask", batched=False)


@pytest.mark.parametrize("labels", [[0, 3], [0, 0], [3, 3]])
def test_labels_in_range(labels: list[int]) -> None:
    assert check_labels(Dataset({"x": np.zeros(2)}, np.array(labels)), 4, "d").tolist() == labels


@pytest.mark.parametrize(("labels", "words"), [([0, 4], "from 0 to 4"), ([-1, 2], "from -1 to 2")])
def test_labels_out_of_range(labels: list[int], words: str) -> None:
    with pytest.raises(DataError, match=rf"d: labels run {words}, but the model has classes 0 to 3"):
        check_labels(Dataset({"x": np.zeros(2)}, np.array(labels)), 4, "d")


# -- splitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.3), (0.35, 0.14, 0.21, 0.3), (1.0,)])
@pytest.mark.parametrize("size", [1, 2, 7, 40, 501])
@pytest.mark.parametrize("labelled", [True, False])
def test_every_sample_lands_in_exactly_one_part(size: int, shares: tuple[float, ...], labelled: bool) -> None:
    whole = dataset(size)
    if not labelled:
        whole = Dataset(whole.inputs, None)
    parts = split(whole, shares, seed=3)
    assert len(parts) == len(shares)
    assert sorted(row for part in parts for row in rows(part)) == list(range(size))
    for part in parts:
        # Inputs and labels stay together.
        at = np.array(rows(part), int)
        assert (part.inputs["more"] == whole.inputs["more"][at]).all()
        assert (part.labels is None) == (whole.labels is None)
        if part.labels is not None:
            assert (part.labels == whole.truth[at]).all()


def test_every_class_is_split_by_the_shares() -> None:
    whole = dataset(1000)
    shares = (0.5, 0.2, 0.3)
    for part, share in zip(split(whole, shares, seed=3), shares, strict=True):
        for label in range(4):
            expected = share * (whole.truth == label).sum()
            assert abs((part.truth == label).sum() - expected) <= 1
    without = split(Dataset(whole.inputs, None), shares, seed=3)
    assert [len(part) for part in without] == [500, 200, 300]


def test_a_split_is_fixed_by_its_seed_alone() -> None:
    whole = dataset(200)
    first = [rows(part) for part in split(whole, (0.5, 0.5), seed=3)]
    np.random.seed(99)
    assert [rows(part) for part in split(whole, (0.5, 0.5), seed=3)] == first
    assert [rows(part) for part in split(whole, (0.5, 0.5), seed=4)] != first


def test_a_split_is_no_cut() -> None:
    """Files are often sorted; the first half must not become the first part."""
    part, _ = split(Dataset(dataset(400).inputs, None), (0.5, 0.5), seed=1)
    assert 60 < sum(row < 200 for row in rows(part)) < 140


def test_take() -> None:
    whole = dataset(10)
    part = whole.take(np.array([7, 2]))
    assert rows(part) == [7, 2] and part.truth.tolist() == whole.truth[[7, 2]].tolist()
    assert rows(whole.take(slice(3))) == [0, 1, 2]
    assert len(whole.take(np.zeros(10, bool))) == 0


def test_joined() -> None:
    whole = dataset(10)
    first, second = whole.take(slice(0, 3)), whole.take(slice(3, 10))
    both = joined(first, second)
    assert rows(both) == list(range(10))
    assert both.truth.tolist() == whole.truth.tolist()
    assert (both.inputs["more"] == whole.inputs["more"]).all()
    assert joined(first, Dataset(second.inputs, None)).labels is None
    assert rows(joined(second, first.take(slice(0, 0)))) == list(range(3, 10))


# -- overlap -------------------------------------------------------------------------------------


def test_without_overlap() -> None:
    whole = dataset(30)
    data, holdout = whole.take(slice(0, 20)), whole.take(slice(15, 30))
    fresh, count = without_overlap(holdout, data)
    assert count == 5
    assert rows(fresh) == list(range(20, 30))
    assert fresh.truth.tolist() == whole.truth[20:].tolist()


def test_nothing_overlaps() -> None:
    whole = dataset(30)
    holdout = whole.take(slice(20, 30))
    assert without_overlap(holdout, whole.take(slice(0, 20))) == (holdout, 0)


def test_everything_overlaps() -> None:
    fresh, count = without_overlap(dataset(30), dataset(30))
    assert (len(fresh), count) == (0, 30)


def test_samples_differ_if_any_input_does() -> None:
    whole = dataset(10)
    changed = {name: values.copy() for name, values in whole.inputs.items()}
    changed["more"][4, 0] += 1e-6 * abs(changed["more"][4, 0])
    fresh, count = without_overlap(Dataset(changed, whole.labels), whole)
    assert (rows(fresh), count) == ([4], 9)


def test_other_labels_do_not_make_other_samples() -> None:
    whole = dataset(10)
    assert without_overlap(Dataset(whole.inputs, 3 - whole.truth), whole)[1] == 10
