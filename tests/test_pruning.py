"""Patterns, scores, SparseGPT and the allocation of zeros, each against its definition."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.pruning import allocation
from optimizer.pruning.methods import SparseGpt, magnitude, relative_damage, wanda, zeroed
from optimizer.pruning.patterns import Pattern
from optimizer.pruning.statistics import SecondMoments
from optimizer.quantization.weights import Compensation, inverse_factor

PATTERNS = [
    Pattern.parse("2:4"),
    Pattern.parse("1:3"),
    Pattern.parse("4:8"),
    Pattern(0.5),
    Pattern(0.7),
    Pattern(0.3, balanced=True),
]


def ids(pattern: Pattern) -> str:
    return f"{pattern}{' balanced' if pattern.balanced else ''}"


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def correlated(width: int, rows: int = 512, seed: int = 0) -> np.ndarray:
    """Tokens with common factors, and channels of sizes that differ by a hundred."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width // 3)) @ rng.normal(size=(width // 3, width))
    x = x / 3 + 0.3 * rng.normal(size=x.shape)
    return (x * np.exp(rng.normal(size=width))).astype(np.float32)


def expected_zeros(pattern: Pattern, rows: int, columns: int) -> int:
    if pattern.group is None:
        return round(pattern.share * rows) * columns
    return round(pattern.share * pattern.group) * (rows // pattern.group) * columns


# --- patterns -------------------------------------------------------------------------------------


@given(
    keep=st.integers(1, 8),
    more=st.integers(1, 8),
    groups=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_n_m_keeps_the_n_largest_of_every_m_along_k(
    keep: int, more: int, groups: int, seed: int
) -> None:
    pattern = Pattern.parse(f"{keep}:{keep + more}")
    scores = np.abs(weights(groups * (keep + more), 3, seed))
    mask = pattern.pruned(scores)
    for column in range(3):
        for first in range(0, len(scores), keep + more):
            group = slice(first, first + keep + more)
            kept = set(np.flatnonzero(~mask[group, column]))
            assert kept == set(np.argsort(scores[group, column])[-keep:])


@given(
    share=st.floats(0, 0.99), rows=st.integers(1, 40), columns=st.integers(1, 5), tied=st.booleans()
)
def test_unstructured_counts_are_exact_and_the_lowest_go_first(
    share: float, rows: int, columns: int, tied: bool
) -> None:
    scores = np.abs(weights(rows, columns))
    scores = np.round(scores) if tied else scores
    mask = Pattern(share).pruned(scores)
    assert mask.sum() == round(share * rows) * columns
    if mask.any() and not mask.all():
        assert scores[mask].max() <= scores[~mask].min()
    balanced = Pattern(share, balanced=True).pruned(scores)
    assert (balanced.sum(axis=0) == round(share * rows)).all()


@pytest.mark.parametrize("text", ["", "2", "2:", "4:2", "2:2", "0:4", "2:4:8", "a:b", "-1:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="N kept of every M"):
        Pattern.parse(text)


def test_a_pattern_is_recognised_where_it_is_and_nowhere_else() -> None:
    alternating = np.tile(np.array([[1.0], [0.0]], np.float32), (6, 2))  # 12 x 2, half zeros
    assert Pattern.parse("2:4").holds(alternating)
    assert Pattern(0.5).holds(alternating)
    assert Pattern(0.5, balanced=True).holds(alternating)
    halves = np.repeat(np.array([[1.0], [0.0]], np.float32), 6, axis=0)  # six ones, six zeros
    assert not Pattern.parse("2:4").holds(halves)
    assert Pattern(0.5).holds(halves)
    assert not Pattern(0.6).holds(halves)
    assert not Pattern.parse("2:5").holds(alternating)  # 12 is no multiple of 5
    one_column = np.array([[1, 0], [1, 0]], np.float32)
    assert Pattern(0.5).holds(one_column)
    assert not Pattern(0.5, balanced=True).holds(one_column)
    # along K, not along N: the transposed matrix keeps 2 of 4 along its rows only
    assert not Pattern.parse("2:4").holds(np.ascontiguousarray(halves[:8].reshape(4, 2)))


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=ids)
def test_wanda_with_equal_norms_is_magnitude(pattern: Pattern) -> None:
    weight = weights(24, 7)
    expected = pattern.pruned(magnitude(weight))
    assert np.array_equal(pattern.pruned(wanda(weight, np.full(24, 9.0))), expected)


def test_wanda_follows_its_equation() -> None:
    weight, x = weights(12, 5), correlated(12)
    scores = wanda(weight, np.square(x).sum(axis=0))
    expected = np.abs(weight) * np.linalg.norm(x, axis=0)[:, None]
    assert np.allclose(scores / scores.max(), expected / expected.max(), rtol=1e-5)


def test_wanda_of_a_folded_norm_prunes_the_same_weights() -> None:
    weight, x = weights(24, 5), correlated(24)
    gain = np.exp(weights(24, 1, 3)[:, 0])
    diagonal = np.square(x).sum(axis=0, dtype=np.float64)
    pattern = Pattern.parse("2:4")
    folded = pattern.pruned(wanda(weight * gain[:, None], diagonal / gain.astype(np.float64) ** 2))
    assert np.array_equal(pattern.pruned(wanda(weight, diagonal)), folded)


def test_silent_channels_go_first_and_the_smallest_of_them() -> None:
    weight = np.array([[5.0], [0.1], [0.2], [0.3]], np.float32)
    diagonal = np.array([0.0, 1.0, 1.0, 0.0])
    assert Pattern.parse("2:4").pruned(wanda(weight, diagonal))[:, 0].tolist() == [
        True, False, False, True,
    ]  # fmt: skip
    assert Pattern.parse("3:4").pruned(wanda(weight, diagonal))[:, 0].tolist() == [
        False, False, False, True,
    ]  # fmt: skip


# --- SparseGPT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=ids)
@pytest.mark.parametrize("block", [1, 5, 48, 128])
def test_sparsity_is_exact_in_every_group_block_and_column(pattern: Pattern, block: int) -> None:
    x, weight = correlated(48), weights(48, 20)
    new = SparseGpt(x.T @ x, block=block).prune(weight, pattern)
    assert (new == 0).sum() == expected_zeros(pattern, 48, 20)
    assert pattern.holds(new)
    if pattern.balanced:
        assert ((new == 0).sum(axis=0) == round(pattern.share * 48)).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=ids)
@pytest.mark.parametrize("block", [1, 16, 48])
def test_independent_inputs_give_magnitude_and_no_update(pattern: Pattern, block: int) -> None:
    weight = weights(48, 20)
    new = SparseGpt(np.eye(48, dtype=np.float32), block=block).prune(weight, pattern)
    assert np.array_equal(new, zeroed(weight, pattern.pruned(magnitude(weight))))


@pytest.mark.parametrize("pattern", PATTERNS, ids=ids)
@pytest.mark.parametrize("seed", range(3))
def test_damage_of_sparsegpt_is_below_wandas_below_magnitudes(pattern: Pattern, seed: int) -> None:
    x, weight = correlated(48, seed=seed), weights(48, 32, seed)
    moments = x.T @ x
    damage = [
        relative_damage(weight, new, moments)
        for new in (
            SparseGpt(moments, block=16).prune(weight, pattern),
            zeroed(weight, pattern.pruned(wanda(weight, np.diag(moments)))),
            zeroed(weight, pattern.pruned(magnitude(weight))),
        )
    ]
    assert damage[0] < damage[1] < damage[2]


def test_what_is_left_is_the_least_squares_answer_where_one_weight_goes() -> None:
    x, weight = correlated(6).astype(np.float64), weights(6, 1)
    moments = x.T @ x
    # Pruning only the first channel: the others are free to make up for it, all of them.
    mask = np.zeros((6, 1), bool)
    mask[0] = True
    weight[0] = 1e-3  # its score is the lowest whatever the others are
    new = SparseGpt(moments.astype(np.float32), damping=1e-7).prune(weight, Pattern(1 / 6))
    assert np.array_equal(new == 0, mask)
    target = x @ weight[:, 0]
    best = np.linalg.lstsq(x[:, 1:], target, rcond=None)[0]
    assert np.allclose(new[1:, 0], best, rtol=1e-3, atol=1e-5)


@given(order=st.permutations(range(9)), number=st.sampled_from(range(len(PATTERNS))))
@settings(max_examples=20)
def test_the_order_of_output_channels_does_not_matter(order: list[int], number: int) -> None:
    pattern, weight, x = PATTERNS[number], weights(24, 9), correlated(24)
    solver = SparseGpt(x.T @ x, block=12)
    assert np.array_equal(
        solver.prune(weight[:, order], pattern), solver.prune(weight, pattern)[:, order]
    )
    scores = wanda(weight, np.square(x).sum(axis=0))
    assert np.array_equal(pattern.pruned(scores[:, order]), pattern.pruned(scores)[:, order])


@given(factor=st.floats(1e-6, 1e6))
def test_the_number_of_tokens_does_not_matter(factor: float) -> None:
    x, weight = correlated(12), weights(12, 4)
    moments = (x.T @ x).astype(np.float32)
    pattern = Pattern.parse("2:4")
    expected = SparseGpt(moments).prune(weight, pattern)
    found = SparseGpt(moments * np.float32(factor)).prune(weight, pattern)
    # The same up to float32 roundings of the scaled moments, which the inverse enlarges.
    assert np.allclose(found, expected, rtol=1e-2, atol=1e-3)


def test_fewer_tokens_than_channels_need_no_damping_of_the_users() -> None:
    x, weight = correlated(96, rows=8), weights(96, 6)
    pattern = Pattern.parse("2:4")
    new = SparseGpt(x.T @ x, damping=1e-12).prune(weight, pattern)
    assert np.isfinite(new).all()
    assert pattern.holds(new)


def test_dead_inputs_are_pruned_first_and_nothing_overflows() -> None:
    x, weight = correlated(16), weights(16, 6)
    x[:, [2, 3, 9]] = 0
    new = SparseGpt(x.T @ x).prune(weight, Pattern(3 / 16))
    assert np.isfinite(new).all()
    assert (new[[2, 3, 9]] == 0).all()
    alone = np.delete(x, [2, 3, 9], axis=1)
    assert relative_damage(weight, new, x.T @ x) < 1e-2
    assert np.linalg.norm(
        alone @ np.delete(weight - new, [2, 3, 9], axis=0)
    ) < 0.1 * np.linalg.norm(x @ weight)


@pytest.mark.parametrize("block", [8, 128])
def test_zeros_stay_zero_and_count(block: int) -> None:
    x, weight = correlated(32), weights(32, 8)
    solver = SparseGpt(x.T @ x, block=block)
    first = solver.prune(weight, Pattern(0.5))
    second = solver.prune(first, Pattern(0.75))
    assert (second[first == 0] == 0).all()
    assert (second == 0).sum() == 24 * 8


def test_more_zeros_than_the_pattern_needs_stay_too() -> None:
    x, weight = correlated(16), weights(16, 6)
    weight[4:7] = 0
    new = SparseGpt(x.T @ x).prune(weight, Pattern.parse("2:4"))
    assert (new[4:7] == 0).all()
    assert ((new == 0).sum(axis=0) == 9).all()


@pytest.mark.parametrize("text", ["2:4", "1:3"])
def test_how_many_channels_are_done_at_a_time_does_not_matter_for_groups(text: str) -> None:
    x, weight = correlated(48), weights(48, 20)
    pattern = Pattern.parse(text)
    expected = SparseGpt(x.T @ x, block=48).prune(weight, pattern)
    for block in (1, 12, 24):
        found = SparseGpt(x.T @ x, block=block).prune(weight, pattern)
        assert np.array_equal(found == 0, expected == 0)
        assert np.allclose(found, expected, rtol=1e-3, atol=1e-4)  # sums in another order


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(300, 900)
    moments = x.T @ x / len(x) + np.eye(300, dtype=np.float32)
    factor = inverse_factor(moments).astype(np.float64)
    assert np.allclose(factor, np.triu(factor))
    assert np.allclose(factor.T @ factor @ moments, np.eye(300), atol=1e-3)


def test_damage_is_that_of_the_outputs() -> None:
    x, weight = correlated(12).astype(np.float64), weights(12, 5)
    new = zeroed(weight, Pattern(0.5).pruned(magnitude(weight)))
    expected = np.square(x @ (weight - new)).sum() / np.square(x @ weight).sum()
    assert relative_damage(weight, new, x.T @ x) == pytest.approx(expected, rel=1e-4)
    plain = np.square(weight - new).sum() / np.square(weight).sum()
    assert relative_damage(weight, new, None) == pytest.approx(plain, rel=1e-4)
    assert relative_damage(weight, new, np.ones(12)) == pytest.approx(plain, rel=1e-4)
    assert relative_damage(np.zeros((3, 2), np.float32), np.zeros((3, 2)), None) == 0


# --- what rounding leaves -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=ids)
def test_compensated_rounding_keeps_zeros(pattern: Pattern) -> None:
    x, weight = correlated(48), weights(48, 20)
    sparse = SparseGpt(x.T @ x).prune(weight, pattern)
    rounded = Compensation(x).round(sparse, 8)
    assert (rounded.codes[sparse == 0] == 0).all()
    assert pattern.holds(rounded.dequantized())
    # 8 bits are 3 roundings of a percent of the largest weight of a column.
    assert relative_damage(sparse, rounded.dequantized(), x.T @ x) < 1e-3


# --- statistics -----------------------------------------------------------------------------------


def test_second_moments_are_summed_over_valid_tokens_whatever_the_batches() -> None:
    x = correlated(6, 40).reshape(4, 10, 6)
    valid = np.arange(40).reshape(4, 10) % 3 > 0
    expected = x[valid].T @ x[valid]
    for size in (1, 2, 4):
        seen = SecondMoments(ir.Value(name="x"))
        for start in range(0, 4, size):
            seen.update((x[start : start + size],), valid[start : start + size])
        assert seen.tokens == valid.sum()
        assert np.allclose(seen.total, expected, rtol=1e-4, atol=1e-3)
        assert seen.total.nbytes == 4 * 6 * 6


# --- shares by damage -----------------------------------------------------------------------------


def unit(size: int, damage: float, mean: float = 0.5) -> allocation.Unit:
    at = allocation.shares(mean)
    return allocation.Unit(size, damage, at**3)


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    mean=st.floats(0.05, 0.95),
    data=st.data(),
)
def test_the_mean_over_all_weights_is_kept(
    sizes: list[int], mean: float, data: st.DataObject
) -> None:
    damages = [data.draw(st.floats(0, 10)) for _ in sizes]
    units = [unit(s, d, mean) for s, d in zip(sizes, damages, strict=True)]
    found = allocation.allocate(units, mean)
    assert np.average(found, weights=sizes) == pytest.approx(mean, abs=1e-6)
    assert all(abs(s - mean) <= allocation.REACH + 1e-9 and 0 <= s < 1 for s in found)


def test_equal_layers_get_equal_shares_and_dear_ones_fewer_zeros() -> None:
    assert np.allclose(allocation.allocate([unit(10, 1.0)] * 4, 0.5), 0.5, atol=allocation.STEP)
    cheap, dear = allocation.allocate([unit(10, 0.1), unit(10, 1.0)], 0.5)
    assert cheap > 0.5 > dear


def test_no_other_shares_do_less_damage_by_the_model() -> None:
    rng = np.random.default_rng(0)
    units = [unit(10, d) for d in (0.1, 0.5, 2.0)]
    at = allocation.shares(0.5)

    def damage(found: np.ndarray) -> float:
        return sum(
            u.damage * float(np.interp(s, at, u.energies)) / 0.125
            for u, s in zip(units, found, strict=True)
        )

    best = damage(np.array(allocation.allocate(units, 0.5)))
    for _ in range(200):
        other = np.clip(0.5 + rng.normal(size=3) * 0.1, 0.26, 0.74)
        other += 0.5 - other.mean()
        if (np.abs(other - 0.5) <= allocation.REACH).all():
            # One step of one unit is what the grid may miss.
            assert damage(other) >= best - 0.02


def test_energies_are_those_of_the_weights_that_wanda_removes() -> None:
    scores = wanda(weights(40, 6), np.arange(1, 41))
    at = np.array([0.0, 0.25, 0.5])
    for balanced in (False, True):
        found = allocation.energies([scores], at, balanced=balanced)
        for share, energy in zip(at, found, strict=True):
            mask = Pattern(share, balanced=balanced).pruned(scores)
            assert energy == pytest.approx(float(np.square(scores[mask]).sum()), rel=1e-5)
        assert np.diff(found, 2)[0] >= 0
