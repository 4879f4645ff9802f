"""Repair methods: a new one is a new module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from onnxcare.case import Case
from onnxcare.errors import UsageError, nearest
from onnxcare.locators import chosen
from onnxcare.repair.base import Repair

# Modules with a function `repair(case, [locators]) -> Repair`, by the name of the method.
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
