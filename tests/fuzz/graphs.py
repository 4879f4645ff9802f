"""Small random models, valid by construction: how they are put together, and how many ways there are to hold them.

What they compute is put together from the steps of `fuzz.steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray
Shape = tuple[int, ...]

# Names that other tools write, or that would collide with what surgery names.
ODD_NAMES = (
    "model/dense_1/BiasAdd:0", "onnxcare_base__{}", "{} with blanks", "x[0].{}", "gewichte.über.{}", "'{}'",
    "{}__merged", "onnxcare_relaxed__{}", "onnxcare_shape__{}", "\N{SNOWMAN}{}", "{}\n", "*{}*", "/", "a" * 300 + "{}",
)  # fmt: skip
FUNCTIONS = "care.functions"


@dataclass(frozen=True)
class Drawn:
    """A model and what it takes.

    Attributes:
        proto: the model.
        outside: initializers that lie in the file `weights.bin`.
        inputs: by name, the shape of a sample and how many whole numbers it may hold (0 for numbers with a fraction).
    """

    proto: onnx.ModelProto
    outside: bytes
    inputs: dict[str, tuple[Shape, int]]

    def samples(self, rows: int) -> dict[str, Array]:
        """Return random inputs."""
        rng = np.random.default_rng(rows)
        return {
            name: rng.integers(0, most, (rows, *shape)) if most else rng.normal(size=(rows, *shape)).astype(np.float32)
            for name, (shape, most) in self.inputs.items()
        }

    def __repr__(self) -> str:
        return f"{onnx.printer.to_text(self.proto)}\n{self.inputs}"


class Builder:
    """A model in the making.

    Attributes:
        opset: version of the operators.
        nodes: so far.
        shapes: of a sample, of every activation so far.
        inputs: see `Drawn`.
        rng: where weights come from.
    """

    def __init__(self, draw: Callable[..., Any]) -> None:
        """Draw what holds for the whole model."""
        self._draw = draw
        self.opset = self.pick([8, 7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 20, 21])
        self.nodes: list[onnx.NodeProto] = []
        self.shapes: dict[str, Shape] = {}
        self.inputs: dict[str, tuple[Shape, int]] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.rng = np.random.default_rng(self.number(0, 999))
        self.fixed = self.chance(3)  # the batch is
        self._initializers: list[onnx.TensorProto] = []
        self._oddly, self._outside = self.pick([0, 0, 0, 1]), self.pick([0, 0, 0, 0, 1])
        self._ways = self.pick([("plain",), ("constant",), ("typed", "plain"), tuple(self._all_ways())])
        self._node_names = self.pick(["numbered", "empty", "odd"])
        self._count = 0

    def _all_ways(self) -> list[str]:
        ways = ["plain", "constant", "typed", "identity", "half", "double", "shared"]
        return ways + ["quantised"] * (self.opset >= 10) + ["filled"] * (self.opset >= 9)

    # -- drawing ---------------------------------------------------------------------------------

    def pick(self, items: Sequence[Any]) -> Any:
        """Return one of some things; shrinking goes to the first."""
        return items[self.number(0, len(items) - 1)]

    def number(self, least: int, most: int) -> int:
        """Return a whole number between two."""
        return self._draw(st.integers(least, most))

    def chance(self, of: int) -> bool:
        """Return true one time of so many."""
        return self.number(0, of - 1) == of - 1

    # -- tensors ---------------------------------------------------------------------------------

    def name(self, word: str) -> str:
        """Return a name that is not taken."""
        self._count += 1
        plain = f"{word}{self._count}"
        if not (self._oddly and self.chance(2)):
            return plain
        form = self.pick(ODD_NAMES)
        return form.format(plain) if "{}" in form else f"{form}{self._count}"

    def node(
        self, op: str, inputs: Sequence[str], shape: Shape, *, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node and return its first output, of which a sample has this shape."""
        names = [self.name("t") for _ in range(outputs)]
        self.nodes.append(self._made(op, inputs, names, domain=domain, **attributes))
        self.shapes[names[0]] = shape
        return names[0]

    def _made(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
        label = {"numbered": f"{op}_{len(self.nodes)}", "empty": ""}.get(self._node_names)
        return helper.make_node(op, inputs, outputs, name=self.name(op) if label is None else label, **attributes)

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """Add a constant that is no weight, such as a shape or axes."""
        return self._held(self.name("c"), np.asarray(values, dtype), "constant" if self.chance(2) else "plain")

    def weight(self, *shape: int, scale: float | None = None, positive: bool = False) -> str:
        """Add a weight, in one of the ways this model holds them."""
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:]))) if scale is None else scale
        values = (self.rng.normal(size=shape) * scale).astype(np.float32)
        if positive:
            values = np.abs(values) + np.float32(0.5)
        name, way = self.name("w"), self.pick(self._ways)
        if way == "shared":
            alike = [item.name for item in self._initializers if tuple(item.dims) == shape and item.data_type == 1]
            return alike[0] if alike and not positive else self._held(name, values, "plain")
        if way in ("identity", "half", "double"):
            kind = {"identity": np.float32, "half": np.float16, "double": np.float64}[way]
            inner = self._held(f"{name} inner", values.astype(kind), self.pick(["plain", "constant"]))
            op, attributes = ("Identity", {}) if way == "identity" else ("Cast", {"to": TensorProto.FLOAT})
            self.nodes.append(self._made(op, [inner], [name], **attributes))
            return name
        if way == "quantised" and not positive:
            quantised = np.clip(np.rint(values * 64), -127, 127).astype(np.int8)
            inner = [self._held(f"{name} q", quantised, "plain"), self._held(f"{name} s", np.float32(1 / 64), "plain")]
            zero = [self._held(f"{name} z", np.int8(0), "plain")] if self.chance(2) else []
            self.nodes.append(self._made("DequantizeLinear", [*inner, *zero], [name]))
            return name
        if way == "filled":
            inside = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.25])
            target = self.constant(np.array(shape, np.int64))
            self.nodes.append(self._made("ConstantOfShape", [target], [name], value=inside))
            return name
        return self._held(name, values, way)

    def _held(self, name: str, values: Array, way: str) -> str:
        tensor = numpy_helper.from_array(np.asarray(values), name)
        if way == "constant":
            self.nodes.append(self._made("Constant", [], [name], value=tensor))
            return name
        if way == "typed":
            tensor = helper.make_tensor(name, tensor.data_type, tensor.dims, np.asarray(values).reshape(-1).tolist())
        self._initializers.append(tensor)
        return name

    def input(self, *shape: int, most: int = 0) -> str:
        """Add an input of the model; `most` as in `Drawn.inputs`."""
        name = self.name("x")
        self.inputs[name] = shape, most
        self.shapes[name] = shape
        return name

    def of_rank(self, rank: int) -> list[str]:
        """Return the activations whose samples have so many axes, latest first."""
        return [name for name in reversed(self.shapes) if len(self.shapes[name]) == rank]

    # -- the whole -------------------------------------------------------------------------------

    def finish(self, scores: str) -> Drawn:
        """Return the model with these scores, and maybe further outputs, in one of the ways to write it down."""
        batch = 1 if self.fixed else self.pick(["N", "batch", None])
        hidden = [name for name in self.shapes if name not in (*self.inputs, scores)]
        shown = [scores, *([self.pick(hidden)] if hidden and self.chance(4) else [])]
        if self.chance(8):
            shown.reverse()

        def info(name: str, whole: bool = False) -> onnx.ValueInfoProto:
            kind = TensorProto.INT64 if whole else TensorProto.FLOAT
            return helper.make_tensor_value_info(name, kind, [batch, *self.shapes[name]])

        inputs = [info(name, whole=most > 0) for name, (_, most) in self.inputs.items()]
        if self.chance(5):
            self._held(self.name("unused"), np.zeros((2, 3), np.float32), "plain")
        ir_version = self.pick([8, 10, 9, 7, 6, 5, 4, 3])
        # Functions came with version 8; before version 4 every initializer was an input, and branches have none.
        branches = any(node.op_type == "If" for node in self.nodes)
        ir_version = max(ir_version, 8 if self.functions else 4 if branches else 3)
        if ir_version == 3 or self.chance(8):
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self._initializers]
        graph = helper.make_graph(
            self.nodes, self.name("g"), inputs, [info(name) for name in shown], self._initializers
        )
        proto = helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", self.opset)])
        proto.functions.extend(self.functions)
        if self.functions:
            proto.opset_import.append(helper.make_opsetid(FUNCTIONS, 1))
        if self.chance(3):
            proto = onnx.shape_inference.infer_shapes(proto)
        if self.chance(4):
            proto.metadata_props.add(key="author", value="someone")
            proto.doc_string = proto.graph.doc_string = proto.graph.node[0].doc_string = "a note"
        return Drawn(proto, self._move_outside(proto) if self._outside else b"", self.inputs)

    @staticmethod
    def _move_outside(proto: onnx.ModelProto) -> bytes:
        """Move initializers into a sidecar file; return what it holds."""
        held = b""
        for tensor in proto.graph.initializer:
            if (
                tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) > 16
            ):  # shapes and scales have to lie inside
                tensor.data_location = TensorProto.EXTERNAL
                where = {"location": "weights.bin", "offset": str(len(held)), "length": str(len(tensor.raw_data))}
                for key, value in where.items():
                    tensor.external_data.add(key=key, value=value)
                held += tensor.raw_data
                tensor.ClearField("raw_data")
        return held
