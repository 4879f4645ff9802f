"""Recurrent nodes (LSTM, GRU, RNN), looked at as matrix products, one for every direction.

What a step adds up in front of its activation functions is linear in what comes in:

    gates[t] = [x[t], h[t - 1], 1] @ M        M of shape [inputs + units (+ 1), gates * units]

but for the candidate state of a GRU, which the state of the step before reaches only through the reset gate: there x
and the bias alone may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, helper

from onnxcare.graph.parameters import Parameter
from onnxcare.graph.view import GraphView, attribute, operator

Array = np.ndarray

STEPS, STATES, START, LENGTHS = "onnxcare_steps", "onnxcare_states", "onnxcare_start", "onnxcare_lengths"
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_BACKWARDS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


@dataclass(frozen=True)
class Recurrent:
    """A recurrent node with constant weights.

    Attributes:
        name: label of the node.
        operator: `LSTM`, `GRU` or `RNN`.
        outputs: the names of the node's outputs.
        weight: what it multiplies inputs with, [directions, gates * units, inputs].
        recurrence: what it multiplies states with, [directions, gates * units, units].
        bias: [directions, 2 * gates * units], or None where it has none.
        backwards: for every direction, whether it goes through the steps from the last to the first.
        refusal: why its weights cannot be rewritten; None if they can.
    """

    name: str
    operator: str
    outputs: tuple[str, ...]
    weight: Parameter
    recurrence: Parameter
    bias: Parameter | None
    backwards: tuple[bool, ...]
    refusal: str | None = None

    @property
    def inputs(self) -> int:
        """Number of features of a step."""
        return self.weight.shape[2]

    @property
    def units(self) -> int:
        """Number of units of a direction's state."""
        return self.recurrence.shape[2]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its weights and its bias."""
        return tuple(p for p in (self.weight, self.recurrence, self.bias) if p is not None)

    @property
    def features(self) -> int:
        """Number of rows of a direction's matrix."""
        return self.inputs + self.units + (self.bias is not None)

    def blocks(self) -> Iterator[tuple[Array, slice]]:
        """Yield the rows of the matrix that may change for some of its columns, and these columns."""
        everything = np.arange(self.features)
        free = 2 if self.operator == "GRU" else _GATES[self.operator]
        yield everything, slice(0, free * self.units)
        if self.operator == "GRU":
            past = (everything >= self.inputs) & (everything < self.inputs + self.units)
            yield everything[~past], slice(free * self.units, None)

    def rows(self, steps: Array, states: Array) -> Array:
        """Return what comes in at every step of every sample, as rows of a direction's matrix product.

        Args:
            steps: [samples, steps, inputs].
            states: the states of the steps before, [samples, steps, units].

        Returns:
            [samples, steps, features].
        """
        parts = [steps, states]
        if self.bias is not None:
            parts.append(np.ones((*steps.shape[:2], 1), steps.dtype))
        return np.concatenate(parts, axis=2)

    def matrix(self, values: Mapping[Parameter, Array], direction: int) -> Array:
        """Return a direction's matrix, [features, gates * units]."""
        parts = [values[self.weight][direction].T, values[self.recurrence][direction].T]
        if self.bias is not None:
            parts.append(values[self.bias][direction].reshape(2, -1).sum(axis=0, keepdims=True))
        return np.concatenate(parts)

    def add(self, change: Array, values: Mapping[Parameter, Array]) -> dict[Parameter, Array]:
        """Return the new values of the parameters after a change of the matrices, [directions, features, columns]."""
        weight, recurrence = change[:, : self.inputs], change[:, self.inputs : self.inputs + self.units]
        new = {
            self.weight: values[self.weight] + weight.transpose(0, 2, 1),
            self.recurrence: values[self.recurrence] + recurrence.transpose(0, 2, 1),
        }
        if self.bias is not None:
            # The bias of the inputs, which a GRU's reset gate does not touch.
            added = np.concatenate([change[:, -1], np.zeros_like(change[:, -1])], axis=1)
            new[self.bias] = values[self.bias] + added
        return new

    def before(self, states: Array, start: Array, lengths: Array, direction: int) -> Array:
        """Return the states of the steps before.

        Args:
            states: the state after every step, [samples, steps, directions, units].
            start: the states in front of the first step, [samples, directions, units].
            lengths: how many steps each sample has.
            direction: which direction.

        Returns:
            [samples, steps, units].
        """
        after, first = states[:, :, direction], start[:, direction][:, None]
        if not self.backwards[direction]:
            return np.concatenate([first, after[:, :-1]], axis=1)
        before = np.concatenate([after[:, 1:], first], axis=1)
        last = np.arange(after.shape[1]) == lengths[:, None] - 1
        return np.where(last[..., None], first, before)


def find_recurrent(view: GraphView, parameters: Mapping[str, Parameter]) -> list[Recurrent]:
    """Return the recurrent nodes of the main graph in graph order, those that cannot be rewritten included.

    Args:
        view: the graph.
        parameters: its constants, by name.
    """
    found = []
    for index, node in enumerate(view.nodes):
        if operator(node) not in _GATES:
            continue
        weight, recurrence = parameters.get(node.input[1]), parameters.get(node.input[2])
        name = node.input[3] if len(node.input) > 3 else ""
        if weight is None or recurrence is None or (name and name not in parameters):
            continue
        item = Recurrent(
            name=view.label(index),
            operator=node.op_type,
            outputs=tuple(node.output),
            weight=weight,
            recurrence=recurrence,
            bias=parameters[name] if name else None,
            backwards=_BACKWARDS[str(attribute(node, "direction", "forward")).lower()],
        )
        found.append(_with_refusal(item))
    return found


def _with_refusal(item: Recurrent) -> Recurrent:
    """Refuse shared and non-float weights by name."""
    for parameter in item.parameters:
        if len(parameter.users) > 1:
            others = [user for user in parameter.users if user != item.name]
            who = others[0] if others else f"{item.name} again"
            return replace(item, refusal=f"its weight {parameter.name!r} is also used by {who}")
        if parameter.storage.refusal is not None:
            return replace(item, refusal=f"its weight {parameter.name!r} {parameter.storage.refusal}")
    return item


def with_steps(copy: onnx.ModelProto, item: Recurrent) -> tuple[onnx.ModelProto, list[str]]:
    """Return the model with tensors that show what a recurrent node reads and keeps, samples on axis 0.

    Returns:
        The model, and which of these it has: STEPS [samples, steps, inputs], STATES [samples, steps, directions,
        units], START [samples, directions, units] and LENGTHS [samples].
    """
    shown = onnx.ModelProto()
    shown.CopyFrom(copy)
    node = next(n for n in shown.graph.node if operator(n) == item.operator and tuple(n.output) == item.outputs)
    if not node.output[0]:
        node.output[0] = f"{STATES}__{item.outputs[-1]}"
    # Samples lie behind the steps and directions; the other layout onnxruntime does not load.
    added = [_turned(node.input[0], STEPS, (1, 0, 2)), _turned(node.output[0], STATES, (2, 0, 1, 3))]
    if len(node.input) > 5 and node.input[5]:
        added.append(_turned(node.input[5], START, (1, 0, 2)))
    if len(node.input) > 4 and node.input[4]:
        added.append(helper.make_node("Identity", [node.input[4]], [LENGTHS]))
    shown.graph.node.extend(added)
    return shown, [n.output[0] for n in added]


def _turned(tensor: str, name: str, axes: tuple[int, ...]) -> NodeProto:
    return helper.make_node("Transpose", [tensor], [name], perm=axes)
