"""Data sets: reading them, checking that they fit the model, and splitting them.

A data file is an npz with one array per model input, named like it (or `x` if there is one input), and labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from onnxcare.errors import DataError, nearest

if TYPE_CHECKING:
    from onnxcare.graph.model import Signature

Array = np.ndarray
Inputs = Mapping[str, Array]
PartName = Literal["repair", "search", "validation", "holdout"]
PARTS: tuple[PartName, ...] = get_args(PartName)


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels of some samples, samples on axis 0.

    Attributes:
        inputs: one array per model input.
        labels: [samples] int64 class indices, or None.
    """

    inputs: Inputs
    labels: Array | None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.inputs.values())))

    @property
    def truth(self) -> Array:
        """The labels, where they have been checked to be there."""
        if self.labels is None:
            raise ValueError("these samples have no labels")
        return self.labels

    def take(self, rows: Array | slice) -> Dataset:
        """Return some of the samples."""
        labels = None if self.labels is None else self.labels[rows]
        return Dataset({name: values[rows] for name, values in self.inputs.items()}, labels)


def load_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of an npz file.

    Raises:
        DataError: it is missing, no npz file, or holds Python objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{path}: a single array; save named arrays with numpy.savez")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name an npz file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zip, zlib and numpy raise a dozen unrelated types for damaged files
        if "pickle" in str(error).lower():
            raise DataError(
                f"{path}: holds Python objects or is no npz file; save plain arrays with numpy.savez"
            ) from None
        raise DataError(f"{path}: not an npz file, or a truncated one") from None
    for name, values in arrays.items():
        if not isinstance(values, np.ndarray):  # numpy hands out other members of a zip file as bytes
            raise DataError(f"{path}: {name} is no array; save plain arrays with numpy.savez")
    return arrays


def load_dataset(path: Path, signatures: Sequence[Signature], labels: str | None = "y") -> Dataset:
    """Read a data file and check it against the model's inputs.

    Args:
        path: the npz file.
        signatures: the model's inputs.
        labels: the key of the labels; a file without it has none, and None leaves them out.

    Raises:
        DataError: a name, shape, dtype or value does not fit; the message names file and key.
    """
    arrays = load_arrays(path)
    inputs = {}
    for signature in signatures:
        key = _key_for(path, arrays, signature.name, alone=len(signatures) == 1)
        values = _samples_first(arrays[key], signature, f"{path}: {key}")
        check_fits(values, signature, f"{path}: {key}")
        inputs[signature.name] = values
    size = max((len(inputs[item.name]) for item in signatures if item.axis is not None), default=1)
    for item in signatures:
        if item.axis is None:
            inputs[item.name] = np.repeat(inputs[item.name], size, axis=0)
    lengths = {name: len(values) for name, values in inputs.items()}
    size = next(iter(lengths.values()))
    if any(length != size for length in lengths.values()):
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(
            f"{path}: its inputs have different numbers of samples: {told}; every input needs its samples on axis 0"
        )
    if size == 0:
        raise DataError(f"{path}: holds no samples")
    return Dataset(inputs, None if labels is None else _labels(path, arrays.get(labels), labels, size))


def _samples_first(values: Array, signature: Signature, what: str) -> Array:
    """Return an input's values with samples on axis 0: one where the input holds no samples."""
    axis = signature.axis
    if axis is None:
        return values[None]
    if axis >= values.ndim:
        raise DataError(f"{what} has shape {list(values.shape)}; the spec's sample_axes has the samples on axis {axis}")
    return np.moveaxis(values, axis, 0)


def _key_for(path: Path, arrays: Mapping[str, Array], name: str, alone: bool) -> str:
    if name in arrays:
        return name
    if alone and "x" in arrays:
        return "x"
    wanted = f"{name!r} (or 'x')" if alone else repr(name)
    raise DataError(
        f"{path}: no array named {wanted} for the model's input{nearest(name, arrays)}; "
        f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
    )


# So many lengths of a shape are told.
_AXES = 8


def _shown(shape: tuple[int | str | None, ...]) -> str:
    """Return a shape as text; damaged files may have one of hundreds of axes."""
    if len(shape) <= _AXES:
        return str(list(shape))
    return f"{str(list(shape[:_AXES]))[:-1]}, ...] of {len(shape)} axes"


def check_fits(values: Array, signature: Signature, what: str, *, batched: bool = True) -> None:
    """Check dtype, shape and finiteness of an array against a model input.

    Raises:
        DataError: it does not fit.
    """
    if signature.dtype is not None and values.dtype != signature.dtype:
        raise DataError(
            f"{what} is {values.dtype}, but the model's input {signature.name!r} takes {signature.dtype}; "
            "convert it the way the model was trained (range and scale included)"
        )
    expected = signature.shape if batched else signature.shape[1:]
    start = 1 if batched else 0
    fits = values.ndim == len(expected) and all(
        not isinstance(want, int) or have == want
        for have, want in list(zip(values.shape, expected, strict=False))[start:]
    )
    if not signature.ranked:
        fits = values.ndim >= start
    if not fits:
        raise DataError(
            f"{what} has shape {_shown(values.shape)}, but the model's input {signature.name!r} "
            f"takes {_shown(('samples', *expected[1:]) if batched else expected)}"
        )
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        bad = int(np.size(values) - np.isfinite(values).sum())
        advice = "; remove those samples" if batched else ""
        raise DataError(f"{what} holds {bad} NaN or infinite values{advice}")


def _labels(path: Path, labels: Array | None, key: str, size: int) -> Array | None:
    if labels is None:
        return None
    if labels.shape != (size,):
        raise DataError(f"{path}: {key} has shape {list(labels.shape)}, expected one label a sample [{size}]")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: {key} is {labels.dtype}; labels are class indices (integers)")
    return labels.astype(np.int64)


def check_labels(dataset: Dataset, classes: int, what: str) -> Array:
    """Return the labels after checking that each is a class of the model.

    Raises:
        DataError: labels are missing or out of range.
    """
    if dataset.labels is None:
        raise DataError(f"{what}: holds no labels; the spec's labels: names the array that holds them (y unless given)")
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{what}: labels run from {low} to {high}, but the model has classes 0 to {classes - 1}")
    return dataset.labels


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data, fixed by the seed.

    Attributes:
        repair: what localisation and closed forms are fitted on.
        search: what a search over fitted directions is driven by.
        validation: what chooses between candidates.
        holdout: what the judge uses, once.
    """

    repair: Dataset
    search: Dataset
    validation: Dataset
    holdout: Dataset

    def part(self, name: PartName) -> Dataset:
        """Return a part by its name."""
        found: Dataset = getattr(self, name)
        return found


def split(dataset: Dataset, shares: Sequence[float], seed: int) -> list[Dataset]:
    """Split into parts of the given shares, each class by itself where there are labels.

    The shares add up to one. Every sample lands in exactly one part.
    """
    rng = np.random.default_rng(seed)
    groups = dataset.labels if dataset.labels is not None else np.zeros(len(dataset), np.int64)
    parts: list[list[Array]] = [[] for _ in shares]
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        ends = np.round(np.cumsum(shares) * len(rows)).astype(int)
        for part, start, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
            part.append(rows[start:end])
    return [dataset.take(np.sort(np.concatenate(rows))) for rows in parts]


def evenly(dataset: Dataset, limit: int | None, together: int = 1) -> Dataset:
    """Return at most `limit` samples, evenly spaced; runs of `together` rows stay whole."""
    if limit is None or len(dataset) <= limit:
        return dataset
    runs = np.linspace(0, len(dataset) // together - 1, max(1, limit // together)).astype(int)
    return dataset.take((runs[:, None] * together + np.arange(together)).reshape(-1))


def joined(first: Dataset, second: Dataset) -> Dataset:
    """Return the samples of two data sets; labels are kept where both have them."""
    inputs = {name: np.concatenate([values, second.inputs[name]]) for name, values in first.inputs.items()}
    if first.labels is None or second.labels is None:
        return Dataset(inputs, None)
    return Dataset(inputs, np.concatenate([first.labels, second.labels]))


def without_overlap(holdout: Dataset, data: Dataset) -> tuple[Dataset, int]:
    """Return the held-out samples that do not also occur in `data`, and how many did."""
    seen = set(_row_hashes(data))
    fresh = np.array([row not in seen for row in _row_hashes(holdout)])
    return (holdout, 0) if fresh.all() else (holdout.take(fresh), int((~fresh).sum()))


def _row_hashes(dataset: Dataset) -> list[bytes]:
    arrays = [np.ascontiguousarray(dataset.inputs[name]) for name in sorted(dataset.inputs)]
    return [b"".join(values[i].tobytes() for values in arrays) for i in range(len(dataset))]
