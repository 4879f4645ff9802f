"""Storage: how a file holds a tensor of weights, and what becomes of new values there.

Layers read weights as floating-point numbers. A file may hold them in half precision, as whole numbers with a scale and
a zero point, without their zeros, or as a list in an attribute of a node. A storage reads them as a runtime does, says
what new values become when they are rounded the way the file holds them, and writes them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnxcare.errors import ModelError
from onnxcare.graph import wire
from onnxcare.graph.model import VALUE_FIELDS, value_fields

Array = np.ndarray

HALVES: dict[int, str] = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
FLOATS: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64", **HALVES}
# Floating-point numbers of eight bits or less, which are read but not written.
EIGHTHS = {
    kind
    for name, kind in onnx.TensorProto.DataType.items()
    if name.startswith(("FLOAT8", "FLOAT4")) and "E8M0" not in name
}
# Whole numbers that may stand for weights; those of less than a byte are packed, and are read but not written.
WHOLE: dict[int, str] = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT16: "int16",
    onnx.TensorProto.UINT16: "uint16",
    onnx.TensorProto.INT32: "int32",
}
PACKED = {kind for name, kind in onnx.TensorProto.DataType.items() if name in ("INT4", "UINT4", "INT2", "UINT2")}


@dataclass(frozen=True)
class Source:
    """A model file as it was read, with some of its messages replaced.

    Attributes:
        proto: what it holds.
        folder: where its external data lies.
        edits: new serialized messages, by path.
    """

    proto: onnx.ModelProto
    folder: Path
    edits: Mapping[wire.Path, bytes] = field(default_factory=dict)

    def message(self, path: wire.Path) -> Any:
        """Return the message that a path of field numbers and occurrences leads to; it must not be changed."""
        found: Any = self.proto
        for number, occurrence in path:
            found = getattr(found, found.DESCRIPTOR.fields_by_number[number].name)
            if hasattr(found, "__getitem__"):  # a repeated field
                found = found[occurrence]
        return type(found).FromString(self.edits[path]) if path in self.edits else found


class Storage(ABC):
    """How and where a file holds a tensor of weights."""

    path: wire.Path  # of the message that holds the values
    name: str  # of the tensor in the file, or of what has it for an attribute

    @property
    def paths(self) -> tuple[wire.Path, ...]:
        """Where everything lies that the values are read from."""
        return (self.path,)

    @property
    @abstractmethod
    def kind(self) -> str:
        """Say how the values are held, such as `float16`."""

    @property
    def refusal(self) -> str | None:
        """Say why new values cannot be written; None if they can."""
        return None

    @property
    def exact(self) -> bool:
        """Whether a weight is held as exactly as it is read."""
        return True

    @abstractmethod
    def read(self, source: Source) -> Array:
        """Return the values as a layer reads them, external data included.

        Raises:
            ModelError: the tensor carries values in two fields, so that readers disagree about the weights.
        """

    @abstractmethod
    def encode(self, source: Source, values: Array) -> dict[wire.Path, bytes]:
        """Return the serialized messages that hold new values, by path; whatever else they hold stays.

        Raises:
            ModelError: the values do not fit into the type.
        """

    def rounded(self, source: Source, values: Array) -> Array:
        """Return what is read after these values were written."""
        return self.read(replace(source, edits=self.encode(source, values)))


@dataclass(frozen=True)
class Tensor(Storage):
    """A tensor of floating-point numbers: an initializer, or the value of a Constant node.

    Attributes:
        path: where the TensorProto lies.
        name: name of the tensor in the file.
        data_type: its element type.
    """

    path: wire.Path
    name: str
    data_type: int

    @property
    def kind(self) -> str:
        """The element type."""
        return FLOATS.get(self.data_type) or onnx.TensorProto.DataType.Name(self.data_type).lower()

    @property
    def refusal(self) -> str | None:
        """Other types than floating-point numbers of 16, 32 or 64 bits hold no weights, or none that can be patched."""
        return None if self.data_type in FLOATS else f"is stored as {self.kind}"

    @property
    def exact(self) -> bool:
        """All but half precision is."""
        return self.data_type not in HALVES

    def read(self, source: Source) -> Array:
        """Return the values, those of less than 32 bits widened to float32."""
        values = read_tensor(source.message(self.path), source.folder)
        return values.astype(np.float32) if self.data_type in (*HALVES, *EIGHTHS) else values

    def encode(self, source: Source, values: Array) -> dict[wire.Path, bytes]:
        """Return the tensor with new values."""
        tensor = source.message(self.path)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.data_type)
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        unfit = ~np.isfinite(stored.astype(np.float64))
        # Infinities that were there before may stay: masks are made of them.
        if unfit.any() and (unfit & differing(stored, read_tensor(tensor, source.folder))).any():
            raise ModelError(f"{tensor.name}: the repair does not fit into {self.kind}")
        return {self.path: write_tensor(tensor, stored)}


@dataclass(frozen=True)
class Numbers(Storage):
    """A list of floating-point numbers in an attribute of a node, read as a matrix.

    Attributes:
        path: where the AttributeProto lies.
        name: what the node answers, a dot, and the name of the attribute.
        shape: that of the matrix; the list holds its rows one behind the other.
    """

    path: wire.Path
    name: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Always float32."""
        return "float32 attribute"

    def read(self, source: Source) -> Array:
        """Return the list as an array of its shape."""
        return np.array(source.message(self.path).floats, np.float32).reshape(self.shape)

    def encode(self, source: Source, values: Array) -> dict[wire.Path, bytes]:
        """Return the attribute with new values."""
        attribute = onnx.AttributeProto()
        attribute.CopyFrom(source.message(self.path))
        with np.errstate(over="ignore"):
            stored = values.astype(np.float32)
        if not np.isfinite(stored).all():
            raise ModelError(f"{self.name}: the repair does not fit into float32")
        del attribute.floats[:]
        attribute.floats.extend(stored.reshape(-1).tolist())
        return {self.path: attribute.SerializeToString(deterministic=True)}


@dataclass(frozen=True)
class Scaled(Storage):
    """Whole numbers that a scale and a zero point make weights of: (q - zero) * scale.

    New values are rounded to the nearest such number. Scale and zero point stay, so a value beyond their range becomes
    the end of it.

    Attributes:
        path: where the TensorProto of the whole numbers lies.
        name: its name in the file.
        scale: where that of the scales lies.
        zero: where that of the zero points lies; None for zero.
        data_type: element type of the whole numbers.
        axis: the axis along which there is one scale each, or in blocks; None where the scale broadcasts as it is.
        block: how many values share a scale along the axis, 0 for all of them.
    """

    path: wire.Path
    name: str
    scale: wire.Path
    zero: wire.Path | None
    data_type: int
    axis: int | None = None
    block: int = 0

    @property
    def paths(self) -> tuple[wire.Path, ...]:
        """The whole numbers, their scales, and their zero points."""
        return (self.path, self.scale) if self.zero is None else (self.path, self.scale, self.zero)

    @property
    def kind(self) -> str:
        """The element type."""
        return f"{WHOLE.get(self.data_type) or onnx.TensorProto.DataType.Name(self.data_type).lower()} with a scale"

    @property
    def refusal(self) -> str | None:
        """Say so where values are of less than a byte, or no whole numbers."""
        return None if self.data_type in WHOLE else f"is stored as {self.kind}"

    @property
    def exact(self) -> bool:
        """Never."""
        return False

    def read(self, source: Source) -> Array:
        """Return (q - zero) * scale, float32."""
        whole = read_tensor(source.message(self.path), source.folder)
        scale, zero = self._spread(source, whole.shape)
        return ((whole.astype(np.float32) - zero) * scale).astype(np.float32)

    def encode(self, source: Source, values: Array) -> dict[wire.Path, bytes]:
        """Return the tensor of the nearest whole numbers; where a weight stays, so does its number."""
        tensor = source.message(self.path)
        scale, zero = self._spread(source, values.shape)
        old = read_tensor(tensor, source.folder)
        least, greatest = _range(old, symmetric=not np.any(zero))
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.rint(values.astype(np.float64) / scale) + zero
        whole = np.where(np.isfinite(whole), whole, old.astype(np.float64))  # a scale of zero
        return {self.path: write_tensor(tensor, np.clip(whole, least, greatest).astype(old.dtype))}

    def _spread(self, source: Source, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Return scale and zero point as they broadcast over the weights."""
        scale = self._along(read_tensor(source.message(self.scale), source.folder).astype(np.float32), shape)
        if self.zero is None:
            return scale, np.zeros((), np.float32)
        return scale, self._along(read_tensor(source.message(self.zero), source.folder).astype(np.float32), shape)

    def _along(self, values: Array, shape: tuple[int, ...]) -> Array:
        if self.axis is None or values.size == 1:
            return values.reshape(()) if values.size == 1 else values
        if self.block:
            return np.repeat(values, self.block, axis=self.axis)[tuple(slice(n) for n in shape)]
        return values.reshape(*[-1 if axis == self.axis % len(shape) else 1 for axis in range(len(shape))])


@dataclass(frozen=True)
class Sparse(Storage):
    """A tensor held without its zeros, which stay zeros.

    Attributes:
        path: where the TensorProto of its values lies.
        name: its name in the file.
        indices: where that of their places lies.
        shape: shape of the whole tensor.
        data_type: element type of the values.
    """

    path: wire.Path
    name: str
    indices: wire.Path
    shape: tuple[int, ...]
    data_type: int

    @property
    def kind(self) -> str:
        """The element type."""
        return f"sparse {self._values.kind}"

    @property
    def refusal(self) -> str | None:
        """Say so where the values are of a type that cannot be patched."""
        return self._values.refusal

    @property
    def exact(self) -> bool:
        """Zeros have no place."""
        return False

    @property
    def _values(self) -> Tensor:
        return Tensor(self.path, self.name, self.data_type)

    def read(self, source: Source) -> Array:
        """Return the whole tensor."""
        values = self._values.read(source)
        whole = np.zeros(int(np.prod(self.shape, dtype=np.int64)), values.dtype)
        whole[self._places(source)] = values
        return whole.reshape(self.shape)

    def encode(self, source: Source, values: Array) -> dict[wire.Path, bytes]:
        """Return the tensor of the values that have a place."""
        return self._values.encode(source, values.reshape(-1)[self._places(source)])

    def _places(self, source: Source) -> Array:
        places = read_tensor(source.message(self.indices), source.folder)
        return np.ravel_multi_index(tuple(places.T), self.shape) if places.ndim == 2 else places


@dataclass(frozen=True)
class Alike(Storage):
    """One value for all weights, as ConstantOfShape writes it.

    Attributes:
        path: where the node lies.
        name: name of the tensor that it makes.
        shape: shape of the tensor.
    """

    path: wire.Path
    name: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """One value."""
        return "one value for all, by ConstantOfShape"

    @property
    def refusal(self) -> str | None:
        """Always refused."""
        return "is one value for all, written by ConstantOfShape"

    def read(self, source: Source) -> Array:
        """Return the value everywhere."""
        values = [read_tensor(item.t, source.folder) for item in source.message(self.path).attribute]
        return np.full(self.shape, values[0].reshape(-1)[0] if values else np.float32(0))

    def encode(self, source: Source, values: Array) -> dict[wire.Path, bytes]:
        """Refuse.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"a tensor {self.refusal}")


def _range(old: Array, symmetric: bool) -> tuple[int, int]:
    """Return the least and greatest whole number; the least one of all only where it is used, or zero points are."""
    info = np.iinfo(old.dtype)
    narrow = symmetric and info.min < 0 and not np.any(old == info.min)
    return (-info.max if narrow else info.min), info.max


def differing(new: Array, old: Array) -> Array:
    """Return which values differ; NaN is the same as NaN."""
    return (new != old) & ~(np.isnan(new) & np.isnan(old))


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> Array:
    """Return the values of a tensor, external data included, as onnxruntime reads them.

    Raises:
        ModelError: it carries values in two fields, so that readers disagree about them.
    """
    filled = value_fields(tensor)
    if len(filled) > 1:
        raise ModelError(
            f"tensor {tensor.name!r} carries values in two fields ({' and '.join(filled)}): "
            "readers disagree about its weights, so it cannot be repaired"
        )
    if uses_external_data(tensor):
        # Older releases of onnx leave the values they read in the tensor.
        tensor = copy.deepcopy(tensor)
    return numpy_helper.to_array(tensor, str(folder))


def write_tensor(tensor: onnx.TensorProto, values: Array) -> bytes:
    """Return the serialized tensor with new values of its type and shape; name and metadata stay.

    Raises:
        ValueError: the values are of another type or shape.
    """
    # Not ascontiguousarray: it would give a single number an axis.
    payload = numpy_helper.from_array(np.asarray(values, order="C"))
    if tuple(payload.dims) != tuple(tensor.dims) or payload.data_type != tensor.data_type:
        raise ValueError(f"{tensor.name}: {values.shape} does not fit {tuple(tensor.dims)}")
    new = onnx.TensorProto()
    new.CopyFrom(tensor)
    for name in (*VALUE_FIELDS, "external_data", "data_location"):
        new.ClearField(name)
    new.raw_data = payload.raw_data
    return new.SerializeToString(deterministic=True)
