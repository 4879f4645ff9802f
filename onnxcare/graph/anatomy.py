"""What of a model repairs can get hold of, as its file tells before any data is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

from onnx import inliner

from onnxcare.graph import gradients
from onnxcare.graph.layers import Layer, find_layers
from onnxcare.graph.light import inferred
from onnxcare.graph.model import Model
from onnxcare.graph.parameters import Parameter, find_parameters
from onnxcare.graph.sites import Site, find_sites
from onnxcare.graph.view import GraphView

_Fact = TypeVar("_Fact")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A graph, its layers and its sites.

    Attributes:
        view: the graph.
        layers: what can be rewritten, and what not.
        sites: what can be intervened on.
    """

    view: GraphView
    layers: Sequence[Layer]
    sites: Sequence[Site]
    _facts: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: str, make: Callable[[], _Fact]) -> _Fact:
        """Return what was made under a key before, or make it: for what follows from the graph alone."""
        if key not in self._facts:
            self._facts[key] = make()
        return cast(_Fact, self._facts[key])

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The constants of the graph, by name."""
        return find_parameters(self.view)

    @cached_property
    def open_layers(self) -> list[Layer]:
        """The layers that may be rewritten, in graph order."""
        return [layer for layer in self.layers if layer.refusal is None]

    @cached_property
    def obstacles(self) -> Mapping[str, str | None]:
        """What stands between each open layer and a derivative of the outputs by its weights, by its name."""
        model = inferred(self.view.proto)
        if model.functions:
            with contextlib.suppress(Exception):  # then they count as operators that nobody knows
                model = inliner.inline_local_functions(model)
        paths = gradients.smooth_paths(model)
        outputs = self.view.outputs
        clear = paths.clear(outputs)
        return {
            layer.name: None if layer.output in clear else paths.obstacle(layer.output, outputs)
            for layer in self.open_layers
        }


def anatomy_of(model: Model) -> Anatomy:
    """Return the anatomy of a file; external data is left where it is."""
    view = GraphView(model.proto)
    layers = find_layers(view)
    return Anatomy(view, layers, find_sites(view, layers))
