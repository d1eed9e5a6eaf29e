"""What every rule of ``canonicalize`` returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Miss:
    """A site a rule nearly matched and left alone.

    Attributes:
        site: Name of the node.
        reason: Why, as a sentence fragment a user understands.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class RuleReport:
    """What one run of a rule did.

    Attributes:
        applied: Number of rewrites.
        skipped: Near matches left alone.
    """

    applied: int = 0
    skipped: tuple[Miss, ...] = ()

    @staticmethod
    def total(reports: Iterable[RuleReport]) -> RuleReport:
        """The sum of several reports, skips in order and without repetition."""
        reports = tuple(reports)
        skipped = dict.fromkeys(miss for report in reports for miss in report.skipped)
        return RuleReport(sum(report.applied for report in reports), tuple(skipped))
