"""Whether onnxruntime's graph optimisations change what a model answers.

Optimisations fuse and reorder arithmetic, so that answers differ by rounding. With eps the spacing of the output's
floats at 1, an answer y of a sample differs beyond rounding where

    |y - y'| > 1000 eps max(1, max |y|)           the largest |y| is that of the sample

which for float32 is 1e-4 of the sample's largest value. Rounding grows with depth and cancellation: 1 to 50 eps were
measured on classifiers and detectors, 210 eps on a network with logarithms. For half precision, of which a thousand
roundings would be a whole, the bound is 2 %. Quantised models round activations to 8 bits, and a rounding error in
front of such a step may become a whole step, layer after layer: up to 4 % was measured on detectors, the bound is 10 %.
The faults that this is for, such as weights read as zero, change answers by their whole magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from onnxcare.axes import Axes
from onnxcare.data import Inputs
from onnxcare.errors import ModelError, nearest
from onnxcare.findings.base import StaticFinding, counted, limited, quoted
from onnxcare.findings.files import read
from onnxcare.findings.walk import scopes
from onnxcare.runtime import MAPS, Device, Session

Array = np.ndarray
Decide = Callable[[Array], Array | None]

RULE = "optimisation-difference"

_ROUNDINGS = 1000
_HALF = 0.02
_QUANTISED = 0.1

_ADVICE = "Deploy with the setting under which it was tested, or with another version of onnxruntime."


def optimisation_findings(
    path: Path,
    inputs: Inputs,
    output: str | None,
    device: Device,
    *,
    decide: Decide | None = None,
    axes: Axes | None = None,
) -> list[StaticFinding]:
    """Run a model with and without onnxruntime's optimisations and report answers that differ beyond rounding.

    Args:
        path: the model file.
        inputs: one array per model input, samples on axis 0.
        output: the output to compare; None for all that hold tensors.
        device: `cpu` or `cuda`.
        decide: reads the decisions, one per sample, out of an output with floats; by default the highest of several
            columns decides. Every other kind of values is a decision as it is.
        axes: where the model has the samples of inputs that do not have them on axis 0.

    Raises:
        ModelError: the model has no such output, or cannot be run without optimisations.
    """
    plain = Session(path, device, optimise=False, axes=axes)
    names = _comparable(plain, output)
    if not names:
        return []
    expected = plain.run_rows(inputs, names)
    try:
        found = Session(path, device, axes=axes).run_rows(inputs, names)
    except ModelError as error:
        message = f"The model runs without onnxruntime's optimisations, but not with them: {error}"
        return [StaticFinding(RULE, "error", "", message)]
    bound = _QUANTISED if _quantised(path) else 0.0
    decide = decide or _highest
    pairs = zip(names, expected, found, strict=True)
    return limited(finding for name, a, b in pairs if (finding := _compare(name, a, b, bound, decide)))


def _comparable(session: Session, output: str | None) -> list[str]:
    """Return the outputs that are tensors with samples on axis 0; one that is asked for may be maps of scores, too."""
    held = {name: shape for name, kind, shape in session.outputs if kind.startswith("tensor(") or kind in MAPS}
    if output is None:
        return [name for name, shape in held.items() if shape]
    if output not in held:
        raise ModelError(f"{session.name}: has no output {output!r} that can be compared{nearest(output, held)}")
    return [output]


def _quantised(path: Path) -> bool:
    proto = read(path)
    assert isinstance(proto, onnx.ModelProto)  # onnxruntime has just loaded it
    operators = {node.op_type for scope in scopes(proto) for node in scope.nodes}
    return any("Quantize" in name or "QLinear" in name or "Integer" in name for name in operators)


def _highest(values: Array) -> Array | None:
    return values.argmax(axis=1) if values.ndim == 2 and values.shape[1] > 1 else None


def _compare(name: str, expected: Array, found: Array, bound: float, decide: Decide) -> StaticFinding | None:
    where, total = quoted(name), len(expected)
    if expected.dtype.kind != "f":
        changed = int(_rows(expected != found).any(axis=1).sum())
        if not changed:
            return None
        message = f"onnxruntime's optimisations change output {where} of {_share(changed, total)}. {_ADVICE}"
        return StaticFinding(RULE, "error", name, message)
    bound = max(bound, min(_ROUNDINGS * float(np.finfo(expected.dtype).eps), _HALF))
    differences = _differences(expected, found)
    scale = np.maximum(1, np.abs(np.nan_to_num(_rows(expected), posinf=0, neginf=0)).max(axis=1, initial=0))
    beyond = differences > bound * scale
    decisions = decide(expected), decide(found)
    flipped = np.zeros(total, bool) if decisions[0] is None else decisions[0] != decisions[1]
    largest = f"the largest difference is {differences.max():.3g}"
    if (flipped & beyond).any():
        message = (
            f"onnxruntime's optimisations change the decision of output {where} for "
            f"{_share(int(flipped.sum()), total)}; {largest}, beyond rounding. {_ADVICE}"
        )
        return StaticFinding(RULE, "error", name, message)
    if beyond.any():
        message = (
            f"onnxruntime's optimisations change output {where} beyond rounding for "
            f"{_share(int(beyond.sum()), total)}, but no decision; {largest}. {_ADVICE}"
        )
        return StaticFinding(RULE, "warning", name, message)
    if flipped.any():
        message = (
            f"Rounding alone decides output {where} for {_share(int(flipped.sum()), total)}: onnxruntime's "
            f"optimisations change the decision, although {largest}. Do not rely on these decisions."
        )
        return StaticFinding(RULE, "warning", name, message)
    return None


def _differences(expected: Array, found: Array) -> Array:
    """Return the largest difference of every sample; infinite where only one of the two is NaN or infinite."""
    a, b = _rows(expected).astype(np.float64), _rows(found).astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        differences = np.where(same, 0.0, np.abs(a - b))
    return np.nan_to_num(differences, nan=np.inf).max(axis=1, initial=0)


def _rows(values: Array) -> Array:
    return values.reshape(len(values), -1)


def _share(number: int, total: int) -> str:
    return f"{number} of {counted(total, 'sample')}"
