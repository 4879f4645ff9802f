"""What a static finding is, and how names out of a stranger's file are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["error", "warning", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")

# A file can be made to break a rule a million times; a reader needs the first few and the number.
_MOST_PER_RULE = 20
_LONGEST_NAME, _LONGEST_PLACE = 120, 1000


@dataclass(frozen=True)
class Rule:
    """What is looked for.

    Attributes:
        id: stable name in kebab-case.
        level: the level of most of its findings; a finding may be milder, or graver.
        title: a few words.
        help: what it means and what to do about it.
    """

    id: str
    level: Level
    title: str
    help: str


@dataclass(frozen=True)
class StaticFinding:
    """Something in a model file that its user should know before deploying it.

    Attributes:
        rule: id of the rule.
        level: `error` where the model should not be deployed, `warning` where somebody has to look at it, or `note`.
        where: name of the node or tensor; empty for the whole model. Control characters are escaped.
        message: one to three plain sentences.
    """

    rule: str
    level: Level
    where: str
    message: str


def printable(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a name with control characters escaped, and cut where it is long."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= longest else text[: longest - 3] + "..."


def quoted(name: str) -> str:
    """Return a name for use within a sentence."""
    return f"'{printable(name)}'"


def counted(number: int, what: str) -> str:
    """Return a number and a noun, in the plural where it needs one."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def limited(findings: Iterable[StaticFinding]) -> list[StaticFinding]:
    """Return the findings, gravest first within a rule, with the tail of a long series told as a number."""
    by_rule: dict[str, list[StaticFinding]] = {}
    for finding in findings:
        named = replace(finding, where=printable(finding.where, _LONGEST_PLACE))
        by_rule.setdefault(finding.rule, []).append(named)
    kept: list[StaticFinding] = []
    for series in by_rule.values():
        series.sort(key=lambda finding: LEVELS.index(finding.level))
        kept += series[:_MOST_PER_RULE]
        if rest := series[_MOST_PER_RULE:]:
            kept.append(replace(rest[0], where="", message=f"{len(rest)} more of this kind are not listed."))
    return kept
