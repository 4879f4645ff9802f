"""Repair methods: a new one is a new module and a line here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from onnxcare.case import Case
from onnxcare.errors import UsageError, nearest
from onnxcare.repair.base import Repair

# Modules with a function `repair(case) -> Repair`, by the name of the method.
METHODS = {
    "auto": "onnxcare.repair.auto",
    "care": "onnxcare.repair.care",
}


def find(method: str) -> Callable[[Case], Repair]:
    """Return the function that carries out a method.

    Raises:
        UsageError: there is no such method.
    """
    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    function: Callable[[Case], Repair] = import_module(METHODS[method]).repair
    return function
