"""Linear models of ai.onnx.ml written with standard operators, and maps of scores as the scores they are made of.

Exporters of scikit-learn write LinearClassifier and LinearRegressor, whose weights are attributes, behind a Scaler, and
put a ZipMap behind the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcare.graph.parameters import numbers_name
from onnxcare.graph.storage import Numbers, Storage
from onnxcare.graph.view import GraphView

_ML = "ai.onnx.ml"
_POST_TRANSFORMS = {"": "Identity", "NONE": "Identity", "LOGISTIC": "Sigmoid", "SOFTMAX": "Softmax"}
_NORMS = {"L1": "ReduceL1", "L2": "ReduceL2"}


def to_standard_operators(proto: onnx.ModelProto, stored: dict[str, Storage]) -> None:
    """Rewrite linear models, scalers, normalisers and maps of scores; note where the weights are held.

    Args:
        proto: the graph; it is changed.
        stored: how the file holds constants, by name; it is added to.
    """
    if not any(node.domain == _ML for node in proto.graph.node):
        return
    rewrite = _Rewriting(proto, stored)
    nodes = []
    for node in proto.graph.node:
        build = rewrite.builders.get(node.op_type) if node.domain == _ML else None
        built = build(node) if build is not None else None
        nodes += [node] if built is None else built
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


class _Rewriting:
    """What the builders share: the graph they read, the initializers and notes they add."""

    def __init__(self, proto: onnx.ModelProto, stored: dict[str, Storage]) -> None:
        self._proto, self._stored = proto, stored
        self._view = GraphView(proto)
        self._types = {
            info.name: info.type.tensor_type.elem_type for info in [*proto.graph.input, *proto.graph.value_info]
        }
        self.builders: dict[str, Callable[[onnx.NodeProto], list[onnx.NodeProto] | None]] = {
            "LinearClassifier": self._linear_classifier,
            "LinearRegressor": self._linear_regressor,
            "Scaler": self._scaler,
            "Normalizer": self._normalizer,
            "ZipMap": self._zip_map,
        }

    def _linear_classifier(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        known = _attributes(node)
        labels = known.get("classlabels_ints", known.get("classlabels_strings", []))
        post = _POST_TRANSFORMS.get(_text(known.get("post_transform", "")))
        coefficients = known["coefficients"]
        # One row for two classes is treated in ways of its own.
        if post is None or not labels or len(coefficients) % len(labels) or len(known.get("intercepts", [])) == 1:
            return None
        label, scores = node.output
        # The labels still come from the node itself: nobody judges them.
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        kept.name, kept.output[1] = f"{node.name}__labels", f"{scores}__unread"
        return [*([kept] if label else []), *self._product(node, len(labels), scores, post)]

    def _linear_regressor(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        known = _attributes(node)
        post = _POST_TRANSFORMS.get(_text(known.get("post_transform", "")))
        targets = known.get("targets", 1)
        if post is None or len(known["coefficients"]) % targets:
            return None
        return self._product(node, targets, node.output[0], post)

    def _product(self, node: onnx.NodeProto, outputs: int, result: str, post: str) -> list[onnx.NodeProto]:
        """Return Gemm and what comes behind it, its weights being attributes of the node."""
        nodes, x = self._as_float(node)
        operands = [x]
        for attribute, shape in (("coefficients", (outputs, -1)), ("intercepts", (-1,))):
            values = np.array(_attributes(node).get(attribute, []), np.float32)
            if values.size:
                name = numbers_name(node, attribute)
                self._constant(name, values.reshape(shape))
                self._stored[name] = replace(cast(Numbers, self._stored[name]), shape=values.reshape(shape).shape)
                operands.append(name)
        product = f"{result}__product" if post != "Identity" else result
        nodes.append(helper.make_node("Gemm", operands, [product], name=node.name, transB=1))
        if post != "Identity":
            nodes.append(helper.make_node(post, [product], [result], name=f"{node.name}__{post.lower()}"))
            if post == "Softmax":
                nodes[-1].attribute.append(helper.make_attribute("axis", 1))
        return nodes

    def _scaler(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        known = _attributes(node)
        nodes, x = self._as_float(node)
        steps = [("Sub", known.get("offset", [0.0])), ("Mul", known.get("scale", [1.0]))]
        for step, (op, values) in enumerate(steps):
            name = f"{node.name}.{op.lower()}"
            self._constant(name, np.array(values, np.float32))
            output = node.output[0] if step else f"{node.output[0]}__shifted"
            nodes.append(helper.make_node(op, [x, name], [output], name=f"{node.name}__{op.lower()}"))
            x = output
        return nodes

    def _normalizer(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        x, result = node.input[0], node.output[0]
        norm = _text(_attributes(node).get("norm", "MAX"))
        maker = self._view.producer.get(x)
        behind = self._view.nodes[maker] if maker is not None else None
        sums_to_one = behind is not None and _text(_attributes(behind).get("post_transform", "")) == "SOFTMAX"
        if norm == "L1" and sums_to_one:
            return [helper.make_node("Identity", [x], [result], name=node.name)]
        if norm == "MAX":
            return None
        nodes, x = self._as_float(node)
        size, some, least = (f"{result}__{part}" for part in ("norm", "some", "least"))
        self._constant(least, np.array(np.finfo(np.float32).tiny, np.float32))
        if self._opset < 18:
            measured = helper.make_node(_NORMS[norm], [x], [size], name=size, axes=[1])
        else:
            measured = helper.make_node(_NORMS[norm], [x, self._axes(result)], [size], name=size)
        return [
            *nodes,
            measured,
            helper.make_node("Max", [size, least], [some], name=some),
            helper.make_node("Div", [x, some], [result], name=node.name),
        ]

    def _zip_map(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        for info in self._proto.graph.output:
            if info.name == node.output[0]:
                info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, [None, None]))
        known = _attributes(node)
        labels = list(known.get("classlabels_int64s", known.get("classlabels_strings", [])))
        # onnxruntime hands over maps by their keys, and so `runtime` reads them.
        order = np.array(sorted(range(len(labels)), key=labels.__getitem__), np.int64)
        if (np.diff(order) > 0).all():
            return [helper.make_node("Identity", node.input, node.output, name=node.name)]
        name = f"{node.output[0]}__order"
        self._constant(name, order)
        return [helper.make_node("Gather", [node.input[0], name], node.output, name=node.name, axis=1)]

    def _as_float(self, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], str]:
        x = node.input[0]
        if self._types.get(x, TensorProto.FLOAT) == TensorProto.FLOAT:
            return [], x
        name = f"{node.output[0]}__float"
        return [helper.make_node("Cast", [x], [name], name=name, to=TensorProto.FLOAT)], name

    def _axes(self, result: str) -> str:
        name = f"{result}__axes"
        self._constant(name, np.array([1], np.int64))
        return name

    def _constant(self, name: str, values: np.ndarray) -> None:
        self._proto.graph.initializer.append(numpy_helper.from_array(values, name))

    @property
    def _opset(self) -> int:
        return next((item.version for item in self._proto.opset_import if item.domain in ("", "ai.onnx")), 0)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
