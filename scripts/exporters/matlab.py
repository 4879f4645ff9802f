"""A network laid out as MATLAB's exporter does it, and as the ACAS Xu networks are published.

Every weight is also listed as an input, the batch is fixed at one sample, a mean image is subtracted and the image
flattened in front; IR 3, opset 8. MATLAB itself is not at hand: the weights come from scikit-learn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import sklearn
from onnx import TensorProto, helper, numpy_helper
from sklearn.neural_network import MLPClassifier

from exporters.catalogue import files
from exporters.digits import CLASSES, SEED, SHAPES, Parts
from exporters.scikit_learn import EPOCHS, fit

VERSIONS = {"scikit-learn": sklearn.__version__}
MODELS = files("matlab")
HIDDEN = (32, 16)
IR_VERSION, OPSET = 3, 8


def write(parts: Parts, folder: Path) -> None:
    """Train the network and lay it out."""
    data = parts.training
    mean = data.x.mean(axis=0)
    network = fit(MLPClassifier(HIDDEN, max_iter=EPOCHS, random_state=SEED), data.x - mean, data.y)
    (folder / MODELS[0]).write_bytes(layout(mean, network.coefs_, network.intercepts_).SerializeToString())


def layout(mean: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray]) -> onnx.ModelProto:
    """Return the model of dense layers with ReLU between them; weights are [inputs, outputs]."""
    values = {"input_AvgImg": mean.reshape(1, *SHAPES["first"])}
    nodes = [
        helper.make_node("Sub", ["input", "input_AvgImg"], ["input_Sub"], name="input_Sub"),
        helper.make_node("Flatten", ["input_Sub"], ["flatten_1"], name="flatten_1", axis=1),
    ]
    last = "flatten_1"
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        final = number == len(weights)
        name = f"linear_{number}" if final else f"Operation_{number}"
        values |= {f"{name}_MatMul_W": weight, f"{name}_Add_B": bias}
        nodes += [
            helper.make_node("MatMul", [last, f"{name}_MatMul_W"], [f"{name}_MatMul"], name=f"{name}_MatMul"),
            helper.make_node("Add", [f"{name}_MatMul", f"{name}_Add_B"], [f"{name}_Add"], name=f"{name}_Add"),
        ]
        last = f"{name}_Add"
        if not final:
            nodes.append(helper.make_node("Relu", [last], [f"relu_{number}"], name=f"relu_{number}"))
            last = f"relu_{number}"
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in values.items()]
    listed = [helper.make_tensor_value_info(item.name, TensorProto.FLOAT, item.dims) for item in stored]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, *SHAPES["first"]])
    scores = helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, CLASSES])
    graph = helper.make_graph(nodes, "digits", [image, *listed], [scores], stored)
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])
