"""The model as it was read: the source of truth that is never edited."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnxcare.axes import Axes, samples_first
from onnxcare.errors import ModelError, SpecError, nearest
from onnxcare.graph.functions import inlined_size
from onnxcare.graph.places import tensors
from onnxcare.runtime import MAPS, Session

VALUE_FIELDS = (
    "raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"
)  # fmt: skip
# With so many nodes in functions, onnxruntime takes minutes to load a model.
_MOST_NODES = 100_000


@dataclass(frozen=True)
class Signature:
    """Name, dtype and shape of a model input or output; unknown dimensions are names or None.

    The file need not say even how many axes there are: the shape is empty then, and `ranked` False. Samples are on axis
    0 of the shape; where the model has them on another `axis`, or takes one value for all of them (None), the user says
    so.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...]
    ranked: bool = True
    axis: int | None = 0


@dataclass(frozen=True)
class Model:
    """An ONNX model, byte for byte as it lies on disk.

    Attributes:
        path: the file.
        proto: what it holds; external data is left where it is.
        sha256: hex fingerprint of its bytes.
        inputs: what must be fed (initializers that are listed as inputs are not).
        outputs: what it answers.
    """

    path: Path
    proto: onnx.ModelProto = field(repr=False)
    sha256: str
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]

    @property
    def axes(self) -> dict[str, int | None]:
        """Where samples lie in inputs that do not have them on axis 0."""
        return {item.name: item.axis for item in self.inputs if item.axis != 0}

    @property
    def data(self) -> bytes:
        """The bytes of the file, read again: held all the time, they would double what a model takes.

        Raises:
            ModelError: the file is gone, or not the same any more.
        """
        data = _bytes(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ModelError(f"{self.path}: the file has changed since it was read; run again")
        return data

    @property
    def opset(self) -> int:
        """Version of the default operator set (0 where the model imports none)."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    def external_files(self) -> tuple[Path, ...]:
        """Return the sidecar files that hold tensors of this model."""
        names = {ExternalDataInfo(tensor).location for tensor in _external_tensors(self.proto)}
        return tuple(self.path.parent / name for name in sorted(names))


def load_model(path: str | Path, axes: Axes | None = None) -> Model:
    """Read an ONNX file and make sure that onnxruntime runs it.

    Args:
        path: the file.
        axes: where samples lie in inputs that do not have them on axis 0; None for an input without samples.

    Raises:
        ModelError: the file is missing, is not an ONNX model, is truncated, lacks its external data, or
            onnxruntime cannot load it.
        SpecError: there is no such input, or it has no such axis.
    """
    path = Path(path)
    data = _bytes(path)
    if not data:
        raise ModelError(f"{path}: the file is empty")
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one") from None
    if not proto.graph.node:
        raise ModelError(f"{path}: not an ONNX model: it holds no graph with nodes")
    check_external_data(path, proto)
    _check_values(path, proto)
    if proto.functions and inlined_size(proto, _MOST_NODES) > _MOST_NODES:
        raise ModelError(
            f"{path}: its functions call each other so often that they stand for more than {_MOST_NODES} nodes; "
            "no runtime loads that"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    del data
    session = Session(path, optimise=False)
    return Model(
        path=path,
        proto=proto,
        sha256=sha256,
        inputs=_with_axes(path, _signatures(session.inputs, proto.graph.input), axes or {}),
        outputs=_signatures(session.outputs, proto.graph.output),
    )


def _signatures(
    found: Sequence[tuple[str, str, tuple[int | str | None, ...]]], infos: Iterable[onnx.ValueInfoProto]
) -> tuple[Signature, ...]:
    """Return what onnxruntime says of inputs or outputs; it calls tensors of unknown rank and scalars the same."""
    unranked = {info.name for info in infos if not info.type.tensor_type.HasField("shape")}
    return tuple(_signature(name, kind, shape, bool(shape) or name not in unranked) for name, kind, shape in found)


def _with_axes(path: Path, inputs: tuple[Signature, ...], axes: Axes) -> tuple[Signature, ...]:
    known = {item.name: item for item in inputs}
    for name, axis in axes.items():
        if name not in known:
            raise SpecError(f"sample_axes.{name}: {path} has no such input{nearest(name, known)}")
        if axis and axis >= len(known[name].shape):
            shape = list(known[name].shape) if known[name].ranked else "that the file does not tell"
            raise SpecError(f"sample_axes.{name}: there is no axis {axis} in the shape {shape}")
    return tuple(
        replace(item, shape=samples_first(item.shape, axes[item.name]), axis=axes[item.name])
        if item.name in axes
        else item
        for item in inputs
    )


def _signature(name: str, kind: str, shape: tuple[int | str | None, ...], ranked: bool) -> Signature:
    if kind in MAPS:
        return Signature(name, np.dtype(np.float32), (None, None))
    return Signature(name, numpy_dtype(kind), shape, ranked)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder; name the .onnx file in it") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def check_same_signature(model: Model, other: Model) -> None:
    """Make sure that two models take the same inputs and give the same outputs.

    Raises:
        ModelError: they do not.
    """
    for word, ours, theirs in (("input", model.inputs, other.inputs), ("output", model.outputs, other.outputs)):
        mine, yours = ({item.name: item.dtype for item in items} for items in (ours, theirs))
        if mine != yours:
            raise ModelError(
                f"{model.path}: has {word}s {', '.join(mine)}, but {other.path} has {', '.join(yours)}; they cannot be "
                "compared"
            )


def check_external_data(path: Path, proto: onnx.ModelProto) -> None:
    """Make sure that the sidecar files of a model lie beside it; `path` is where its file is, or will be.

    Raises:
        ModelError: one is missing, or outside of the folder.
    """
    folder = path.parent.resolve()
    for tensor in _external_tensors(proto):
        try:
            location = ExternalDataInfo(tensor).location
        except ValueError as error:
            raise ModelError(f"{path}: tensor {tensor.name!r} has damaged external data: {error}") from None
        try:
            target = (folder / location).resolve()
            there = target.is_file()
        except (OSError, TypeError, ValueError):  # too long, no text, a zero byte
            raise ModelError(
                f"{path}: tensor {tensor.name!r} has damaged external data: its location is no name of a file"
            ) from None
        if not target.is_relative_to(folder):
            raise ModelError(f"{path}: tensor {tensor.name!r} points outside its folder: {location}")
        if not there:
            raise ModelError(f"{path}: its external data file {location} is missing from {path.parent}")


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that lies in a sidecar file."""
    return (tensor for tensor in tensors(proto) if uses_external_data(tensor))


def value_fields(tensor: onnx.TensorProto) -> list[str]:
    """Return the fields in which a tensor carries its values: more than one, and readers disagree about them."""
    filled = [name for name in VALUE_FIELDS if len(getattr(tensor, name))]
    return [*filled, "external_data"] if uses_external_data(tensor) else filled


def _check_values(path: Path, proto: onnx.ModelProto) -> None:
    for tensor in tensors(proto):
        fields = value_fields(tensor)
        if len(fields) > 1:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} carries values in two fields ({' and '.join(fields)}): "
                "readers disagree about its weights"
            )
        if not uses_external_data(tensor) and not _holds_what_it_says(tensor):
            raise ModelError(
                f"{path}: tensor {tensor.name!r} is damaged: it holds more or fewer values than its shape "
                f"{list(tensor.dims)} says"
            )


def _holds_what_it_says(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor holds as many values as its dimensions say; onnxruntime does not always look."""
    width = _WIDTHS.get(tensor.data_type)
    if width is None:  # text, types of which several values share a byte, and what is no type
        return True
    count, raw = math.prod(tensor.dims), tensor.raw_data
    if raw:
        return len(raw) == count * width
    return sum(len(getattr(tensor, name)) for name in VALUE_FIELDS) == count


# Bytes of a value, for types that have a field of their own beside raw_data.
_WIDTHS = {
    onnx.TensorProto.DataType.Value(kind): np.dtype(width).itemsize
    for width, kinds in {
        "u1": "INT8 UINT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ",
        "u2": "INT16 UINT16 FLOAT16 BFLOAT16",
        "u4": "INT32 UINT32 FLOAT",
        "u8": "INT64 UINT64 DOUBLE",
    }.items()
    for kind in kinds.split()
}
_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}


def numpy_dtype(ort_type: str) -> np.dtype | None:
    """Return the numpy dtype of an onnxruntime type such as ``tensor(float)``, or None where numpy has none."""
    inner = ort_type.removeprefix("tensor(").removesuffix(")")
    return np.dtype(_DTYPES[inner]) if inner in _DTYPES and inner != ort_type else None
