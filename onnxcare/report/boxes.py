"""Which boxes a drawing of a graph has: one a node, or one for several where there are too many.

Constants are no boxes, nor are nodes that only work out shapes: both would hide what the graph computes. An Add that
holds the bias of a layer belongs to the layer. In a long graph, steps that lead on to one box alone become one box with
it (a normalisation that an exporter wrote as nine nodes); beyond a bound the rest is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from onnxcare.findings.walk import subgraphs
from onnxcare.graph.layers import Layer
from onnxcare.graph.paths import SHAPE_ONLY, reads
from onnxcare.graph.view import GraphView, operator

# With more boxes than this, steps are folded.
FOLDED_FROM = 48
# More of them no browser shows in a useful way.
MOST = 800
# A tensor that more boxes read gets an arrow to the nearest one alone, unless they are close; and all arrows together
# may pass by so many rows of boxes, for placing more takes minutes.
READERS, _PASSED = 8, 4000
# So many steps become one box at most, and so far apart in the file their nodes may be.
_STEPS, _APART = 64, 256
# What a reader looks for never becomes a step among others.
_OWN_BOX = frozenset(
    "Conv ConvTranspose ConvInteger QLinearConv DeformConv Gemm MatMul MatMulInteger QLinearMatMul Einsum Attention "
    "LSTM GRU RNN If Loop Scan".split()
)


@dataclass(eq=False)
class Group:
    """Nodes that share a box.

    Attributes:
        nodes: their positions in the graph, in order.
        layer: the layer among them, if any.
    """

    nodes: list[int]
    layer: Layer | None = None


@dataclass(frozen=True)
class Boxes:
    """What is drawn of a graph.

    Attributes:
        groups: the boxes, in graph order.
        shapes: how many nodes are left out because they only work out shapes.
        beyond: how many nodes are left out at the end.
    """

    groups: Sequence[Group]
    shapes: int
    beyond: int

    @property
    def folded(self) -> list[Group]:
        """The boxes of several nodes, layers aside."""
        return [group for group in self.groups if len(group.nodes) > 1 and group.layer is None]


def boxes_of(view: GraphView, layers: Iterable[Layer], sites: Collection[str], tables: Collection[int]) -> Boxes:
    """Return the boxes of a graph.

    Args:
        view: the graph.
        layers: its layers.
        sites: tensors that must not be folded away.
        tables: positions of nodes that look vectors up.
    """
    drawn = [index for index, node in enumerate(view.nodes) if any(view.is_activation(name) for name in node.output)]
    shapes = _shape_arithmetic(view, drawn)
    groups = _with_biases(view, [index for index in drawn if index not in shapes], layers)
    if len(groups) > FOLDED_FROM:
        groups = _Folding(view, groups, sites, tables).result()
    beyond = sum(len(group.nodes) for group in groups[MOST:])
    return Boxes(groups[:MOST], len(shapes), beyond)


def without_arrows(pairs: Sequence[tuple[int, int, str]], kept: Collection[str]) -> set[tuple[int, int, str]]:
    """Return the arrows that would lead past too much: the boxes they lead to have to name what they read.

    Args:
        pairs: source, target and tensor of every arrow; boxes are numbered in graph order.
        kept: tensors that keep their arrows as long as there is room.
    """
    row: dict[int, int] = {}
    for source, target, _ in sorted(pairs, key=lambda item: item[1]):
        row[target] = max(row.get(target, 0), row.get(source, 0) + 1)
    far: dict[str, list[tuple[int, int, str]]] = {}
    passed: dict[str, int] = {}
    for pair in pairs:
        source, target, name = pair
        far.setdefault(name, []).append(pair)
        passed[name] = passed.get(name, 0) + max(0, row[target] - row.get(source, 0) - 1)
    wide = {name for name, mine in far.items() if len(mine) > READERS and passed[name] > len(mine) and name not in kept}
    room = _PASSED - sum(rows for name, rows in passed.items() if name not in wide)
    for name in sorted(passed, key=lambda name: -passed[name]):
        if room >= 0:
            break
        if name not in wide:
            wide.add(name)
            room += passed[name]
    return {pair for name in wide for pair in sorted(far[name], key=lambda item: row[item[1]])[1:]}


def _shape_arithmetic(view: GraphView, drawn: Iterable[int]) -> set[int]:
    """Return the nodes whose results follow from shapes alone, unless the model answers with them."""
    following: set[str] = set()
    found: list[int] = []
    for index in drawn:
        node = view.nodes[index]
        active = [name for name in reads(node) if view.is_activation(name)]
        if operator(node) in SHAPE_ONLY or (active and all(name in following for name in active)):
            following.update(name for name in node.output if name)
            found.append(index)
    needed = set(view.outputs)
    for index in reversed(found):
        if needed.intersection(view.nodes[index].output):
            needed |= reads(view.nodes[index])
    return {index for index in found if needed.isdisjoint(view.nodes[index].output)}


def _with_biases(view: GraphView, drawn: Iterable[int], layers: Iterable[Layer]) -> list[Group]:
    """Return a group a node, a layer together with the Add that holds its bias."""
    of_layer = {layer.node: layer for layer in layers}
    adds = {
        view.producer[layer.output]: layer.node
        for layer in of_layer.values()
        if layer.output not in view.nodes[layer.node].output
    }
    groups: dict[int, Group] = {}
    for index in drawn:
        if adds.get(index) in groups:
            groups[adds[index]].nodes.append(index)
        else:
            groups[index] = Group([index], of_layer.get(index))
    return list(groups.values())


class _Folding:
    """Makes one box of steps that lead on to one box alone."""

    def __init__(
        self, view: GraphView, groups: Sequence[Group], fixed: Collection[str], tables: Collection[int]
    ) -> None:
        self._view, self._groups, self._tables = view, groups, tables
        self._fixed = {*fixed, *view.outputs}
        of_node = {index: group for group in groups for index in group.nodes}
        self._before: dict[Group, set[Group | str]] = {group: set() for group in groups}
        self._behind: dict[Group, set[Group]] = {group: set() for group in groups}
        for group in groups:
            for name in (name for index in group.nodes for name in reads(view.nodes[index])):
                made = of_node.get(view.producer.get(name, -1))
                if made is not None and made is not group:
                    self._before[group].add(made)
                    self._behind[made].add(group)
                elif view.is_activation(name) and name not in view.producer:
                    self._before[group].add(name)

    def result(self) -> list[Group]:
        """Return the boxes, in graph order."""
        steps = [group for group in self._groups if self._is_step(group)]
        last: dict[Group, list[Group]] = {}
        taken: set[Group] = set()
        for position, start in enumerate(steps):
            if start in taken:
                continue
            region = self._region(steps[position : position + _APART], taken)
            best = max((self._closed(end, region) for end in region), key=len)
            taken.update(best)
            last[best[-1]] = best
        return [
            Group([index for member in last[group] for index in member.nodes])
            if len(last.get(group, ())) > 1
            else group
            for group in self._groups
            if group not in taken or group in last
        ]

    def _is_step(self, group: Group) -> bool:
        nodes = {index: self._view.nodes[index] for index in group.nodes}
        return group.layer is None and all(
            operator(node) and operator(node) not in _OWN_BOX and not any(subgraphs(node)) and index not in self._tables
            for index, node in nodes.items()
        )

    def _region(self, steps: Sequence[Group], taken: Collection[Group]) -> list[Group]:
        """Return the first step, and those that read nothing but what it reads and what the region makes."""
        first, *rest = steps
        region = [first]
        sources: set[Group | str] = {*self._before[first], first}
        for step in rest:
            if len(region) < _STEPS and step not in taken and self._before[step] <= sources:
                region.append(step)
                sources.add(step)
        return region

    def _closed(self, end: Group, region: Sequence[Group]) -> list[Group]:
        """Return what of a region leads to a step, if it leads nowhere else; or else the step alone."""
        found = {end}
        for step in reversed(region):
            if not self._behind[step].isdisjoint(found):
                found.add(step)
        inner = found - {end}
        written = {name for step in inner for index in step.nodes for name in self._view.nodes[index].output}
        whole = all(self._behind[step] <= found for step in inner) and written.isdisjoint(self._fixed)
        return [step for step in region if step in found] if whole else [end]
