"""dice-ml's `adult.h5`, a Keras network of two dense layers, written as ONNX.

Its other networks are `.pth` files: whole pickled modules, which run code when they are loaded. They are left alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid"}


def convert(source: Path, target: Path) -> Path:
    """Write the dense layers of a sequential Keras network as ONNX, and return the file."""
    import h5py
    import numpy as np

    nodes, tensors, sizes = [], [], []
    read = "dense_input"
    with h5py.File(source) as file:
        config = json.loads(file.attrs["model_config"])["config"]["layers"]
        for layer in config[1:]:
            name, kind = layer["config"]["name"], _ACTIVATIONS[layer["config"]["activation"]]
            group = file[f"model_weights/{name}/{name}"]
            kernel, bias = (np.asarray(group[f"{part}:0"], np.float32) for part in ("kernel", "bias"))
            sizes += kernel.shape
            tensors += [
                numpy_helper.from_array(kernel, f"{name}/kernel"),
                numpy_helper.from_array(bias, f"{name}/bias"),
            ]
            for op, inputs, output in (
                ("MatMul", [read, f"{name}/kernel"], f"{name}/product"),
                ("Add", [f"{name}/product", f"{name}/bias"], f"{name}/sum"),
                (kind, [f"{name}/sum"], name),
            ):
                nodes.append(helper.make_node(op, inputs, [output], name=f"{name}/{op}"))
            read = name
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("dense_input", sizes[0]), (read, sizes[-1]))
    ]
    graph = helper.make_graph(nodes, "adult", infos[:1], infos[1:], tensors)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target
