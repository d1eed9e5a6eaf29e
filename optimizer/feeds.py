"""Feeds made up from what a model's inputs accept: for timing, and for proofs without data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimizer.errors import CalibrationError
from optimizer.samples import InputSpec, is_past

_TOKEN_INPUTS = (
    "input_ids",
    "decoder_input_ids",
    "position_ids",
    "token_type_ids",
    "inputs_embeds",
)
#: Token ids below this are drawn where the vocabulary is unknown.
_SMALL_VOCABULARY = 32
#: Bytes of an input that are made up; a model may declare any length.
_LARGEST = 1 << 32


@dataclass(frozen=True)
class Sizes:
    """Lengths of the symbolic axes.

    Attributes:
        batch: B.
        sequence: S, new tokens.
        past: P, tokens in the KV cache.
        named: Lengths of axes by their symbolic name; these win over the roles above.
    """

    batch: int = 1
    sequence: int = 8
    past: int = 0
    named: Mapping[str, int] | None = None

    @staticmethod
    def parse(shapes: Mapping[str, int]) -> Sizes:
        """``batch``, ``sequence`` and ``past_sequence`` are roles; other names are axes."""
        roles = {"batch": "batch", "batch_size": "batch", "sequence": "sequence"}
        roles |= {"sequence_length": "sequence", "past_sequence": "past"}
        roles |= {"past_sequence_length": "past", "past": "past"}
        found = {roles[name]: size for name, size in shapes.items() if name in roles}
        return Sizes(**found, named=dict(shapes))


def synthesize(
    inputs: Sequence[InputSpec], sizes: Sizes, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random values in the right places: valid token ids, full masks, consecutive positions.

    Args:
        inputs: What the model accepts.
        sizes: Axis names that a model leaves anonymous or names at random are told apart by the
            role of the input: [B, S] for tokens, [B, P+S] for masks, [B, H, P, c] for caches.
        rng: Source of the values.

    Raises:
        CalibrationError: An axis has no length; names it and the option to give it.
    """
    if not any(is_past(spec) for spec in inputs):
        sizes = replace(sizes, past=0)
    return {spec.name: _values(spec, _shape(spec, sizes), sizes, rng) for spec in inputs}


def _shape(spec: InputSpec, sizes: Sizes) -> tuple[int, ...]:
    return tuple(_length(spec, axis, sizes) for axis in range(len(spec.shape)))


def _length(spec: InputSpec, axis: int, sizes: Sizes) -> int:
    size = spec.shape[axis]
    if isinstance(size, int):
        return size
    if size is not None and sizes.named and size in sizes.named:
        return sizes.named[size]
    role = _role(spec, axis)
    if role == "total":
        return sizes.past + sizes.sequence
    if role is not None:
        return int(getattr(sizes, role))
    example = f"{size or 'NAME'}=8"
    raise CalibrationError(
        f"input '{spec.name}' has an axis {axis} ('{size}') of unknown length; give it, for "
        f"example --shape {example}."
    )


def _role(spec: InputSpec, axis: int) -> str | None:
    if axis == 0:
        return "batch"
    if is_past(spec):
        return "past" if axis == 2 else None
    if spec.name == "attention_mask":
        return "total" if axis == len(spec.shape) - 1 else "sequence" if axis == 2 else None
    if spec.name in _TOKEN_INPUTS and axis == 1:
        return "sequence"
    # A name that says what it is, whatever the input.
    text = str(spec.shape[axis]).lower()
    if "past" in text and "+" not in text and "total" not in text:
        return "past"
    if "total" in text or "past" in text:
        return "total"
    return "sequence" if "seq" in text else "batch" if "batch" in text else None


def _values(
    spec: InputSpec, shape: tuple[int, ...], sizes: Sizes, rng: np.random.Generator
) -> np.ndarray:
    kind = spec.dtype.kind
    size = math.prod(shape) * spec.dtype.itemsize
    if size > _LARGEST:
        raise CalibrationError(
            f"input '{spec.name}' {list(shape)} would be {size / 1e9:.3g} GB of made-up numbers"
        )
    if kind in "OU":
        return np.full(shape, "text", object)
    if spec.name == "attention_mask" or kind == "b" or (kind in "iu" and "mask" in spec.name):
        return np.ones(shape, spec.dtype)  # a query that sees no key has no defined result
    if spec.name == "position_ids" and shape:
        positions = np.arange(sizes.past, sizes.past + shape[-1])
        return np.broadcast_to(positions, shape).astype(spec.dtype)
    if kind in "iu":
        if spec.name == "token_type_ids" or (spec.vocab is None and "ids" not in spec.name):
            return np.zeros(shape, spec.dtype)
        return rng.integers(0, spec.vocab or _SMALL_VOCABULARY, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)
