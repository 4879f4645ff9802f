"""Patches: new values for named parameters, written into the original bytes and nothing else."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxcare.errors import ModelError, UsageError
from onnxcare.graph import wire
from onnxcare.graph.model import Model
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.storage import Source

Array = np.ndarray

PREFIX = "onnxcare."
METADATA_PROPS = onnx.ModelProto.METADATA_PROPS_FIELD_NUMBER


@dataclass(frozen=True)
class TensorChange:
    """How much a patch changes one tensor.

    Attributes:
        name: the tensor.
        shape: its dimensions.
        changed: how many of its values differ.
        size: how many values it has.
        norm: Euclidean norm of the change.
        relative: that norm divided by the norm of the original values.
        largest: the largest change of a single value, without its sign.
    """

    name: str
    shape: tuple[int, ...]
    changed: int
    size: int
    norm: float
    relative: float
    largest: float

    @classmethod
    def between(cls, name: str, old: Array, new: Array) -> TensorChange:
        """Return how much values of the same shape and type differ."""
        # By their bytes: NaN equals itself there, and -0 is another number than 0.
        changed = (_as_bytes(old) != _as_bytes(new)).any(axis=-1)
        wide = np.complex128 if np.iscomplexobj(old) else np.float64
        before, after = (values.reshape(-1)[changed].astype(wide) for values in (old, new))
        with np.errstate(invalid="ignore", over="ignore"):
            differences = np.abs(after - before)
            norm = float(np.linalg.norm(differences))
            relative = norm / max(float(np.linalg.norm(old.astype(wide))), 1e-30)
        largest = float(differences.max(initial=0))
        return cls(name, old.shape, int(changed.sum()), old.size, norm, relative, largest)


def _as_bytes(values: Array) -> Array:
    """Return the bytes of every value, [values, bytes]."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, values.dtype.itemsize)


@dataclass(frozen=True)
class Patch:
    """New values for parameters of a model."""

    values: Mapping[Parameter, Array]

    def summary(self, model: Model) -> list[TensorChange]:
        """Return what the patch changes, tensor by tensor, as it will be stored."""
        source = Source(model.proto, model.path.parent)
        return [
            TensorChange.between(
                parameter.storage.name, parameter.storage.read(source), parameter.storage.rounded(source, values)
            )
            for parameter, values in self.values.items()
        ]

    def apply(self, model: Model) -> bytes:
        """Return the bytes of the model with the patched tensors; every other byte is the original's.

        Tensors that were stored in a sidecar file move into the model file; the sidecar stays as it is.

        Raises:
            ModelError: the new values overflow the tensor's type, or the bytes are laid out in an unusual way.
        """
        edits: dict[wire.Path, bytes] = {}
        source = Source(model.proto, model.path.parent)
        for parameter, values in self.values.items():
            edits |= parameter.storage.encode(source, values)
        try:
            return wire.splice(model.data, edits)
        except (KeyError, ValueError):
            # Legal protobuf that nobody writes: a graph in several pieces, or fields of the group type.
            raise ModelError(
                f"{model.path}: its bytes cannot be patched in place; save it again with onnx.save"
            ) from None


def with_metadata(data: bytes, entries: Mapping[str, str]) -> bytes:
    """Return model bytes whose `onnxcare.*` metadata is exactly `entries` (keys without the prefix)."""
    new = [
        onnx.StringStringEntryProto(key=PREFIX + key, value=value).SerializeToString() for key, value in entries.items()
    ]
    return wire.replace_entries(data, METADATA_PROPS, is_ours, new)


def is_ours(content: bytes) -> bool:
    """Return whether a serialized metadata entry is one of `onnxcare.*`."""
    # What is not UTF-8, protobuf hands over as bytes.
    return str(onnx.StringStringEntryProto.FromString(content).key).startswith(PREFIX)


def check_output(out: Path, taken: list[Path], model: Path, in_place: bool) -> None:
    """Make sure, before any work is done, that the output can be written and overwrites no input.

    Raises:
        UsageError: it cannot, or would.
    """
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; name the file to write")
    if out.exists() and not out.is_file():
        raise UsageError(f"{out}: is not a file but a device or a pipe; name the file to write")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out}: the folder {out.parent} is not writable")
    if not out.exists():
        return
    if not os.access(out, os.W_OK):
        raise UsageError(f"{out}: is not writable")
    for path in taken:
        if path.exists() and out.samefile(path):
            raise UsageError(f"{out}: is an input of this run; name another file to write")
    if not in_place and model.exists() and out.samefile(model):
        raise UsageError(f"{out}: is the model itself; name another file, or use --in-place")


@contextlib.contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """Make a temporary folder on the file system of `out`, so that a finished file can be moved there at once.

    Raises:
        UsageError: it cannot be made, or nothing can be written there.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".onnxcare-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield folder
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged(model: Model, data: bytes, out: Path) -> Iterator[Path]:
    """Write model bytes and sidecars into a temporary folder beside `out`, and remove it afterwards.

    Raises:
        UsageError: the folder of `out` cannot be written, holds another sidecar of the same name, or `out` is
            itself the name of a sidecar.
    """
    for sidecar in model.external_files():
        there = out.parent / sidecar.relative_to(model.path.parent)
        if there == out:
            raise UsageError(f"{out}: is the name of the model's external data; name another file to write")
        if there.exists() and not there.samefile(sidecar) and not filecmp.cmp(there, sidecar, shallow=False):
            raise UsageError(f"{there}: exists and differs from the model's external data; use another folder")
    with _folder_beside(out) as folder:
        path = folder / out.name
        path.write_bytes(data)
        for sidecar in model.external_files():
            target = folder / sidecar.relative_to(model.path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sidecar, target)
        yield path


def publish(model: Model, path: Path, data: bytes, out: Path) -> None:
    """Move a staged model to its place: sidecars that are not there yet first, then the model, atomically.

    `data` takes the place of the staged bytes: it may differ from them in metadata alone.
    """
    path.write_bytes(data)
    if out.exists():
        shutil.copymode(out, path)
    for sidecar in model.external_files():
        relative = sidecar.relative_to(model.path.parent)
        target = out.parent / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / relative).replace(target)
    path.replace(out)


@contextlib.contextmanager
def staged_file(path: Path, content: str | bytes) -> Iterator[None]:
    """Write a file beside its place, and move it there when what is done meanwhile has ended well.

    Raises:
        UsageError: it cannot be written.
    """
    with _folder_beside(path) as folder:
        whole = folder / path.name
        whole.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        yield
        whole.replace(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either whole or not there.

    Raises:
        UsageError: it cannot be written.
    """
    with staged_file(path, content):
        pass
