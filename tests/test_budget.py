"""Budgets: what can be written, and which drift passes."""

from __future__ import annotations

import math

import pytest

from optimizer.budget import Budget
from optimizer.errors import OptionError
from optimizer.metrics import Drift

DRIFT = Drift(0.02, 0.9995, 0.3, top1=0.97, kl=0.004, perplexity=4.1, perplexity_reference=4.0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", True),
        ("top1>=0.97", True),
        ("top1>=0.98", False),
        ("top1>=97%", True),
        ("cosine>=0.999,relative_l2<=0.05,kl<=0.01", True),
        ("cosine>=0.9999,relative_l2<=0.05", False),
        ("perplexity<=+3%", True),
        ("perplexity<=+2%", False),
        ("perplexity<=4.2", True),
        ("perplexity<=4.05", False),
        (" max_abs <= 0.3 ", True),
    ],
)
def test_limits_are_compared_with_the_measured_drift(text: str, kept: bool) -> None:
    assert (Budget.parse(text).failures(DRIFT) == []) is kept


def test_a_failure_says_limit_and_measurement() -> None:
    assert Budget.parse("top1>=0.98").failures(DRIFT) == ["top1>=0.98: measured 0.97"]
    relative = Budget.parse("perplexity<=+2%").failures(DRIFT)
    assert relative == ["perplexity<=+2%: measured +2.5 %"]


def test_a_metric_without_meaning_fails() -> None:
    plain = Drift(0.0, 1.0, 0.0)
    assert "no top1" in Budget.parse("top1>=0.1").failures(plain)[0]


def test_nan_never_passes() -> None:
    broken = Drift(math.nan, math.nan, math.nan)
    assert len(Budget.parse("relative_l2<=1,cosine>=0").failures(broken)) == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("top1", "expected METRIC<=NUMBER"),
        ("top1>0.9", "expected METRIC<=NUMBER"),
        ("topp1>=0.9", "did you mean 'top1'?"),
        ("top1<=0.9", "use >="),
        ("kl>=0.9", "use <="),
        ("kl<=+2%", "only perplexity"),
        ("kl<=1-e", "not a number"),
    ],
)
def test_a_malformed_budget_is_refused(text: str, part: str) -> None:
    with pytest.raises(OptionError) as caught:
        Budget.parse(text)
    assert part in str(caught.value)
