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
    def tunable_layers(self) -> list[Layer]:
        """The layers whose weights may change, if only together with those of others, in graph order."""
        return [layer for layer in self.layers if layer.refusal is None or layer.tied]

    @cached_property
    def obstacles(self) -> Mapping[str, str | None]:
        """What stands between each tunable layer and a derivative of the outputs by its weights, by its name."""
        paths, outputs = gradients.smooth_paths(inferred(self.view.proto)), self.view.outputs
        clear = paths.clear(outputs)
        return {
            layer.name: None if layer.output in clear else paths.obstacle(layer.output, outputs)
            for layer in self.tunable_layers
        }


def anatomy_of(model: Model) -> Anatomy:
    """Return the anatomy of a file; external data is left where it is."""
    form = working_form(model, values=False)
    return Anatomy(form.view, form.parameters, form.layers, form.sites)
