"""Switches in the graph: nodes that let a test on raw input values decide about what the model computes.

A backdoor can be built out of ordinary operators, for example

    Slice(input) -> Greater(constant) -> Where(., target scores, scores)

or with arithmetic in place of Where, or with an If. It is not in the weights, so nothing that looks at weights finds
it, and no repair of weights cures it. The graph is followed from its inputs (`flow`), and where a truth about raw
values meets something else there is a *choice*, which is the graver the more it decides about:

    learned values or whole inputs, by a single truth                 error
    parts of inputs, by a single truth                                warning
    learned values, by arithmetic that can act as a switch, or by a
    comparison of a whole input with zero, as for silence             warning
    learned values, by a truth about every position, as in a mask     note
    learned values, by an input that no layer takes as data           note

Element-wise functions written with comparisons (activations, thresholds, filled gaps) and guards against dividing by
zero are no choices. What is not found: tests behind a learned layer, and tests folded into weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx

from onnxcare.findings.base import Level, StaticFinding, counted, printable, quoted
from onnxcare.findings.extent import is_single
from onnxcare.findings.families import ELEMENTWISE, LINEAR, is_known, kind
from onnxcare.findings.flow import FIXED, LEARNED, Flow, follow, joined
from onnxcare.findings.walk import names_read, ordered, subgraphs
from onnxcare.graph.view import label

# Functions that call functions can stand for any number of nodes.
_MOST_NODES = 300_000
_DEEPEST = 40

_CURE = "repairing weights cannot cure it"


@dataclass(frozen=True)
class Choice:
    """A node where a truth about raw values decides.

    Attributes:
        where: name of the node.
        operator: its operator.
        truth: what decides.
        about: what it decides about: `learned` values, `whole` inputs, or a `part` of them.
    """

    where: str
    operator: str
    truth: Flow
    about: Literal["learned", "whole", "part"]

    def level(self, data: set[str]) -> Level | None:
        """Return how grave the choice is, where a layer takes these inputs as data; None for a harmless one."""
        truth = self.truth
        if not truth.inputs & data or not truth.single:
            return "note" if self.about == "learned" else None
        doubtful = truth.truth == "step" or (truth.guard and not truth.picked)
        if self.about == "learned":
            return "warning" if doubtful else "error"
        if doubtful:
            return None
        return "error" if self.about == "whole" and truth.picked else "warning"


def input_switches(proto: onnx.ModelProto) -> list[StaticFinding]:
    """Find the nodes at which the model switches on raw input values: one finding for every test."""
    tracer = _Tracer(proto)
    try:
        tracer.model(proto.graph)
    except _TooLargeError:
        message = (
            "The graph is too large, or its functions and branches are nested too deeply, to be searched for switches "
            "on input values. Do not deploy it unless you know why it is so."
        )
        return [StaticFinding("not-checked", "error", "", message)]
    data = tracer.data or {name for choice in tracer.choices for name in choice.truth.inputs}
    groups: dict[tuple[Level, str], list[Choice]] = {}
    for choice in tracer.choices:
        if level := choice.level(data):
            # Masks are built anew in every layer.
            test = ", ".join(sorted(choice.truth.inputs)) if level == "note" else choice.truth.test
            groups.setdefault((level, test), []).append(choice)
    return [_told(level, choices, data) for (level, _), choices in groups.items()]


def _told(level: Level, choices: list[Choice], data: set[str]) -> StaticFinding:
    first = choices[0]
    inputs = " and ".join(quoted(name) for name in sorted(first.truth.inputs))
    subject = f"{printable(first.operator)} node {quoted(first.where)}"
    if more := len({choice.where for choice in choices}) - 1:
        subject += f" (and {counted(more, 'other')})"
    test = f"{quoted(first.truth.test)} tests raw values of input {inputs}"
    if not first.truth.inputs & data:
        message = (
            f"{subject} switches on input {inputs}, which no layer takes as data: an option or a mask. "
            "Make sure that only your own code sets it."
        )
    elif level == "note":
        message = (
            f"{subject} masks single positions: {test}. Padding masks do this; make sure that the value tested "
            f"is padding, for a trigger on one value would look the same, and {_CURE}."
        )
    elif level == "warning":
        message = (
            f"{test}, and {subject} acts on the result. Preprocessing may do this, and so does a backdoor in the "
            f"graph, which is not in the weights, so that {_CURE}: find out what the test is for."
        )
    else:
        message = (
            f"{test} with no learned layer in between, and {subject} lets the result decide what the model answers. "
            f"This is how a backdoor in the graph is built; it is not in the weights, so that {_CURE}. Do not deploy "
            "the model unless you know what the test is for."
        )
    return StaticFinding("input-switch", level, first.where, message)


class _TooLargeError(Exception):
    pass


class _Tracer:
    """Follows a model from its inputs to its outputs, into branches and functions.

    Attributes:
        choices: the choices met on the way.
        data: names of the inputs that some layer takes as data.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.choices: list[Choice] = []
        self.data: set[str] = set()
        self._functions = {(function.domain, function.name): function for function in proto.functions}
        self._nodes = 0
        self._depth = 0

    def model(self, graph: onnx.GraphProto) -> None:
        """Follow a main graph."""
        # Files of old list every initializer as an input, too.
        self.graph(graph, [_input(info) for info in graph.input], {})

    def graph(self, graph: onnx.GraphProto, inputs: Sequence[Flow], outside: Mapping[str, Flow]) -> list[Flow]:
        """Return what the outputs of a graph rest on."""
        known = dict(outside)
        known.update(zip((info.name for info in graph.input), inputs, strict=False))
        known.update((tensor.name, Flow(constant=tensor)) for tensor in graph.initializer)
        known.update((sparse.values.name, FIXED) for sparse in graph.sparse_initializer)
        return self._body(list(graph.node), [info.name for info in graph.output], known)

    def _body(self, nodes: list[onnx.NodeProto], outputs: list[str], known: dict[str, Flow]) -> list[Flow]:
        self._depth += 1
        self._nodes += len(nodes)
        if self._depth > _DEEPEST or self._nodes > _MOST_NODES:
            raise _TooLargeError
        for node in ordered(nodes, outputs):
            operands = [known.get(name, FIXED) for name in node.input]
            known.update(zip(node.output, self._node(node, operands, known), strict=False))
        self._depth -= 1
        return [known.get(name, FIXED) for name in outputs]

    def _node(self, node: onnx.NodeProto, operands: list[Flow], known: Mapping[str, Flow]) -> list[Flow]:
        function = self._functions.get((node.domain, node.op_type))
        if function is not None:
            bound = dict(zip(function.input, operands, strict=False))
            return self._body(list(function.node), list(function.output), bound)
        if graphs := list(subgraphs(node)):
            return self._control(node, graphs, operands, known)
        self._note_data(node, operands)
        self._meet(node, operands)
        return [follow(node, operands, name) for name in node.output]

    def _control(
        self, node: onnx.NodeProto, graphs: list[onnx.GraphProto], operands: list[Flow], known: Mapping[str, Flow]
    ) -> list[Flow]:
        """Follow branches and bodies; their condition decides about everything that comes out of them."""
        name = kind(node)
        inner = {name: known[name] for name in names_read(node) if name in known}
        if name == "Loop":  # the body gets a number and a condition first, and hands the condition back
            carried = [replace(flow, constant=None, varying=not flow.raw) for flow in operands[2:]]
            results = [
                self.graph(graph, [Flow(positions=True, varying=True), FIXED, *carried], inner)[1:] for graph in graphs
            ]
            results.append(carried)
            conditions = operands[:2]
        else:
            results = [self.graph(graph, operands if name == "Scan" else [], inner) for graph in graphs]
            conditions = operands[:1] if name == "If" else []
        if name not in ("If", "Loop", "Scan"):
            self._note_data(node, operands)
            return [LEARNED] * len(node.output)
        merged = [
            joined([result[position] for result in results if position < len(result)], output)
            for position, output in enumerate(node.output)
        ]
        truths = [replace(condition, single=True) for condition in conditions if condition.truth]
        for truth in truths:
            self._choose(node, truth, merged)
        return [truths[0] if truths and flow == FIXED else flow for flow in merged]

    def _note_data(self, node: onnx.NodeProto, operands: Sequence[Flow]) -> None:
        name = kind(node)
        product = name in LINEAR and not any(flow.learned for flow in operands)
        look_up = name.startswith("Gather") and bool(operands) and not (operands[0].raw or operands[0].learned)
        if product or look_up or not is_known(node):
            for flow in operands:
                self.data |= flow.inputs

    def _meet(self, node: onnx.NodeProto, operands: Sequence[Flow]) -> None:
        others = [flow for flow in operands if not flow.truth and (flow.raw or flow.learned)]
        # Features side by side decide nothing; and moving raw values around by others is no decision, either.
        if kind(node) == "Concat" or not (kind(node) in ELEMENTWISE or any(flow.learned for flow in others)):
            return
        for truth in operands:
            if truth.truth:
                self._choose(node, truth, others)

    def _choose(self, node: onnx.NodeProto, truth: Flow, others: Sequence[Flow]) -> None:
        about: Literal["learned", "whole", "part"]
        if any(flow.learned for flow in others):
            about = "learned"
        elif all(flow.root == truth.root for flow in others if flow.raw):
            return  # constants only, or a function of the very value that is tested
        else:
            about = "part" if all(flow.single for flow in others if flow.raw) else "whole"
        self.choices.append(Choice(label(node), node.op_type, truth, about))


def _input(info: onnx.ValueInfoProto) -> Flow:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        return LEARNED  # sequences and maps
    extents = None
    if tensor.HasField("shape"):
        extents = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    # A lone axis may count samples or positions.
    single = extents is not None and is_single(extents) and (len(extents) != 1 or extents[0] == 1)
    truth: Literal["", "test"] = "test" if tensor.elem_type == onnx.TensorProto.BOOL else ""
    return Flow(
        inputs=frozenset([info.name]),
        truth=truth,
        test=info.name if truth else "",
        picked=single,
        single=single,
        root=info.name,
        extents=extents if extents and len(extents) > 1 and all(e is None or e >= 0 for e in extents) else None,
    )
