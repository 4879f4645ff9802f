"""What every report says of a measure in a sentence, and how names out of strangers' files are written down."""

from __future__ import annotations

import math
import re

from onnxcare.measures import Measure, Rate

# What XML 1.0 has no way to write, whatever it is escaped by; lone surrogates are no text at all.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]|" + _UNWRITABLE.pattern)


def writable(text: str) -> str:
    """Return text with the characters escaped that XML or UTF-8 cannot hold; lines stay lines."""
    return _UNWRITABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """Return text with every control character escaped, for names and attributes."""
    return _CONTROLS.sub(_escape, text)


def described(item: Measure, confidence: float) -> str:
    """Return name, value, interval, limit and answer of a measure.

    Args:
        item: the measure.
        confidence: level of its interval.
    """
    parts = [f"{one_line(item.name)}: {amount(item, confidence)}"]
    if item.before is not None:
        parts.append(f"the baseline has {_quantity(item.before, item.unit)}")
    if item.limit is not None:
        word = "at least" if item.higher_is_better else "at most"
        parts.append(f"the limit is {word} {_number(item.limit, item.unit)}{_suffix(item.unit)}")
    if item.status == "undecided":
        parts.append(_undecided(item))
    elif item.status != "info":
        parts.append({"pass": "passes", "fail": "fails"}[item.status])
    return "; ".join(parts)


def amount(item: Measure, confidence: float) -> str:
    """Return the value of a measure with its counts and its interval.

    Args:
        item: the measure.
        confidence: level of its interval.
    """
    text = _quantity(item.after, item.unit)
    nothing = isinstance(item.after, Rate) and not item.after.total
    if item.low is None or item.high is None or nothing:
        return text
    low, high = _number(item.low, item.unit), _number(item.high, item.unit)
    return f"{text}, {100 * confidence:g} % interval {low} to {high}{_suffix(item.unit)}"


def _undecided(item: Measure) -> str:
    if isinstance(item.after, Rate) and not item.after.total:
        return "undecided, which is no pass: no sample of this kind is held out"
    more = f"; {item.needed:,} samples like these would decide" if item.needed else ""
    return f"undecided, which is no pass: the interval does not keep the limit{more}"


def _quantity(value: Rate | float, unit: str) -> str:
    if isinstance(value, Rate):
        if not value.total:
            return "no samples"
        return f"{_number(value.value, unit)} % ({value.count} of {value.total})"
    return _number(value, unit) + (_suffix(unit) if math.isfinite(value) else "")


def _number(value: float, unit: str) -> str:
    if math.isnan(value):
        return "not a number"
    if unit == "number":
        return f"{value:.6g}"
    # Differences of shares carry noise behind their last digit, and a zero may have a sign.
    return f"{round(100 * value, 8) + 0.0:.5g}"


def _suffix(unit: str) -> str:
    return {"rate": " %", "points": " points"}.get(unit, "")


def _escape(match: re.Match[str]) -> str:
    # Code points beyond 8 bits include surrogates, which repr and the codecs refuse or pass on as they are.
    code = ord(match[0])
    return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}.get(match[0], f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
