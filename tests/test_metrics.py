"""Drift against its formulas written out for whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.metrics import METRICS, DriftMeter, log_softmax, row_cosine

# Two float64 evaluations of the same sums in another order: a few hundred roundings of 1e-16.
EXACT = 1e-12


def pair(seed: int = 0, shape: tuple[int, ...] = (3, 5, 7)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 3, shape).astype(np.float32)
    return reference, (reference + rng.normal(0, 0.5, shape)).astype(np.float32)


def measured(*batches: tuple, scores: bool = True):
    meter = DriftMeter(scores=scores)
    for batch in batches:
        meter.update(*batch)
    return meter.result()


@given(seed=st.integers(0, 1000), vocab=st.integers(1, 9), tokens=st.integers(2, 6))
def test_all_metrics_equal_their_formulas(seed, vocab, tokens):
    r32, c32 = pair(seed, (2, tokens, vocab))
    targets = np.random.default_rng(seed).integers(0, vocab, (2, tokens))
    drift = measured((r32, c32, None, targets))
    r, c = r32.astype(np.float64).reshape(-1, vocab), c32.astype(np.float64).reshape(-1, vocab)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (r, c))
    norms = np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1)
    goal = targets.ravel()
    rows = np.arange(len(goal))
    expected = {
        "relative_l2": np.linalg.norm(c - r) / np.linalg.norm(r),
        "cosine": ((r * c).sum(1) / norms).mean(),
        "max_abs": np.abs(c - r).max(),
        "top1": (r.argmax(1) == c.argmax(1)).mean(),
        "kl": (p * np.log(p / q)).sum(1).mean(),
        "perplexity": np.exp(-np.log(q[rows, goal]).mean()),
        "perplexity_reference": np.exp(-np.log(p[rows, goal]).mean()),
        "rows": len(goal),
    }
    for name, value in expected.items():
        assert getattr(drift, name) == pytest.approx(value, rel=EXACT, abs=EXACT), name


def test_batches_add_up_to_one_measurement():
    r, c = pair(shape=(6, 5, 7))
    whole = measured((r, c)).as_dict()
    parts = measured((r[:1], c[:1]), (r[1:4], c[1:4]), (r[4:], c[4:])).as_dict()
    assert parts == pytest.approx(whole, rel=EXACT)


def test_long_arrays_are_compared_in_chunks(monkeypatch):
    r, c = pair(shape=(4, 6, 7))
    whole = measured((r, c)).as_dict()
    monkeypatch.setattr("optimizer.metrics._CHUNK", 20)
    assert measured((r, c)).as_dict() == pytest.approx(whole, rel=EXACT)


def test_padding_does_not_count():
    r, c = pair()
    valid = np.ones(r.shape[:2], bool)
    valid[0, 3:] = False
    damaged = c.copy()
    damaged[~valid] = np.nan
    drift = measured((r, damaged, valid))
    assert drift.rows == valid.sum()
    assert drift.as_dict() == pytest.approx(measured((r[valid], c[valid])).as_dict(), rel=EXACT)


def test_a_negative_target_does_not_count():
    r, c = pair(shape=(1, 4, 7))
    some = measured((r, c, None, np.array([[3, -1, 2, -1]])))
    kept = [0, 2]
    alone = measured((r[:, kept], c[:, kept], None, np.array([[3, 2]])))
    assert some.perplexity == pytest.approx(alone.perplexity, rel=EXACT)


def test_equal_outputs_have_no_drift_at_all():
    r, _ = pair()
    drift = measured((r, r, None, np.zeros(r.shape[:2], int)))
    assert (drift.relative_l2, drift.max_abs, drift.kl, drift.top1) == (0, 0, 0, 1)
    assert drift.perplexity == drift.perplexity_reference
    assert drift.perplexity_ratio == 1


def test_huge_logits_do_not_overflow():
    r = np.array([[[1e4, -1e4, 0.0]]], np.float32)
    drift = measured((r, -r, None, np.array([[0]])))
    assert drift.kl == pytest.approx(2e4)
    assert math.isfinite(drift.perplexity)


def test_a_nan_in_the_candidate_reaches_every_metric_it_should():
    r, c = pair()
    c[0, 0, 0] = np.nan
    drift = measured((r, c))
    assert all(math.isnan(v) for v in (drift.relative_l2, drift.cosine, drift.max_abs, drift.kl))


def test_outputs_that_are_not_scores_have_no_top1_and_no_kl():
    drift = measured(pair(), scores=False)
    assert (drift.top1, drift.kl, drift.perplexity) == (None, None, None)
    assert set(drift.as_dict()) == {"relative_l2", "cosine", "max_abs", "rows"}


def test_a_difference_from_an_all_zero_reference_is_infinite():
    zero = np.zeros((1, 2, 3), np.float32)
    assert measured((zero, zero + 1)).relative_l2 == math.inf
    assert measured((zero, zero)).relative_l2 == 0


def test_zero_rows_have_cosine_one_with_each_other_and_zero_with_others():
    a = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    b = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert row_cosine(a, b).tolist() == [1, 0, 1]


def test_different_shapes_are_refused():
    r, c = pair()
    with pytest.raises(ValueError, match="shapes differ"):
        DriftMeter().update(r, c[:1])


def test_log_softmax_rows_sum_to_one():
    r, _ = pair()
    assert np.exp(log_softmax(r.astype(np.float64))).sum(-1) == pytest.approx(1, rel=EXACT)


def test_every_budget_metric_is_a_field_of_drift():
    r, c = pair()
    assert set(METRICS) <= set(measured((r, c, None, np.zeros(r.shape[:2], int))).as_dict())
