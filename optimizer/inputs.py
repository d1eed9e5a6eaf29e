"""What the inputs of a model accept, and which of them follow from the others."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optimizer.errors import CalibrationError


@dataclass(frozen=True)
class InputSpec:
    """What a model input accepts.

    Attributes:
        name: Input name.
        dtype: Element type.
        shape: Axis lengths; a string or None where any length is accepted.
        vocab: Number of valid token ids where the input holds token ids, else None.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    vocab: int | None = None


def sequence_length(feed: Mapping[str, np.ndarray]) -> int | None:
    """S of a feed with token inputs ([B, S] ids or positions, [B, S, D] embeddings), or None."""
    for name, rank in (("input_ids", 2), ("decoder_input_ids", 2), ("inputs_embeds", 3)):
        array = feed.get(name)
        if array is not None and array.ndim == rank:
            return int(array.shape[1])
    return None


def valid_tokens(feed: Mapping[str, np.ndarray], sequence: int) -> np.ndarray | None:
    """Which of the last ``sequence`` tokens are not padding.

    Returns:
        [B, S] bool from the last S columns of ``attention_mask``; None where there is no such
        mask or nothing is masked.
    """
    mask = feed.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < sequence or sequence == 0:
        return None
    valid = mask[:, -sequence:] != 0
    return None if valid.all() else valid


def check_feed(feed: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], where: str) -> None:
    """Compare a complete feed with what a model accepts: names, element types, shapes.

    Raises:
        CalibrationError: The first difference.
    """
    names = [spec.name for spec in inputs]
    for name in feed:
        if name not in names:
            raise CalibrationError(
                f"{where}: '{name}' is not an input of the model; {meant(name, names)}"
            )
    for spec in inputs:
        if spec.name not in feed:
            raise CalibrationError(
                f"{where}: input '{spec.name}' is missing; found {listed(feed)}, "
                f"expected {listed(names)}."
            )
        array = feed[spec.name]
        if array.dtype != spec.dtype:
            raise CalibrationError(
                f"{where}: '{spec.name}' is {array.dtype}, the model expects {spec.dtype}."
            )
        check_shape(array, spec, where, first=0)


def meant(name: str, candidates: Iterable[str]) -> str:
    """End of a message about an unknown name: the nearest known one, or all of them."""
    names = list(candidates)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected {listed(names)}."


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names for a message, not too many of them."""
    items = list(names)
    text = ", ".join(items[:most])
    return (text + (f" and {len(items) - most} more" if len(items) > most else "")) or "nothing"


def check_shape(array: np.ndarray, spec: InputSpec, where: str, *, first: int = 1) -> None:
    """Compare ranks and fixed axes; axis 0 is the batch, which ``SampleSet`` arranges."""
    expected = "[" + ", ".join("?" if d is None else str(d) for d in spec.shape) + "]"
    if array.ndim != len(spec.shape):
        raise CalibrationError(
            f"{where}: '{spec.name}' has {array.ndim} axes {list(array.shape)}, "
            f"the model expects {len(spec.shape)}: {expected}."
        )
    for axis, (have, want) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(want, int) and axis >= first and have != want:
            raise CalibrationError(
                f"{where}: '{spec.name}' has shape {list(array.shape)}, "
                f"the model expects {expected} (axis {axis} must be {want})."
            )


def fill_missing(
    feed: Mapping[str, np.ndarray], inputs: Sequence[InputSpec]
) -> dict[str, np.ndarray]:
    """Add the inputs whose value follows from the others.

    A missing KV cache is empty; ``attention_mask`` is all ones over past and present tokens;
    ``position_ids`` count the tokens that are not masked; ``token_type_ids`` are zero. What
    cannot be derived stays missing.
    """
    result = dict(feed)
    batch = next((a.shape[0] for a in feed.values() if a.ndim), 1)
    sequence = sequence_length(feed)
    for spec in inputs:
        if spec.name in result or not is_past(spec):
            continue
        shape = _empty_past(spec, batch)
        if shape is not None:
            result[spec.name] = np.zeros(shape, spec.dtype)
    past = past_length(result, inputs)
    for spec in inputs:
        if spec.name in result or len(spec.shape) != 2 or sequence is None:
            continue
        if spec.name == "attention_mask":
            result[spec.name] = np.ones((batch, past + sequence), spec.dtype)
        elif spec.name == "token_type_ids":
            result[spec.name] = np.zeros((batch, sequence), spec.dtype)
        elif spec.name == "position_ids":
            result[spec.name] = _positions(result, batch, past, sequence).astype(spec.dtype)
    return result


def is_past(spec: InputSpec) -> bool:
    """Whether an input is (part of) a KV cache, by its name and rank."""
    return spec.name.startswith(("past_key_values.", "past.", "past_key", "past_value")) and (
        len(spec.shape) == 4
    )


def past_length(feed: Mapping[str, np.ndarray], inputs: Sequence[InputSpec]) -> int:
    """P: the longest cache in a feed, 0 without any."""
    return max((feed[s.name].shape[2] for s in inputs if is_past(s) and s.name in feed), default=0)


def _empty_past(spec: InputSpec, batch: int) -> tuple[int, ...] | None:
    """[B, Hkv, 0, c], or None where a length is fixed or a width is not."""
    rows, heads, length, width = spec.shape
    if isinstance(length, int) and length != 0:
        return None
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    return (rows if isinstance(rows, int) else batch, heads, 0, width)


def _positions(feed: Mapping[str, np.ndarray], batch: int, past: int, sequence: int) -> np.ndarray:
    mask = feed.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] != past + sequence:
        return np.tile(np.arange(past, past + sequence), (batch, 1))
    counted = np.cumsum(mask != 0, axis=1) - 1
    result: np.ndarray = np.maximum(counted, 0)[:, past:]
    return result
