"""What becomes of an input."""

from __future__ import annotations

from dataclasses import dataclass

#: Outcomes that are nobody's fault; all others are findings.
FINE = ("agrees", "refused", "not runnable", "no feed")


class FindingError(Exception):
    """Something that must not happen.

    Attributes:
        kind: "crash", "mismatch", "contract", "message", "refusal", ...
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass
class Verdict:
    """What became of one input.

    Attributes:
        kind: One of ``FINE``, or the kind of a finding.
        detail: The message of a refusal, or what is wrong.
        applied: Rewrites of ``canonicalize``.
        feeds: Feeds on which the numbers were compared.
    """

    kind: str
    detail: str = ""
    applied: int = 0
    feeds: int = 0

    @property
    def fine(self) -> bool:
        return self.kind in FINE
