"""What of a model repairs can get hold of, as its file tells before any data is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

from onnxcare.graph import gradients
from onnxcare.graph.layers import Layer
from onnxcare.graph.light import inferred
from onnxcare.graph.model import Model
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.sites import Site
from onnxcare.graph.view import GraphView
from onnxcare.graph.weights import Weights, find_weights
from onnxcare.graph.working import working_form

_Fact = TypeVar("_Fact")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A graph, its layers and its sites.

    Attributes:
        view: the graph, in its working form.
        parameters: its constants, by name.
        layers: what can be rewritten, and what not.
        sites: what can be intervened on.
    """

    view: GraphView
    parameters: Mapping[str, Parameter]
    layers: Sequence[Layer]
    sites: Sequence[Site]
    _facts: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: str, make: Callable[[], _Fact]) -> _Fact:
        """Return what was made under a key before, or make it: for what follows from the graph alone."""
        if key not in self._facts:
            self._facts[key] = make()
        return cast(_Fact, self._facts[key])

    @cached_property
    def open_layers(self) -> list[Layer]:
        """The layers that may be rewritten, in graph order."""
        return [layer for layer in self.layers if layer.refusal is None]

    @cached_property
    def weights(self) -> list[Weights]:
        """The weights of nodes that are no layers, in graph order."""
        known = {item.name for layer in self.layers for item in (layer.weight, layer.bias) if item is not None}
        return find_weights(self.view, self.parameters, known)

    @cached_property
    def groups(self) -> list[tuple[Parameter, ...]]:
        """The weights that a gradient may move, those of a node together and the largest first.

        Beside the layers' these are those that several nodes share, which move for all of them together, and those of
        other operators.
        """
        found: dict[Parameter, tuple[Parameter, ...]] = {}
        for layer in self.layers:
            if layer.refusal is None or layer.tied:
                bias = () if layer.bias is None else (layer.bias,)
                found.setdefault(layer.weight, (layer.weight, *bias))
        return [*found.values(), *(item.parameters for item in self.weights)]

    @cached_property
    def obstacles(self) -> Mapping[str, str | None]:
        """What stands between each of these weights and a derivative of the outputs by it, by its name."""
        paths, outputs = gradients.smooth_paths(inferred(self.view.proto)), self.view.outputs
        clear = paths.clear(outputs)
        names = (item.name for group in self.groups for item in group)
        return {name: None if name in clear else paths.obstacle(name, outputs) for name in names}


def anatomy_of(model: Model) -> Anatomy:
    """Return the anatomy of a file; external data is left where it is."""
    form = working_form(model, values=False)
    return Anatomy(form.view, form.parameters, form.layers, form.sites)
