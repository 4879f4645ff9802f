"""Functions of a model's own, which call each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx

_Key = tuple[str, str, str]


def inlined_size(proto: onnx.ModelProto, most: int) -> int:
    """Return how many nodes a model has where every call of its functions stands for the function's own nodes.

    A few functions that call each other twice stand for more nodes than fit into any memory.

    Args:
        proto: the model.
        most: counting ends here; more than this many nodes count as one more.
    """
    main: _Key = ("", "", "")
    calls = {_key(item.domain, item.name, item.overload): _called(item.node) for item in proto.functions}
    calls[main] = _called(proto.graph.node)
    sizes: dict[_Key, int] = {}
    stack, entered = [main], set[_Key]()
    while stack:
        key = stack[-1]
        waiting = [] if key in entered else [called for called in calls[key] if called in calls and called not in sizes]
        entered.add(key)
        if waiting:
            stack += waiting
            continue
        # What is entered and has no size yet calls itself, which runtimes refuse.
        counted = sum(count * sizes.get(called, 1) for called, count in calls[key].items())
        sizes[key] = min(counted, most + 1)
        stack.pop()
    return sizes[main]


def _called(nodes: Iterable[onnx.NodeProto]) -> Counter[_Key]:
    """Return the operators of nodes, those inside their branches and bodies included, and how often they come."""
    found: Counter[_Key] = Counter()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        found[_key(node.domain, node.op_type, node.overload)] += 1
        for item in node.attribute:
            if item.HasField("g"):
                pending += item.g.node
            for graph in item.graphs:
                pending += graph.node
    return found


def _key(domain: str, name: str, overload: str) -> _Key:
    return ("" if domain == "ai.onnx" else domain), name, overload
