"""How many tokens go in which layer: computed before anything is written, so shapes are constant.

constant:     r in each layer.
linear:       from r (1 - slope) in the first layer to r (1 + slope) in the last; slope = -1 is the
              decreasing schedule of ToMe (arXiv 2210.09461).
keep:         as many in all as leave this share of the tokens, spread evenly.
list:         one number per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def linear(r: float, slope: float, layers: int) -> list[int]:
    """``layers`` numbers from r (1 - slope) to r (1 + slope), rounded down."""
    first, step = r * (1 - slope), 2 * r * slope / max(layers - 1, 1)
    return [int(first + step * index + 1e-9) for index in range(layers)]


def keeping(share: float, count: int, layers: int) -> list[int]:
    """Numbers whose sum leaves ``share`` of ``count`` tokens, spread evenly."""
    total = count - round(share * count)
    ends = [total * (index + 1) // layers for index in range(layers)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def clipped(
    wanted: Sequence[int], count: int, limit: Callable[[int], int]
) -> tuple[list[int], list[int]]:
    """What can be merged of ``wanted``, layer by layer, and the layers where it is less.

    Args:
        wanted: Tokens to merge in each layer.
        count: Tokens that enter the first.
        limit: The most that can be merged of so many tokens.
    """
    result, less = [], []
    for index, r in enumerate(wanted):
        taken = min(r, limit(count))
        if taken < r:
            less.append(index)
        result.append(taken)
        count -= taken
    return result, less
