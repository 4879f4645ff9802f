"""The errors a user can cause, and the exit code each one stands for.

Every message is one or two plain sentences that name the file, key or node and say what to do. Anything
that is not an `OnnxcareError` is a defect of onnxcare itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxcareError(Exception):
    """Base of all errors that are explained to the user instead of shown as a traceback."""

    exit_code = 4


class UsageError(OnnxcareError):
    """The command line asks for something that cannot be done."""

    exit_code = 2


class SpecError(UsageError):
    """The spec (care.yaml) is missing, malformed or contradicts itself."""


class ModelError(OnnxcareError):
    """The model cannot be loaded, or not be used for what was asked."""

    exit_code = 3


class DataError(OnnxcareError):
    """Data, labels or a trigger cannot be read or do not fit the model."""

    exit_code = 3


class ClusterError(OnnxcareError):
    """The workers that jobs were sent to are lost, or cannot do them."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
