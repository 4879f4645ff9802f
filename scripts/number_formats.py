"""Write a float32 model in other number formats: 8-bit integers, half precision, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common import float16
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

_BATCH = 100
_WEIGHTED = ("Conv", "Gemm", "MatMul")


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Hands samples over in batches."""

    def __init__(self, name: str, samples: np.ndarray) -> None:
        self._batches = iter([{name: samples[i : i + _BATCH]} for i in range(0, len(samples), _BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def static_int8(source: Path, target: Path, samples: np.ndarray) -> None:
    """Quantise weights and activations to int8, with QuantizeLinear and DequantizeLinear around every operator.

    Weights have a scale for each output channel and no zero point, biases are int32.

    Args:
        source: the float32 model.
        target: the file to write.
        samples: what the ranges of activations are taken from.
    """
    name = onnx.load(source).graph.input[0].name
    quantize_static(
        source,
        target,
        _Batches(name, samples),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def dynamic_int8(source: Path, target: Path) -> None:
    """Quantise weights, and let the model take the ranges of activations while it runs (MatMulInteger, ConvInteger)."""
    # onnxruntime has no ConvInteger for signed weights.
    quantize_dynamic(source, target, weight_type=QuantType.QUInt8)


def weights_int8(source: Path, target: Path) -> None:
    """Store weights alone as int8, with a scale for each output channel; a DequantizeLinear stands behind each."""
    model = onnx.load(source)
    for weight, axis in _weights(model):
        values = numpy_helper.to_array(weight)
        others = tuple(i for i in range(values.ndim) if i != axis)
        scale = (np.abs(values).max(axis=others, keepdims=True) / 127).astype(np.float32)
        small = np.clip(np.round(values / scale), -127, 127).astype(np.int8)
        name = weight.name
        scales = numpy_helper.from_array(scale.reshape(-1), f"{name}_scale")
        node = helper.make_node(
            "DequantizeLinear", [f"{name}_int8", scales.name], [name], f"{name}_dequantize", axis=axis
        )
        model.graph.initializer.append(scales)
        _store(model, weight, numpy_helper.from_array(small, f"{name}_int8"), node)
    onnx.save(model, target)


def half(source: Path, target: Path) -> None:
    """Turn all weights and activations into float16; input and output stay float32."""
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def bfloat16_weights(source: Path, target: Path) -> None:
    """Store weights and biases as bfloat16, with a Cast to float32 behind each."""
    model = onnx.load(source)
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        name = tensor.name
        kind = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        small = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), f"{name}_bfloat16")
        node = helper.make_node("Cast", [small.name], [name], f"{name}_cast", to=TensorProto.FLOAT)
        _store(model, tensor, small, node)
    onnx.save(model, target)


def _weights(model: onnx.ModelProto) -> Iterator[tuple[TensorProto, int]]:
    """Yield every weight with the axis of its outputs."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type in _WEIGHTED and node.input[1] in known:
            flipped = any(item.name == "transB" and item.i for item in node.attribute)
            yield known[node.input[1]], 0 if node.op_type == "Conv" or flipped else 1


def _store(model: onnx.ModelProto, old: TensorProto, new: TensorProto, node: onnx.NodeProto) -> None:
    """Put another tensor in a tensor's place, and a node behind it that makes the one of the other."""
    old.CopyFrom(new)
    model.graph.node.insert(0, node)
