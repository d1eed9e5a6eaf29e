"""What a rule about an environment is, and what it found."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from optimizer.environment import Facts


class Severity(enum.Enum):
    """How much a finding matters.

    PROBLEM: A target cannot be used as things are.
    WARNING: Something works otherwise than one would expect.
    NOTE: Good to know.
    """

    PROBLEM = "problem"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Found:
    """One occurrence of a known bad combination.

    Attributes:
        what: What was found, and what follows from it.
        advice: What to do.
    """

    what: str
    advice: str


@dataclass(frozen=True)
class Rule:
    """A known bad combination.

    Attributes:
        id: Short name, kept for ever: scripts select findings by it.
        find: Looks for it in the facts.
        source: Where it is known from.
        prevents: Targets that it makes unusable; none for a warning or a note.
        severity: Of a rule that prevents nothing.
    """

    id: str
    find: Callable[[Facts], Iterable[Found]]
    source: str
    prevents: tuple[str, ...] = ()
    severity: Severity = Severity.WARNING


@dataclass(frozen=True)
class Finding:
    """What a rule found in an environment; see ``Rule`` and ``Found``."""

    id: str
    severity: Severity
    what: str
    advice: str
    source: str
    prevents: tuple[str, ...]


def apply(rules: Iterable[Rule], facts: Facts) -> tuple[Finding, ...]:
    """All findings, the gravest first, else in the order of the rules."""
    findings = [
        Finding(
            rule.id,
            Severity.PROBLEM if rule.prevents else rule.severity,
            found.what,
            found.advice,
            rule.source,
            rule.prevents,
        )
        for rule in rules
        for found in rule.find(facts)
    ]
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))
