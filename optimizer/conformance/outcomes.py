"""What the suite found, one entry per check and subject."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from optimizer.errors import place_of


class Status(enum.Enum):
    """Result of one check.

    PASSED, FAILED: What they say.
    NOTE: Passed, with something the author should know.
    SKIPPED: Could not be tried here, with the reason.
    """

    PASSED = "passed"
    FAILED = "failed"
    NOTE = "note"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """What one check said about one subject.

    Attributes:
        check: Name of the check.
        subject: What was looked at: "the class", or options and model.
        status: See ``Status``.
        found: What was found; empty where it passed.
        advice: What to do about it.
    """

    check: str
    subject: str
    status: Status = Status.PASSED
    found: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """One line; two where there is advice."""
        text = f"{self.status.value}: {self.check}, {self.subject}"
        text += f": {self.found}" if self.found else ""
        return f"{text}\n  -> {self.advice}" if self.advice else text


class Failure(Exception):  # noqa: N818 - it ends one check, and is never an error of the suite
    """Raised by a check: what was found and what to do."""

    def __init__(self, found: str, advice: str, status: Status = Status.FAILED) -> None:
        super().__init__(found)
        self.found, self.advice, self.status = found, advice, status


def run(check: str, subject: str, action: Callable[[], None]) -> Outcome:
    """The outcome of a check that raises ``Failure`` or returns."""
    try:
        action()
    except Failure as failure:
        return Outcome(check, subject, failure.status, failure.found, failure.advice)
    except Exception as error:  # of the pass, in one of the runs that this check needs
        found = f"it fails here: {type(error).__name__} at {place_of(error)}: {error}"
        return Outcome(check, subject, Status.FAILED, found, "refuse such a model with a reason")
    return Outcome(check, subject)


def problems(check: str, subject: str, found: Iterable[tuple[str, str]]) -> Iterator[Outcome]:
    """One failed outcome per (found, advice), or one that passed."""
    failed = [Outcome(check, subject, Status.FAILED, what, advice) for what, advice in found]
    yield from failed or [Outcome(check, subject)]


def summary(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """Number of outcomes by check and status, in order of first appearance."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        row = counts.setdefault(outcome.check, {status.value: 0 for status in Status})
        row[outcome.status.value] += 1
    return counts
