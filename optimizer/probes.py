"""The few short feeds on which exact passes are proven.

From sample data where there is some, else made up: two rows, one of them padded, and, where the
model has a KV cache, feeds with a past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optimizer.errors import CalibrationError
from optimizer.feeds import Sizes, synthesize
from optimizer.samples import InputSpec, SampleSet, fill_missing, is_past, past_length

_ROWS = 2
_TOKENS = 12
_PAST = 7
#: Tokens of the last row that are padding.
_PADDING = 3
_AXIS = 6


@dataclass(frozen=True)
class Probe:
    """One feed and which of its tokens count.

    Attributes:
        feed: Complete.
        valid: [B, P+S] bool over past and new tokens; None = all.
        tokens: Number of tokens (or rows, without tokens) compared.
    """

    feed: dict[str, np.ndarray]
    valid: np.ndarray | None
    tokens: int

    def rows(self, array: np.ndarray) -> np.ndarray:
        """The entries of an output that belong to valid tokens, flattened or not."""
        if self.valid is None or array.ndim < 2:
            return array
        picked: np.ndarray
        batch, total = self.valid.shape
        if array.shape[0] != batch:
            return array
        # A cache [B, H, T, c] (T may be longer than the tokens), or tokens [B, S, ...].
        if array.ndim == 4 and array.shape[2] >= total > array.shape[1]:
            picked = array[:, :, :total].transpose(0, 2, 1, 3)[self.valid]
            return picked
        if array.ndim >= 2 and array.shape[1] <= total and array.shape[1] == self.sequence:
            picked = array[self.valid[:, -array.shape[1] :]]
            return picked
        return array

    @property
    def sequence(self) -> int:
        """S, or 0 without tokens."""
        ids = self.feed.get("input_ids")
        return int(ids.shape[1]) if ids is not None and ids.ndim == 2 else 0


def make_probes(
    inputs: Sequence[InputSpec], samples: SampleSet | None = None, *, seed: int = 0
) -> list[Probe]:
    """Feeds for a model with ``inputs``.

    Args:
        inputs: What the model accepts.
        samples: Where token ids (or whole samples, for models without tokens) are taken from.
        seed: Of everything that is made up.

    Raises:
        CalibrationError: An input can neither be taken from the data nor made up.
    """
    rng = np.random.default_rng(seed)
    ids = next((s for s in inputs if s.name == "input_ids" and len(s.shape) == 2), None)
    if ids is None:
        return [_plain(inputs, samples, rng)]
    probes = [_tokens(inputs, ids, _ids(ids, samples, rng), 0, rng)]
    if any(is_past(s) for s in inputs):
        taken = probes[0].feed[ids.name]
        # One step of decoding for all rows, and a longer piece of one row: caches that are filled
        # in place take no more than that.
        pieces = (taken[:, :1], taken[:1, : _TOKENS // 3])
        probes += [_tokens(inputs, ids, piece, _PAST, rng) for piece in pieces]
    return probes


def _plain(
    inputs: Sequence[InputSpec], samples: SampleSet | None, rng: np.random.Generator
) -> Probe:
    """A feed for a model without tokens."""
    if samples is not None:
        feed = next(samples.bind(inputs).iterate(_ROWS)).feed
    else:
        named = {
            d: _AXIS for s in inputs for d in s.shape[1:] if isinstance(d, str) and d is not None
        }
        feed = synthesize(inputs, Sizes(batch=_ROWS, sequence=_TOKENS, named=named), rng)
    rows = max((a.shape[0] for a in feed.values() if a.ndim), default=1)
    return Probe(feed, None, rows)


def _ids(ids: InputSpec, samples: SampleSet | None, rng: np.random.Generator) -> np.ndarray:
    """[rows, tokens], the first tokens of the first samples."""
    rows, tokens = ids.shape
    rows = rows if isinstance(rows, int) else _ROWS
    tokens = tokens if isinstance(tokens, int) else _TOKENS
    found: list[np.ndarray] = []
    for sample in samples or ():
        array = sample.feed.get(ids.name)
        if array is not None and array.ndim == 2 and array.shape[1] >= tokens:
            found.append(array[:1, :tokens])
        if len(found) == rows:
            return np.concatenate(found).astype(ids.dtype)
    return synthesize([ids], Sizes(batch=rows, sequence=tokens), rng)[ids.name]


def _tokens(
    inputs: Sequence[InputSpec],
    ids: InputSpec,
    tokens: np.ndarray,
    past: int,
    rng: np.random.Generator,
) -> Probe:
    rows, sequence = tokens.shape
    sizes = Sizes(batch=rows, sequence=sequence, past=past)
    feed: dict[str, np.ndarray] = {ids.name: tokens}
    for spec in inputs:
        if is_past(spec):
            feed[spec.name] = synthesize([spec], sizes, rng)[spec.name]
    past = past_length(feed, inputs)
    valid = None
    mask = next((s for s in inputs if s.name == "attention_mask" and len(s.shape) == 2), None)
    if mask is not None and past == 0 and rows > 1 and sequence > _PADDING:
        valid = np.ones((rows, sequence), bool)
        valid[-1, -_PADDING:] = False
        feed[mask.name] = valid.astype(mask.dtype)
    feed = fill_missing(feed, inputs)
    rest = [s for s in inputs if s.name not in feed]
    feed.update(synthesize(rest, sizes, rng))
    _check_extents(feed, inputs)
    count = rows * sequence if valid is None else int(valid.sum())
    return Probe({s.name: feed[s.name] for s in inputs}, valid, count)


def _check_extents(feed: Mapping[str, np.ndarray], inputs: Sequence[InputSpec]) -> None:
    for spec in inputs:
        shape = feed[spec.name].shape
        for axis, size in enumerate(spec.shape):
            if isinstance(size, int) and shape[axis] != size:
                raise CalibrationError(
                    f"no feed can be made up: axis {axis} of input '{spec.name}' must be {size}, "
                    f"its tokens give {shape[axis]}."
                )
