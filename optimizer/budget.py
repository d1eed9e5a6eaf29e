"""Limits on drift, written ``top1>=0.98,perplexity<=+2%,relative_l2<=0.05``."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from optimizer.errors import OptionError
from optimizer.metrics import METRICS, Drift

_LIMIT = re.compile(
    r"\s*(?P<metric>[a-z_0-9]+)\s*(?P<operator><=|>=)\s*(?P<sign>[+-]?)(?P<number>[0-9.eE-]+)"
    r"(?P<percent>%?)\s*"
)


@dataclass(frozen=True)
class Limit:
    """One condition.

    Attributes:
        metric: Name of a field of ``Drift``.
        bound: The number to compare with.
        at_least: The metric must not be smaller; otherwise it must not be larger.
        text: As the user wrote it.
    """

    metric: str
    bound: float
    at_least: bool
    text: str

    def failure(self, drift: Drift) -> str | None:
        """Why ``drift`` misses this limit, or None."""
        value = drift.as_dict().get(self.metric)
        # Written so that NaN fails.
        kept = value is not None and (value >= self.bound if self.at_least else value <= self.bound)
        return None if kept else self.measured(drift)

    def measured(self, drift: Drift) -> str:
        """The limit and what ``drift`` is in its metric."""
        value = drift.as_dict().get(self.metric)
        if value is None:
            return f"{self.text}: this model and data have no {self.metric}"
        if self.metric == "perplexity_ratio":
            return f"{self.text}: measured {100 * (value - 1):+.3g} %"
        return f"{self.text}: measured {value:.6g}"


@dataclass(frozen=True)
class Budget:
    """Conditions that must all hold."""

    limits: tuple[Limit, ...] = ()

    @staticmethod
    def parse(text: str | None) -> Budget:
        """Read a budget.

        ``perplexity<=+2%`` is relative to the original model; every other number is absolute.

        Raises:
            OptionError: Names the part that is wrong.
        """
        parts = [part for part in (text or "").split(",") if part.strip()]
        return Budget(tuple(_limit(part) for part in parts))

    def failures(self, drift: Drift) -> list[str]:
        """The limits that ``drift`` misses, as sentences."""
        return [reason for limit in self.limits if (reason := limit.failure(drift)) is not None]


def _limit(part: str) -> Limit:
    match = _LIMIT.fullmatch(part)
    if match is None:
        msg = f"--budget: found '{part.strip()}', expected METRIC<=NUMBER or METRIC>=NUMBER"
        raise OptionError(msg)
    metric, relative = match["metric"], bool(match["sign"] and match["percent"])
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(METRICS)}"
        msg = f"--budget: there is no metric '{metric}'; {hint}"
        raise OptionError(msg)
    try:
        number = float(match["sign"] + match["number"])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        msg = f"--budget: '{match['number']}' in '{part.strip()}' is not a number"
        raise OptionError(msg)
    if match["percent"]:
        number /= 100
    if relative:
        if metric != "perplexity":
            msg = f"--budget: '{part.strip()}': only perplexity can be relative (+N%)"
            raise OptionError(msg)
        metric, number = "perplexity_ratio", 1 + number
    at_least = match["operator"] == ">="
    if at_least is METRICS[metric]:
        right = "<=" if METRICS[metric] else ">="
        msg = f"--budget: '{part.strip()}' bounds the wrong side of {match['metric']}; use {right}"
        raise OptionError(msg)
    return Limit(metric, number, at_least, part.strip())
