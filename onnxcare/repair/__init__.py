"""Repair methods: a new one is a new module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from importlib import import_module

from onnxcare.case import Case
from onnxcare.errors import UsageError, nearest
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.graph.sites import Site
from onnxcare.locators import chosen
from onnxcare.repair.base import Repair

# Modules with functions `repair(case, [locators]) -> Repair` and `hindrance(anatomy, layer) -> str | None`, by the name
# of the method. One that works on units otherwise than through the layers around them also has `hindrance_at(site)`,
# and one that changes further nodes together with layers `beside_layers(anatomy)`.
METHODS = {
    "auto": "onnxcare.repair.auto",
    "care": "onnxcare.repair.care",
    "ai-lancet-flip": "onnxcare.repair.flip",
    "ai-lancet-finetune": "onnxcare.repair.neuron_finetune",
    "clp": "onnxcare.repair.clp",
    "fine-pruning": "onnxcare.repair.fine_pruning",
    "fine-tuning": "onnxcare.repair.network_finetune",
}
# Those that find by themselves what to change.
WITHOUT_LOCATOR = ("auto", "clp", "fine-pruning", "fine-tuning")


def find(method: str, locator: str = "auto") -> Callable[[Case], Repair]:
    """Return the function that carries out a method on what a locator finds; `auto` stands for the method's own.

    Raises:
        UsageError: there is no such method or locator, or the method needs none.
    """
    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    function: Callable[..., Repair] = import_module(METHODS[method]).repair
    if locator == "auto":
        return function
    locators: Sequence[str] = chosen(locator)
    if method in WITHOUT_LOCATOR:
        able = ", ".join(name for name in METHODS if name not in WITHOUT_LOCATOR)
        raise UsageError(f"--locator {locator}: --method {method} does not go by units; it goes with {able}")
    return partial(function, locators=locators)


def hindrances(anatomy: Anatomy, layer: Layer) -> dict[str, str | None]:
    """Return why each method cannot change a layer, None for those that can, by the name of the method."""
    return {method: import_module(name).hindrance(anatomy, layer) for method, name in METHODS.items()}


def changing_beside_layers(anatomy: Anatomy, outputs: Collection[str]) -> list[str]:
    """Return the methods that change a node which is no layer, but goes with one; it is known by what it writes."""
    modules = {method: import_module(name) for method, name in METHODS.items()}
    able = {method: module for method, module in modules.items() if hasattr(module, "beside_layers")}
    beside = {method: anatomy.once(method, partial(module.beside_layers, anatomy)) for method, module in able.items()}
    return [method for method, written in beside.items() if not set(outputs).isdisjoint(written)]


def hindrances_at(anatomy: Anatomy, site: Site) -> dict[str, str | None]:
    """Return why each method cannot change what a site's units do, None for those that can, by the name of the method.

    Most of them do it by changing a layer that writes or reads the units.
    """
    around = [layer for layer in anatomy.layers if layer.name in {*site.writers, *(item.name for item in site.readers)}]
    found = {}
    for method, name in METHODS.items():
        module = import_module(name)
        if hasattr(module, "hindrance_at"):
            found[method] = module.hindrance_at(site)
        else:
            found[method] = _first_hindrance(module.hindrance(anatomy, layer) for layer in around)
    return found


def _first_hindrance(reasons: Iterable[str | None]) -> str | None:
    """Return None where one of the reasons is none, else the first."""
    known = list(reasons)
    return None if None in known else known[0]
