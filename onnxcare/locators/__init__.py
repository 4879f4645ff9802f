"""Locators: which hidden units, or weights, carry the misbehaviour."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcare.errors import UsageError, nearest

# Every one ranks the units of a site; `differential` also ranks the single weights of a layer.
LOCATORS = ("causal", "interchange", "differential")
# What AI-Lancet's repairs go by unless told otherwise.
DEFAULT_OF_WEIGHTS = ("differential",)


def chosen(locator: str, default: Sequence[str] = LOCATORS) -> Sequence[str]:
    """Return the locators that a name stands for; `auto` lets all of the default ones compete.

    Raises:
        UsageError: there is no such locator.
    """
    if locator == "auto":
        return default
    if locator not in LOCATORS:
        raise UsageError(f"{locator}: unknown locator{nearest(locator, LOCATORS)}; known: auto, {', '.join(LOCATORS)}")
    return (locator,)
