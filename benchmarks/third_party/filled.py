"""The Caffe2-era classics with random weights in the place of their `ConstantOfShape` nodes: whole networks again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def fill(source: Path, target: Path) -> Path:
    """Write a model with weights (He) and normalisations that differ from unit to unit, and return the file."""
    model = onnx.load(source)
    rng = np.random.default_rng(1)
    sizes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(sizes[node.input[0]])
        if len(shape) > 1:
            values = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        else:
            values = rng.uniform(0.5, 1.5, shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    # Initializers of this file format are inputs, too.
    names = {info.name for info in model.graph.input}
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
        if tensor.name not in names
    )
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target
