"""Small models for tests of the graph, written as ONNX text with weights from a fixed generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcare.graph.layers import Layer, find_layers
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.sites import Site, find_sites
from onnxcare.graph.view import GraphView

Array = np.ndarray
Weights = Mapping[str, Array]


def build(text: str, weights: Weights | None = None, *, ir_version: int = 8, opset: int = 17) -> onnx.ModelProto:
    """Parse a graph in ONNX text and give it initializers."""
    domains = f'["": {opset}, "ai.onnx.ml": 3]' if "ai.onnx.ml." in text else f'["": {opset}]'
    proto = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: {domains}>\n{text}")
    for name, values in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return proto


def random(*shape: int, seed: int = 0, dtype: type = np.float32) -> Array:
    """Return normally distributed numbers."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def save(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Model:
    """Write a model and load it the way onnxcare does."""
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return load_model(path)


def layers_of(proto: onnx.ModelProto) -> list[Layer]:
    return find_layers(GraphView(proto))


def layer_of(proto: onnx.ModelProto) -> Layer:
    (layer,) = layers_of(proto)
    return layer


def sites_of(proto: onnx.ModelProto) -> list[Site]:
    view = GraphView(proto)
    return find_sites(view, find_layers(view))


# -- oracles: the model run without onnxcare -----------------------------------------------------


def exposing(proto: onnx.ModelProto, *tensors: str) -> onnx.ModelProto:
    """Return a copy whose outputs are these tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return copy


def _session(model: onnx.ModelProto | bytes | Path, tensors: tuple[str, ...]) -> ort.InferenceSession:
    if isinstance(model, onnx.ModelProto):
        model = (exposing(model, *tensors) if tensors else model).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, ["CPUExecutionProvider"])


def run(model: onnx.ModelProto | bytes | Path, feeds: Mapping[str, Array], *tensors: str) -> list[Array]:
    """Run a model in a plain onnxruntime session, all rows at once, and return outputs or inner tensors."""
    return _session(model, tensors).run(None, dict(feeds))


def run_single(model: onnx.ModelProto, feeds: Mapping[str, Array], *tensors: str) -> list[Array]:
    """Run row by row, so that a batch fixed at one is no hindrance."""
    session = _session(model, tensors)
    rows = [{k: v[i : i + 1] for k, v in feeds.items()} for i in range(len(next(iter(feeds.values()))))]
    return [np.concatenate(parts) for parts in zip(*(session.run(None, row) for row in rows), strict=True)]


def with_tensor_fed(proto: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Return a copy that takes `tensor` as one more input instead of computing it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        for position, name in enumerate(node.output):
            if name == tensor:
                node.output[position] = f"{tensor} before"
    kept = [info for info in copy.graph.output if info.name != tensor]
    fed_output = [info for info in copy.graph.output if info.name == tensor]
    del copy.graph.output[:]
    copy.graph.output.extend(kept + fed_output)
    copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return copy


class Reference:
    """The model with one tensor replaced, run row by row in onnx's reference implementation."""

    def __init__(self, proto: onnx.ModelProto, tensor: str, scores: str) -> None:
        """Cut the model by hand: `tensor` becomes an input."""
        self._whole = ReferenceEvaluator(exposing(proto, tensor))
        self._replaced = ReferenceEvaluator(exposing(with_tensor_fed(proto, tensor), scores))
        self._tensor = tensor

    def scores(self, x: Mapping[str, Array], change: Callable[[Array, int], Array]) -> Array:
        """Return the scores when `change(h, row)` takes the place of the tensor's value h."""
        found = []
        for row in range(len(next(iter(x.values())))):
            one = {name: values[row : row + 1] for name, values in x.items()}
            h = self._whole.run(None, one)[0]
            found.append(self._replaced.run(None, one | {self._tensor: change(h.copy(), row)})[0])
        return np.concatenate(found)


# -- the models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A classifier: the model, its input's name and shape, and the tensor that holds its logits."""

    proto: onnx.ModelProto
    input: str
    shape: tuple[int, ...]
    logits: str
    dtype: type = np.float32

    def samples(self, size: int, seed: int = 3) -> dict[str, Array]:
        """Return random inputs."""
        return {self.input: random(size, *self.shape, seed=seed, dtype=self.dtype)}


def mlp(dtype: type = np.float32) -> Subject:
    """Gemm with a transposed weight, MatMul + Add, and a plain Gemm."""
    kind = {np.float32: "float", np.float64: "double"}[dtype]
    proto = build(
        f"""mlp ({kind}[N, 6] x) => ({kind}[N, 4] scores) {{
            [fc1] z1 = Gemm <transB = 1> (x, W1, b1)
            [relu1] h1 = Relu (z1)
            [fc2] p2 = MatMul (h1, W2)
            [bias2] z2 = Add (b2, p2)
            [relu2] h2 = Relu (z2)
            [fc3] scores = Gemm (h2, W3, b3)
        }}""",
        {
            "W1": random(8, 6, dtype=dtype),
            "b1": random(8, dtype=dtype),
            "W2": random(8, 7, dtype=dtype),
            "b2": random(7, dtype=dtype),
            "W3": random(7, 4, dtype=dtype),
            "b3": random(4, dtype=dtype),
        },
    )
    return Subject(proto, "x", (6,), "scores", dtype)


def _normalisation(name: str, channels: int) -> dict[str, Array]:
    return {
        f"{name}_scale": random(channels, seed=1) + 2,
        f"{name}_shift": random(channels, seed=2),
        f"{name}_mean": random(channels, seed=3),
        f"{name}_var": np.abs(random(channels, seed=4)) + 0.5,
    }


def cnn() -> Subject:
    """Convolutions with normalisation, both kinds of pooling and Flatten."""
    proto = build(
        """cnn (float[N, 2, 8, 8] x) => (float[N, 5] scores) {
            [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (x, W1)
            [norm1] n1 = BatchNormalization (c1, n_scale, n_shift, n_mean, n_var)
            [relu1] r1 = Relu (n1)
            [pool1] q1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r1)
            [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (q1, W2, b2)
            [relu2] r2 = Relu (c2)
            [pool2] q2 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (r2)
            [flatten] f = Flatten (q2)
            [fc] scores = Gemm <transB = 1> (f, W3, b3)
        }""",
        {"W1": random(4, 2, 3, 3), "W2": random(6, 4, 3, 3), "b2": random(6), "W3": random(5, 24), "b3": random(5)}
        | _normalisation("n", 4),
    )
    return Subject(proto, "x", (2, 8, 8), "scores")


def residual() -> Subject:
    """A residual block with normalisation, global pooling and one Gemm."""
    proto = build(
        """residual (float[N, 2, 6, 6] x) => (float[N, 5] scores) {
            [stem] s = Conv <pads = [1, 1, 1, 1]> (x, W1)
            [norm0] t = BatchNormalization (s, m_scale, m_shift, m_mean, m_var)
            [relu0] h = Relu (t)
            [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (h, W2, b2)
            [norm1] n1 = BatchNormalization (c1, n_scale, n_shift, n_mean, n_var)
            [relu1] r1 = Relu (n1)
            [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, W3, b3)
            [add] a = Add (c2, h)
            [relu2] r2 = Relu (a)
            [down] d = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r2, W4, b4)
            [relu3] r3 = Relu (d)
            [pool] g = GlobalAveragePool (r3)
            [flatten] f = Flatten (g)
            [fc] scores = Gemm <transB = 1> (f, W5, b5)
        }""",
        {
            "W1": random(4, 2, 3, 3),
            "W2": random(3, 4, 3, 3),
            "b2": random(3),
            "W3": random(4, 3, 3, 3),
            "b3": random(4),
            "W4": random(6, 4, 3, 3),
            "b4": random(6),
            "W5": random(5, 6),
            "b5": random(5),
        }
        | _normalisation("m", 4)
        | _normalisation("n", 3),
    )
    return Subject(proto, "x", (2, 6, 6), "scores")


def keras() -> Subject:
    """What tf2onnx makes of a Keras model: NHWC outside, a target shape computed from Shape, Softmax at the end."""
    proto = build(
        """keras (float[N, 6, 6, 2] image) => (float[N, 4] probabilities)
        <int64[1] first = {0}, int64[1] second = {1}, int64[1] rest = {-1}, int64 zero = {0}, int64[1] axis = {0}> {
            [enter] x = Transpose <perm = [0, 3, 1, 2]> (image)
            [conv1] c1 = Conv <auto_pad = "SAME_UPPER"> (x, W1, b1)
            [relu1] r1 = Relu (c1)
            [pool1] q1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r1)
            [leave] t = Transpose <perm = [0, 2, 3, 1]> (q1)
            [shape] shape = Shape (t)
            [gather] samples = Gather (shape, zero)
            [unsqueeze] batch = Unsqueeze (samples, axis)
            [concat] target = Concat <axis = 0> (batch, rest)
            [reshape] f = Reshape (t, target)
            [dense1] p1 = MatMul (f, W2)
            [bias1] z1 = Add (p1, b2)
            [relu2] r2 = Relu (z1)
            [dense2] p2 = MatMul (r2, W3)
            [bias2] z2 = Add (p2, b3)
            [softmax] probabilities = Softmax (z2)
        }""",
        {
            "W1": random(3, 2, 3, 3),
            "b1": random(3),
            "W2": random(27, 6),
            "b2": random(6),
            "W3": random(6, 4),
            "b3": random(4),
        },
    )
    return Subject(proto, "image", (6, 6, 2), "z2")


def acas() -> Subject:
    """The shape of the published ACAS Xu files: IR 3, opset 8, batch of 1, all initializers listed as inputs."""
    weights = {
        "mean": random(1, 1, 1, 5),
        "W1": random(5, 8),
        "b1": random(8),
        "W2": random(8, 6),
        "b2": random(6),
        "W3": random(6, 5),
        "b3": random(5),
    }
    proto = build(
        """acas (float[1, 1, 1, 5] input) => (float[1, 5] costs) {
            [centre] c = Sub (input, mean)
            [flatten] f = Flatten (c)
            [mul1] p1 = MatMul (f, W1)
            [add1] z1 = Add (p1, b1)
            [relu1] h1 = Relu (z1)
            [mul2] p2 = MatMul (h1, W2)
            [add2] z2 = Add (p2, b2)
            [relu2] h2 = Relu (z2)
            [mul3] p3 = MatMul (h2, W3)
            [add3] costs = Add (p3, b3)
        }""",
        weights,
        ir_version=3,
        opset=8,
    )
    for name, values in weights.items():
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape))
    return Subject(proto, "input", (1, 1, 5), "costs")


def attention() -> Subject:
    """Self-attention of 5 tokens, 2 heads of 4 features, as exporters write it; the mean token is classified."""
    nodes = "\n".join(
        f"p{k} = MatMul (x, W{k}) r{k} = Reshape (p{k}, split) {k} = Transpose <perm = {perm}> (r{k})"
        for k, perm in (("q", "[0, 2, 1, 3]"), ("k", "[0, 2, 3, 1]"), ("v", "[0, 2, 1, 3]"))
    )
    proto = build(
        f"""g (float[N, 5, 6] x) => (float[N, 4] y) {{
            {nodes}
            products = MatMul (q, k) scaled = Mul (products, scale) weights = Softmax <axis = -1> (scaled)
            heads = MatMul (weights, v)
            t = Transpose <perm = [0, 2, 1, 3]> (heads)
            joined = Reshape (t, join)
            [projection] o = MatMul (joined, Wo)
            mean = ReduceMean <axes = [1], keepdims = 0> (o)
            y = Gemm (mean, W) }}""",
        {
            **{f"W{k}": random(6, 8, seed=seed) for seed, k in enumerate("qkv")},
            "Wo": random(8, 6), "W": random(6, 4), "scale": np.float32(0.5),
            "split": np.int64([0, 5, 2, 4]), "join": np.int64([0, 0, 8]),
        },
    )  # fmt: skip
    return Subject(proto, "x", (5, 6), "y")


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "mlp": mlp,
    "mlp-float64": lambda: mlp(np.float64),
    "cnn": cnn,
    "residual": residual,
    "keras": keras,
    "acas": acas,
}
