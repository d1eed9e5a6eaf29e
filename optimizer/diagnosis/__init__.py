"""Judges what ``environment`` found: known bad combinations, and which targets can be used here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optimizer.diagnosis.availability import Availability, availabilities
from optimizer.diagnosis.findings import Finding, Severity, apply
from optimizer.diagnosis.rules import RULES
from optimizer.environment import Facts
from optimizer.errors import EXIT_DEPENDENCY, EXIT_DONE
from optimizer.targets import DEFAULT_TARGET, get_target

__all__ = ["Availability", "Diagnosis", "Finding", "Severity", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """What there is to say about an environment.

    Attributes:
        findings: The gravest first.
        targets: One entry per target.
        asked: Targets that must be usable.
    """

    findings: tuple[Finding, ...]
    targets: tuple[Availability, ...]
    asked: tuple[str, ...]

    @property
    def unusable(self) -> tuple[str, ...]:
        """Targets that were asked for and cannot be used here."""
        usable = {item.target for item in self.targets if item.usable}
        return tuple(name for name in self.asked if name not in usable)

    @property
    def exit_code(self) -> int:
        """6 where a target that was asked for cannot be used here, else 0."""
        return EXIT_DEPENDENCY if self.unusable else EXIT_DONE

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return {
            "findings": [
                {**asdict(item), "severity": item.severity.value} for item in self.findings
            ],
            "targets": [{**asdict(item), "usable": item.usable} for item in self.targets],
            "asked": list(self.asked),
            "exit_code": self.exit_code,
        }


def diagnose(facts: Facts, asked: Sequence[str] = ()) -> Diagnosis:
    """Judge an environment.

    Args:
        facts: What is there.
        asked: Names of targets that must be usable; none = the default target.

    Raises:
        OptionError: There is no such target.
    """
    names = tuple(get_target(name).name for name in asked) or (DEFAULT_TARGET,)
    findings = apply(RULES, facts)
    return Diagnosis(findings, availabilities(facts, findings), names)
