"""Tensors that readers disagree about, that poison every answer, or that nobody reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from onnxcare.findings.base import StaticFinding, counted, quoted
from onnxcare.findings.files import region
from onnxcare.findings.walk import Held, Scope, Unit, values_of
from onnxcare.graph.model import value_fields
from onnxcare.graph.view import label, operator

_FLOATS: dict[int, np.dtype] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.DOUBLE: np.dtype(np.float64),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.BFLOAT16: onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16),
}
_ELEMENTS_AT_ONCE = 1 << 22

# Operators that compute with weights.
_LAYERS = set(
    """
    Conv ConvTranspose DeformConv Gemm MatMul Einsum ConvInteger MatMulInteger QLinearConv QLinearMatMul
    LSTM GRU RNN Attention
    BatchNormalization LayerNormalization InstanceNormalization GroupNormalization RMSNormalization PRelu
    """.split()
)
# Operators that hand the values of a constant on.
_CARRIERS = set(
    """
    Identity Cast CastLike Transpose Reshape Flatten Squeeze Unsqueeze Expand Tile Slice Split Concat
    QuantizeLinear DequantizeLinear
    """.split()
)
# Operators that may look at a NaN without passing it on to every answer.
_TESTS = {"Where", "Equal", "IsNaN", "IsInf", "Shape", "Size"}
# Attributes of ai.onnx.ml operators that are weights; others may hold infinities, as thresholds of trees do.
_WEIGHTS = set("coefficients intercepts rho support_vectors scale offset".split())


def two_value_fields(held: Iterable[Held]) -> Iterator[StaticFinding]:
    """Find tensors that carry their values twice."""
    for item in held:
        fields = value_fields(item.tensor)
        if len(fields) > 1:
            yield StaticFinding(
                "two-value-fields",
                "error",
                item.name,
                f"Tensor {quoted(item.name)} carries values in {' and '.join(fields)}: one reader sees one set of "
                "weights, the next another, so what was checked need not be what runs. Take a model from a source you "
                "trust, or export it again.",
            )


def duplicate_initializers(found: Iterable[Scope]) -> Iterator[StaticFinding]:
    """Find names that two initializers of one graph share."""
    for scope in found:
        names = Counter(tensor.name for tensor in scope.initializers)
        for name, count in names.items():
            if count > 1:
                yield StaticFinding(
                    "duplicate-initializer",
                    "warning",
                    name,
                    f"{count} initializers have the name {quoted(name)}: onnxruntime takes the last one, other "
                    "readers the first, and onnx's checker refuses the file. Export the model again.",
                )


def unused_initializers(found: Iterable[Scope]) -> Iterator[StaticFinding]:
    """Find initializers that no node reads."""
    names = [tensor.name for scope in found for tensor in scope.initializers if tensor.name not in scope.unit.read]
    if names:
        yield StaticFinding(
            "unused-initializer",
            "note",
            names[0],
            f"No node reads {counted(len(names), 'initializer')} ({quoted(names[0])}"
            f"{' first' if len(names) > 1 else ''}): the file is larger than it needs to be, and they may hold "
            "anything.",
        )


def non_finite(held: Iterable[Held], found: Iterable[Scope], folder: Path) -> Iterator[StaticFinding]:
    """Find NaN and infinity in tensors and in plain attributes; what they do depends on who reads them."""
    roles = _Roles()
    for item in held:
        if item.tensor.data_type in _FLOATS and len(value_fields(item.tensor)) <= 1:
            nans, infinities = _count(item.tensor, folder)
            if nans or infinities:
                yield _told(item.name, nans, infinities, roles.of_tensor(item, nans))
    for scope in found:
        for node in scope.nodes:
            for attribute in node.attribute:
                values = np.array([*attribute.floats, *([attribute.f] if attribute.HasField("f") else [])])
                if not np.isfinite(values).all():
                    nans, infinities = int(np.isnan(values).sum()), int(np.isinf(values).sum())
                    name, weights = roles.of_attribute(node, attribute, scope.unit, nans)
                    yield _told(name, nans, infinities, weights)


class _Roles:
    """Tells whether constants are weights."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], set[str]] = {}

    def of_tensor(self, item: Held, nans: int) -> bool:
        if item.node is None or operator(item.node) == "Constant":
            return item.name in self._weights(item.unit, bool(nans))
        outputs = set(item.node.output) if operator(item.node) == "ConstantOfShape" else set()
        return bool(outputs & self._weights(item.unit, bool(nans)))

    def of_attribute(
        self, node: onnx.NodeProto, attribute: onnx.AttributeProto, unit: Unit, nans: int
    ) -> tuple[str, bool]:
        if operator(node) == "Constant" and len(node.output):
            return node.output[0], node.output[0] in self._weights(unit, bool(nans))
        name = f"{label(node)}.{attribute.name}"
        return name, node.domain == "ai.onnx.ml" and attribute.name in _WEIGHTS

    def _weights(self, unit: Unit, nans: bool) -> set[str]:
        """Return the names of what layers compute with; NaN spoils whatever computes with it."""
        if (id(unit), nans) not in self._known:
            carriers = {name: node for node in unit.nodes if operator(node) in _CARRIERS for name in node.output}
            found: set[str] = set()
            stack: list[str] = []
            for node in unit.nodes:
                if operator(node) in _LAYERS or (nans and operator(node) not in _CARRIERS | _TESTS):
                    stack += node.input
            while stack:
                name = stack.pop()
                if name not in found:
                    found.add(name)
                    stack += carriers[name].input if name in carriers else ()
            self._known[id(unit), nans] = found
        return self._known[id(unit), nans]


def _told(name: str, nans: int, infinities: int, poisons: bool) -> StaticFinding:
    counts = [f"{nans} NaN"] * bool(nans) + [f"{infinities} infinite"] * bool(infinities)
    meaning = (
        "Weights like these make answers NaN or infinite; training or conversion has failed."
        if poisons
        else "No layer takes them as weights, and masks and bounds often hold infinities: make sure that these do."
    )
    message = f"{quoted(name)} holds {' and '.join(counts)} value{'s' * (nans + infinities > 1)}. {meaning}"
    return StaticFinding("non-finite-weights", "error" if poisons else "note", name, message)


def _count(tensor: onnx.TensorProto, folder: Path) -> tuple[int, int]:
    """Return how many values are NaN and how many infinite; a tensor that cannot be read has none."""
    nans = infinities = 0
    for values in _pieces(tensor, folder):
        if not np.isfinite(values).all():
            nans += int(np.isnan(values).sum())
            infinities += int(np.isinf(values).sum())
    return nans, infinities


def _pieces(tensor: onnx.TensorProto, folder: Path) -> Iterator[np.ndarray]:
    dtype = _FLOATS[tensor.data_type]
    if uses_external_data(tensor):
        place = region(tensor, folder)
        if place is None:
            return
        path, offset, length = place
        with path.open("rb") as file:
            file.seek(offset)
            while length >= dtype.itemsize:
                data = file.read(min(length, _ELEMENTS_AT_ONCE * dtype.itemsize))
                length = length - len(data) if data else 0
                yield np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
        return
    values = values_of(tensor)
    if values is not None:
        for start in range(0, values.size, _ELEMENTS_AT_ONCE):
            yield values[start : start + _ELEMENTS_AT_ONCE]
