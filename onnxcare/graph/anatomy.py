"""What of a model repairs can get hold of, as its file tells before any data is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from onnxcare.graph import gradients
from onnxcare.graph.layers import Layer
from onnxcare.graph.light import inferred
from onnxcare.graph.model import Model
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.sites import Site
from onnxcare.graph.view import GraphView
from onnxcare.graph.working import working_form


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

    @cached_property
    def open_layers(self) -> list[Layer]:
        """The layers that may be rewritten, in graph order."""
        return [layer for layer in self.layers if layer.refusal is None]

    @cached_property
    def obstacles(self) -> Mapping[str, str | None]:
        """What stands between each open layer and a derivative of the outputs by its weights, by its name."""
        paths = gradients.smooth_paths(inferred(self.view.proto))
        return {layer.name: paths.obstacle(layer.output, self.view.outputs) for layer in self.open_layers}


def anatomy_of(model: Model) -> Anatomy:
    """Return the anatomy of a file; external data is left where it is."""
    form = working_form(model, values=False)
    return Anatomy(form.view, form.parameters, form.layers, form.sites)
