"""Optimization profiles: the smallest, usual and largest shape of every input.

A word ``name:MIN,OPT,MAX`` (``input_ids:1x8,1x128,8x512``) gives one input; one shape alone is all
three. The n-th mention of an input belongs to the n-th profile. Axes that are not given follow from
those of the same name, sums (``past + sequence``) from their parts, the rest from their role.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from optimizer.errors import OptionError

Shape: TypeAlias = tuple[int, ...]
#: Smallest, usual, largest.
Range: TypeAlias = tuple[int, int, int]
#: Input -> (smallest, usual, largest) shape.
Profile: TypeAlias = dict[str, tuple[Shape, Shape, Shape]]

#: An axis of past and new tokens together, whatever it is called.
_TOTAL = re.compile(r"total|full")
#: Tokens that an encoder gave to a decoder.
_SOURCE = re.compile(r"source|src|encoder")
_PAST = re.compile(r"past|cache|history")
_NEW = re.compile(r"seq|token|length|^s$|^t$")
#: Ranges of axes that nobody gave, by what their name says, the first that fits.
_DEFAULTS: tuple[tuple[re.Pattern[str], Range], ...] = (
    (_SOURCE, (1, 128, 1536)),  # 30 s of speech are 1500 tokens to Whisper's decoder
    (_PAST, (0, 128, 512)),
    (re.compile(r"batch|^b$|^n$"), (1, 1, 8)),
    (_NEW, (1, 128, 512)),
)
_SUM = re.compile(r"\s*\+\s*")
_LARGEST = 2**31 - 1
#: Tokens of an axis that nobody gave.
LONGEST = 512


@dataclass(frozen=True)
class _Axis:
    """A dynamic axis: its name, and where it is."""

    name: str
    place: str


def parse_shapes(words: Sequence[str]) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """Words of ``--shapes``, one mapping for each profile.

    Raises:
        OptionError: A word that is not of the form, or sizes that do not grow.
    """
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]] = []
    for word in words:
        name, _, text = word.rpartition(":")
        shapes = [_shape(part) for part in text.split(",")]
        valid = [item for item in shapes if item is not None]
        if not name or len(valid) != len(shapes) or len(valid) not in (1, 3):
            msg = f"--shapes: found '{word}', expected NAME:MIN,OPT,MAX such as input_ids:1x1,1x128"
            raise OptionError(f"{msg},8x512, or NAME:SHAPE")
        low, usual, high = valid * 3 if len(valid) == 1 else valid
        ranks = {len(low), len(usual), len(high)}
        if len(ranks) > 1 or not all(
            a <= b <= c <= _LARGEST for a, b, c in zip(low, usual, high, strict=True)
        ):
            msg = f"--shapes: found '{word}', expected three shapes of one rank with MIN <= OPT"
            raise OptionError(f"{msg} <= MAX along every axis")
        target = next((item for item in profiles if name not in item), None)
        if target is None:
            target = {}
            profiles.append(target)
        target[name] = (low, usual, high)
    return profiles


def _shape(text: str) -> Shape | None:
    parts = text.strip().split("x")
    return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else None


def make_profiles(
    inputs: Sequence[ir.Value], words: Sequence[str] = (), longest: int = LONGEST
) -> list[Profile]:
    """A complete profile for each that was begun; one of defaults where none was.

    Args:
        inputs: Of the model, without initializers.
        words: Of ``--shapes``.
        longest: Largest length of an axis that nobody gave; three times as much where it counts
            what an encoder gave.

    Returns:
        The profiles, with static inputs too; empty where no input has a dynamic axis.

    Raises:
        OptionError: A shape contradicts the model or another shape; an axis of unknown length.
    """
    given = parse_shapes(words)
    by_name = {str(value.name): value for value in inputs}
    for profile in given:
        for name in profile:
            if name not in by_name:
                close = difflib.get_close_matches(name, by_name, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(by_name)}"
                msg = f"--shapes: the model has no input '{name}'; {hint}"
                raise OptionError(msg)
    made = [_complete(by_name, profile, longest) for profile in given or [{}]]
    dynamic = any(not isinstance(d, int) for value in inputs for d in _dims(value))
    return made if dynamic else []


def _dims(value: ir.Value) -> list[int | str]:
    """Sizes; a name where an axis is dynamic, of its own where it has none."""
    if value.shape is None:
        msg = f"input '{value.name}' has no shape; export the model with one"
        raise OptionError(msg)
    return [
        dim if isinstance(dim, int) else dim.value or f"{value.name}[{axis}]"
        for axis, dim in enumerate(value.shape)
    ]


def _complete(
    inputs: Mapping[str, ir.Value],
    given: Mapping[str, tuple[Shape, Shape, Shape]],
    longest: int,
) -> Profile:
    ranges: dict[str, tuple[Range, str]] = {}
    names = list(
        dict.fromkeys(d for value in inputs.values() for d in _dims(value) if isinstance(d, str))
    )
    for name, shapes in given.items():
        _take(name, _dims(inputs[name]), shapes, ranges)
    for total, (past, new) in _totals(names):
        _settle_total(total, past, new, ranges, longest)
    return {
        name: _transposed([_range(dim, ranges, name, longest) for dim in _dims(value)])
        for name, value in inputs.items()
    }


def _totals(names: Sequence[str]) -> list[tuple[str, tuple[str, str]]]:
    """Axes of past and new tokens together, with the axes they consist of."""
    totals = [name for name in names if _TOTAL.search(name.lower()) and "+" not in name]
    simple = [
        name
        for name in names
        if name not in totals and "+" not in name and not _SOURCE.search(name.lower())
    ]
    past = [name for name in simple if _PAST.search(name.lower())]
    new = [name for name in simple if name not in past and _NEW.search(name.lower())]
    if len(past) != 1 or len(new) != 1:
        return []
    return [(total, (past[0], new[0])) for total in totals]


def _settle_total(
    total: str, past: str, new: str, ranges: dict[str, tuple[Range, str]], longest: int
) -> None:
    """Of past, new tokens and both together, what was not given follows from the others."""
    if total in ranges and (past in ranges) != (new in ranges):
        known, open_axis = (past, new) if past in ranges else (new, past)
        whole, part = ranges[total][0], ranges[known][0]
        low, usual, high = (a - b for a, b in zip(whole, part, strict=True))
        if 0 <= low <= usual <= high:
            ranges[open_axis] = ((low, usual, high), ranges[total][1])
    low, usual, high = (
        a + b
        for a, b in zip(
            _range(past, ranges, "its parts", longest),
            _range(new, ranges, "its parts", longest),
            strict=True,
        )
    )
    before, who = ranges.setdefault(total, ((low, usual, high), "past and new tokens"))
    if before != (low, usual, high):
        msg = (
            f"--shapes: axis '{total}' of '{who}' is {_text(before)}, but past and new tokens "
            f"('{past}', '{new}') add up to {_text((low, usual, high))}; give these too"
        )
        raise OptionError(msg)


def _take(
    name: str,
    dims: Sequence[int | str],
    shapes: tuple[Shape, Shape, Shape],
    ranges: dict[str, tuple[Range, str]],
) -> None:
    """Note the range of every axis that a word gives."""
    if len(dims) != len(shapes[0]):
        msg = f"--shapes: '{name}' has {len(dims)} axes {_text(dims)}, found {len(shapes[0])}"
        raise OptionError(msg)
    for axis, dim in enumerate(dims):
        found: Range = (shapes[0][axis], shapes[1][axis], shapes[2][axis])
        if isinstance(dim, int):
            if set(found) != {dim}:
                msg = f"--shapes: axis {axis} of '{name}' is always {dim}, found {_text(found)}"
                raise OptionError(msg)
            continue
        before, who = ranges.setdefault(dim, (found, name))
        if before != found:
            msg = (
                f"--shapes: axis '{dim}' is {_text(before)} in '{who}' but {_text(found)} in "
                f"'{name}'; expected the same"
            )
            raise OptionError(msg)


def _text(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"


def _range(
    dim: int | str, ranges: Mapping[str, tuple[Range, str]], name: str, longest: int = LONGEST
) -> Range:
    if isinstance(dim, int):
        return (dim, dim, dim)
    if dim in ranges:
        found = ranges[dim][0]
        _check_sum(dim, found, ranges, name)
        return found
    parts = _SUM.split(dim)
    if len(parts) > 1:
        each = [_range(int(p) if p.isdecimal() else p, ranges, name, longest) for p in parts]
        low, usual, high = (sum(column) for column in zip(*each, strict=True))
        return (low, usual, high)
    for pattern, default in _DEFAULTS:
        if pattern.search(dim.lower()):
            limit = longest * max(default[2] // LONGEST, 1)
            low, usual, high = (min(size, limit) for size in default)
            return (low, usual, high)
    msg = (
        f"--shapes: nothing says how long axis '{dim}' of input '{name}' is; give the input, such "
        f"as --shapes {name}:MIN,OPT,MAX"
    )
    raise OptionError(msg)


def _check_sum(dim: str, found: Range, ranges: Mapping[str, tuple[Range, str]], name: str) -> None:
    """A sum that was given must be what its parts, where all were given, add up to."""
    parts = [p for p in _SUM.split(dim) if not p.isdecimal()]
    if len(parts) < 2 or not all(part in ranges for part in parts):
        return
    low, usual, high = (
        sum(column) for column in zip(*(_range(p, ranges, name) for p in parts), strict=True)
    )
    if (low, usual, high) != found:
        msg = (
            f"--shapes: axis '{dim}' of '{name}' is {_text(found)}, but its parts add up to "
            f"{_text((low, usual, high))}"
        )
        raise OptionError(msg)


def _transposed(ranges: Sequence[Range]) -> tuple[Shape, Shape, Shape]:
    low, usual, high = (tuple(r[index] for r in ranges) for index in range(3))
    return low, usual, high
