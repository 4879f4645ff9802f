"""Operators that are not part of ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from onnxcare.findings.base import StaticFinding, counted, printable, quoted
from onnxcare.findings.walk import Scope
from onnxcare.graph.view import label

_STANDARD = {"", "ai.onnx", "ai.onnx.ml"}
_RUNTIME = "com.microsoft"

_ADVICE = "It needs a library of native code: load one only from a source you trust, or export the model without it."


def custom_domains(proto: onnx.ModelProto, found: Iterable[Scope]) -> Iterator[StaticFinding]:
    """Find operators of other domains, except functions that the file itself defines."""
    defined = {(function.domain, function.name) for function in proto.functions}
    nodes: dict[tuple[str, str], list[onnx.NodeProto]] = {}
    for scope in found:
        for node in scope.nodes:
            if node.domain not in _STANDARD and (node.domain, node.op_type) not in defined:
                nodes.setdefault((node.domain, node.op_type), []).append(node)
    for (domain, operator), users in nodes.items():
        what = f"{counted(len(users), 'node')} ({quoted(label(users[0]))}{' first' if len(users) > 1 else ''})"
        ours = domain == _RUNTIME or domain.startswith(f"{_RUNTIME}.")
        advice = "onnxruntime brings it along, other runtimes do not." if ours else _ADVICE
        message = f"{what} of operator {printable(operator)} of domain {quoted(domain)}: no part of ONNX. {advice}"
        yield StaticFinding("custom-domain", "note" if ours else "warning", label(users[0]), message)
