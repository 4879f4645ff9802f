"""The models: onnx's own backend tests, the sample models, and what else lies in a folder.

Operator tests hold no weights: what their operators work with is fed. So each of them is a model once as it is, and
once with all inputs but the first held in the file, in all the ways in which a file can hold a tensor.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SAMPLES = Path(__file__).parent.parent.parent / "sample_models"
# More models, such as those of an older onnx, which Debian packages.
FURTHER = os.environ.get("ONNXCARE_CORPUS", "/usr/share/libonnx-testdata/data")


@dataclass(frozen=True)
class Entry:
    """A model file: where it is from, its name there, its bytes, and the files of external data beside it."""

    source: str
    name: str
    data: bytes
    beside: Mapping[str, bytes] = field(default_factory=dict)


def entries(every: int = 1) -> Iterator[Entry]:
    """Yield every model, or those of every so manieth group of operator tests and every so manieth file."""
    shipped = Path(onnx.__file__).parent / "backend/test/data"
    yield from _files("shipped with onnx", shipped, every)
    yield from _files("samples", SAMPLES, 1)
    for folder in filter(None, FURTHER.split(os.pathsep)):
        yield from _files(Path(folder).parent.name, Path(folder), every)
    for index, case in enumerate(_operator_tests(every)):
        yield Entry("operator tests", case.name, case.model.SerializeToString())
        holding = _holding_inputs(case, index)
        if holding is not None:
            yield Entry("the same, inputs held", case.name, holding.SerializeToString())


def _files(source: str, folder: Path, every: int) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*.onnx"))[::every]:
        proto = onnx.load(path, load_external_data=False)
        outside = {
            item.value for tensor in proto.graph.initializer for item in tensor.external_data if item.key == "location"
        }
        beside = {name: (path.parent / name).read_bytes() for name in sorted(outside)}
        yield Entry(source, str(path.relative_to(folder)), path.read_bytes(), beside)


def _operator_tests(every: int) -> list[Any]:
    """Return onnx's operator tests; importing a module makes them and, which takes long for some, their data."""
    from onnx.backend.test.case import node as cases

    modules = sorted(found.name for found in pkgutil.walk_packages(cases.__path__, f"{cases.__name__}."))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name in modules[every // 2 :: every]:
            importlib.import_module(name)
    return [case for case in cases._NodeTestCases if case.model is not None]


# -- operator tests that hold their weights --------------------------------------------------------


def _holding_inputs(case: Any, index: int) -> onnx.ModelProto | None:
    """Return a test's model with all inputs but the first inside; None where it has none, or they are no tensors."""
    values = case.data_sets[0][0]
    infos = list(case.model.graph.input)
    if len(values) != len(infos):
        return None
    held = []
    for info, value in list(zip(infos, values, strict=True))[1:]:
        if not isinstance(value, np.ndarray):
            continue
        tensor = numpy_helper.from_array(value, info.name)
        if tensor.data_type == info.type.tensor_type.elem_type:
            held.append(tensor)
    if not held:
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    return _WAYS[index % len(_WAYS)](proto, held)


def _as_initializers(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    proto.graph.initializer.extend(held)
    if proto.ir_version > 3:
        _feed_no_more(proto, held)
    return proto


def _in_typed_fields(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    return _as_initializers(proto, [_typed(tensor) for tensor in held])


def _as_defaults(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    """Leave them inputs as well, so that they may be fed."""
    proto.graph.initializer.extend(held)
    return proto


def _as_constants(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    for tensor in held:
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    _feed_no_more(proto, held)
    return proto


def _in_a_branch(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    """Move the whole graph into both branches of an If; its inputs are captured."""
    outputs = list(proto.graph.output)
    branches = []
    for word in ("then", "else"):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
        for node in nodes:
            for names in (node.input, node.output):
                kept = {info.name for info in proto.graph.input} - {tensor.name for tensor in held}
                names[:] = [name if not name or name in kept else f"{word} {name}" for name in names]
        inside = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in held]
        for tensor in inside:
            tensor.name = f"{word} {tensor.name}"
        given = [onnx.ValueInfoProto(name=f"{word} {info.name}", type=info.type) for info in outputs]
        branches.append(helper.make_graph(nodes, word, [], given, inside))
    _feed_no_more(proto, held)
    del proto.graph.node[:]
    names = [info.name for info in outputs]
    proto.graph.node.append(
        helper.make_node("If", ["onnxcare test"], names, then_branch=branches[0], else_branch=branches[1])
    )
    proto.graph.initializer.append(helper.make_tensor("onnxcare test", TensorProto.BOOL, [], [True]))
    _import_default(proto)
    return proto


def _in_a_function(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    """Move the whole graph into a function of the model's own."""
    _feed_no_more(proto, held)
    _import_default(proto)
    inputs = [info.name for info in proto.graph.input]
    outputs = [info.name for info in proto.graph.output]
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in held]
    nodes = [*constants, *proto.graph.node]
    function = helper.make_function("care.test", "Body", inputs, outputs, nodes, list(proto.opset_import))
    del proto.graph.node[:]
    proto.graph.node.append(helper.make_node("Body", inputs, outputs, domain="care.test"))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("care.test", 1))
    proto.ir_version = max(8, proto.ir_version)
    return proto


_WAYS: tuple[Callable[[onnx.ModelProto, list[onnx.TensorProto]], onnx.ModelProto], ...] = (
    _as_initializers,
    _in_typed_fields,
    _as_constants,
    _as_defaults,
    _in_a_branch,
    _in_a_function,
)


def _feed_no_more(proto: onnx.ModelProto, held: list[onnx.TensorProto]) -> None:
    names = {tensor.name for tensor in held}
    kept = [info for info in proto.graph.input if info.name not in names]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)


def _import_default(proto: onnx.ModelProto) -> None:
    if not any(item.domain in ("", "ai.onnx") for item in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("", 13))


def _typed(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a tensor whose values lie in the field of their type, where that has one."""
    values = numpy_helper.to_array(tensor)
    if tensor.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64):
        return tensor
    return helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.reshape(-1).tolist())
