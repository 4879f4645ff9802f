"""The file itself: whether it is an ONNX model, and where its external data lies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnxcare.findings.base import StaticFinding, counted, quoted
from onnxcare.findings.walk import Held

# Protobuf cannot hold more in one message.
_LARGEST_FILE = (1 << 31) - 1


def read(path: Path) -> onnx.ModelProto | StaticFinding:
    """Return the parsed file, or what is wrong with it."""
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            reason = "it is no regular file" if path.exists() else "there is no such file"
            return _unreadable(reason)
        if path.stat().st_size > _LARGEST_FILE:
            return _unreadable("it is larger than 2 GiB, the most an ONNX file can hold without external data")
        data = path.read_bytes()
    except OSError as error:
        return _unreadable(error.strerror or type(error).__name__)
    if not data:
        return _unreadable("it is empty")
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        return _unreadable("it is something else, or truncated, or nested too deeply")
    if not proto.graph.node:
        return StaticFinding(
            "no-graph", "error", "", "The file holds no graph with nodes, so it is no model that could be run."
        )
    return proto


def not_text() -> StaticFinding:
    """Return the finding for a file with names that cannot be written down."""
    return _unreadable("a name in it is no text (UTF-8), so that readers cannot agree about it")


def _unreadable(reason: str) -> StaticFinding:
    return StaticFinding("not-onnx", "error", "", f"The file cannot be read as an ONNX model: {reason}.")


def external_data(held: Iterable[Held], path: Path) -> list[StaticFinding]:
    """Find tensors whose values lie outside the model's folder, or nowhere."""
    found: dict[tuple[str, str], tuple[Held, int]] = {}
    for item in held:
        if uses_external_data(item.tensor):
            rule, reason = _placed(item.tensor, path.parent)
            if rule:
                first, count = found.get((rule, reason), (item, 0))
                found[rule, reason] = (first, count + 1)
    return [
        StaticFinding(rule, "error", first.name, f"The values of {_told(first.name, count)} {reason}")
        for (rule, reason), (first, count) in found.items()
    ]


def _told(name: str, count: int) -> str:
    return f"tensor {quoted(name)}" + (f" and of {counted(count - 1, 'other')}" if count > 1 else "")


def region(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int] | None:
    """Return file, first byte and number of bytes of an external tensor; None unless they all lie in the folder."""
    if _placed(tensor, folder)[0]:
        return None
    info = _info(tensor)
    offset = int(info.offset or 0)
    target = folder / info.location
    length = info.length if info.length is not None else target.stat().st_size - offset
    return target, offset, int(length)


def load_small(held: Iterable[Held], folder: Path, most: int = 1 << 20) -> None:
    """Read external tensors of at most that many bytes into the parsed file: exporters put thresholds there, too."""
    for item in held:
        place = region(item.tensor, folder) if uses_external_data(item.tensor) else None
        if place is None or place[2] > most:
            continue
        path, offset, length = place
        with path.open("rb") as file:
            file.seek(offset)
            item.tensor.raw_data = file.read(length)
        item.tensor.ClearField("external_data")
        item.tensor.ClearField("data_location")


def _info(tensor: onnx.TensorProto) -> ExternalDataInfo:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keys it does not know
        return ExternalDataInfo(tensor)


def _placed(tensor: onnx.TensorProto, folder: Path) -> tuple[str, str]:
    """Return the rule that the place of a tensor breaks and the end of the sentence; two empty texts for none."""
    missing, outside = "external-data-missing", "external-data-outside"
    try:
        info = _info(tensor)
    except (TypeError, ValueError):
        return missing, "are given by a damaged reference to external data; export the model again."
    location = str(info.location)
    shown = quoted(location)
    if not location:
        return missing, "lie in an external file without a name; export the model again."
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in _read_as_path(location)):
        return outside, (
            f"are taken from {shown}, which may lie outside the model's folder; whoever loads the model reads a file "
            "that did not come with it. Put the data beside the model under a plain name."
        )
    try:
        base = folder.resolve()
        target = (base / location).resolve()
        if not target.is_relative_to(base):
            return outside, (
                f"are taken from {shown}, a link that leaves the model's folder; whoever loads the model reads a file "
                "that did not come with it. Put the data itself beside the model."
            )
        size = target.stat().st_size if target.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long, a circle of links, a zero byte
        size = None
    if size is None:
        return missing, f"lie in {shown}, which is missing beside the model; put the file back."
    if _end(tensor, info) > size:
        return missing, f"lie in {shown}, which is too short to hold them; put the complete file back."
    return "", ""


def _read_as_path(location: str) -> tuple[PurePosixPath, PureWindowsPath]:
    # The gate may run on another system than the model.
    return PurePosixPath(location), PureWindowsPath(location)


def _end(tensor: onnx.TensorProto, info: ExternalDataInfo) -> int:
    offset = int(info.offset or 0)
    if info.length is not None:
        return offset + int(info.length)
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError):
        return offset
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)
    return offset + math.prod(tensor.dims) * width // (2 if packed else 1)
