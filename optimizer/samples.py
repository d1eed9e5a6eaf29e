"""Sample data for calibration and evaluation: where it comes from, and what fits a model.

A *sample* is one feed with batch size one (or, where a file says so, one whole feed). Whatever
the source, a ``SampleSet`` is iterated lazily and can be bound to another model's inputs.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from optimizer.errors import CalibrationError
from optimizer.sample_sources import Source, open_source

logger = logging.getLogger(__name__)

#: Array names that are data about the samples, never fed to a model.
KNOWN_EXTRAS = ("valid", "labels", "targets")

#: What ``load_samples`` reads.
SampleSpec: TypeAlias = (
    str
    | Path
    | Mapping[str, np.ndarray]
    | Callable[[], Iterable[Mapping[str, np.ndarray]]]
    | Iterable[Mapping[str, np.ndarray]]
)


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


@dataclass(frozen=True)
class Batch:
    """One feed and the arrays that came with it.

    Attributes:
        feed: Model inputs by name.
        extras: Other arrays by name ("valid", "labels", ...), stacked like the feed.
        samples: Number of samples in it.
    """

    feed: dict[str, np.ndarray]
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    samples: int = 1


class SampleSet:
    """Samples bound to the inputs of a model.

    Attributes:
        inputs: What the model accepts.
        count: Number of samples.
        input_names: Names of the feeds' arrays, in the model's order.
        extras: Names of the arrays kept aside.
    """

    def __init__(
        self,
        source: Source,
        inputs: Sequence[InputSpec],
        *,
        limit: int | None = None,
        option: str = "--calibration",
        counted: tuple[int, tuple[str, ...]] | None = None,
    ) -> None:
        """Check all samples, unless the caller has ``counted`` samples and extras already."""
        self._source = source
        self.inputs = tuple(inputs)
        self._limit = limit
        self._option = option
        self.input_names = tuple(spec.name for spec in inputs)
        self.count, self.extras = counted or self._look()
        if self.count == 0:
            raise CalibrationError(
                f"{option}: {source.where} holds no samples; at least one is needed."
            )

    def _look(self) -> tuple[int, tuple[str, ...]]:
        """Go through all samples once: a fault in the last one is found before any work."""
        count, extras = 0, dict[str, None]()
        for sample in self:
            count += 1
            extras.update(dict.fromkeys(sample.extras))
        return count, tuple(extras)

    def __iter__(self) -> Iterator[Batch]:
        """Yield every sample, checked."""
        for index, raw in enumerate(self._source):
            if self._limit is not None and index >= self._limit:
                return
            yield _prepare(raw, self.inputs, f"{self._option}: {self._source.label(index)}")

    def bind(self, inputs: Sequence[InputSpec]) -> SampleSet:
        """The same samples for another model's inputs."""
        if tuple(inputs) == self.inputs:
            return self
        return SampleSet(
            self._source,
            inputs,
            limit=self._limit,
            option=self._option,
            counted=(self.count, self.extras),
        )

    def limited(self, samples: int) -> SampleSet:
        """The first ``samples`` samples."""
        if samples >= self.count:
            return self
        return SampleSet(
            self._source,
            self.inputs,
            limit=samples,
            option=self._option,
            counted=(samples, self.extras),
        )

    def batches(self, size: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of up to ``size`` samples; see ``iterate``."""
        return (batch.feed for batch in self.iterate(size))

    def iterate(self, size: int = 1) -> Iterator[Batch]:
        """Batches of up to ``size`` consecutive samples whose shapes are equal.

        A model whose first axis is fixed decides the size itself.
        """
        fixed = self._fixed_batch()
        size = fixed or max(1, size)
        pending: list[Batch] = []
        for sample in self:
            if pending and (len(pending) >= size or not _stackable(pending[0], sample)):
                yield from self._flush(pending, fixed)
                pending = []
            pending.append(sample)
        yield from self._flush(pending, fixed)

    def _flush(self, pending: list[Batch], fixed: int | None) -> Iterator[Batch]:
        if not pending:
            return
        if fixed is not None and len(pending) % fixed:
            # The last batch of a model with a fixed batch size: repeat its last sample.
            pending = pending + [pending[-1]] * (fixed - len(pending) % fixed)
        yield _stack(pending)

    def _fixed_batch(self) -> int | None:
        """The batch size that the model insists on, if larger than what one sample holds."""
        rows = {s.shape[0] for s in self.inputs if s.shape and isinstance(s.shape[0], int)}
        if len(rows) != 1:
            return None
        wanted = int(next(iter(rows)))
        first = next(iter(self))
        have = {a.shape[0] for a in first.feed.values() if a.ndim}
        return max(1, wanted // have.pop()) if len(have) == 1 else None

    def digest(self) -> str:
        """SHA-256 over names, element types, shapes and bytes of all samples, in order."""
        result = hashlib.sha256()
        for sample in self:
            for name, array in sorted((*sample.feed.items(), *sample.extras.items())):
                result.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
                result.update(np.ascontiguousarray(array).tobytes())
        return result.hexdigest()


def load_samples(
    spec: SampleSpec,
    inputs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    option: str = "--calibration",
) -> SampleSet:
    """Open sample data and check every sample of it against ``inputs``.

    Args:
        spec: A ``.npz`` file with one array per input, stacked along the first axis; a folder
            with one ``.npz`` per feed; ``module:function`` (called once per pass over the data,
            yields dicts); a mapping of stacked arrays; a callable; an iterable of dicts.
        inputs: What the model accepts.
        limit: Use only the first samples.
        option: What messages call this data.

    Raises:
        CalibrationError: The data cannot be read, is empty or does not fit; the message says
            which sample and array, what was found and what was expected.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"{option}: {limit} samples requested; at least one is needed.")
    ranks = {s.name: len(s.shape) for s in inputs}
    return SampleSet(open_source(spec, ranks, option), inputs, limit=limit, option=option)


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
                f"{where}: '{name}' is not an input of the model; {_meant(name, names)}"
            )
    for spec in inputs:
        if spec.name not in feed:
            raise CalibrationError(
                f"{where}: input '{spec.name}' is missing; found {_listed(feed)}, "
                f"expected {_listed(names)}."
            )
        array = feed[spec.name]
        if array.dtype != spec.dtype:
            raise CalibrationError(
                f"{where}: '{spec.name}' is {array.dtype}, the model expects {spec.dtype}."
            )
        _check_shape(array, spec, where, first=0)


def _meant(name: str, candidates: Iterable[str]) -> str:
    names = list(candidates)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected {_listed(names)}."


def _listed(names: Iterable[str], most: int = 6) -> str:
    items = list(names)
    text = ", ".join(items[:most])
    return (text + (f" and {len(items) - most} more" if len(items) > most else "")) or "nothing"


def _check_shape(array: np.ndarray, spec: InputSpec, where: str, *, first: int = 1) -> None:
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


def _prepare(raw: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], where: str) -> Batch:
    """Check one sample, fill in what can be derived, and set other arrays aside."""
    names = [spec.name for spec in inputs]
    missing = [name for name in names if name not in raw]
    extras: dict[str, np.ndarray] = {}
    for name, array in raw.items():
        if name in names:
            continue
        if name not in KNOWN_EXTRAS and difflib.get_close_matches(name, missing, 1, 0.8):
            raise CalibrationError(
                f"{where}: '{name}' is not an input of the model; {_meant(name, missing)}"
            )
        extras[name] = np.asarray(array)
    feed = {s.name: _converted(np.asarray(raw[s.name]), s, where) for s in inputs if s.name in raw}
    filled = fill_missing(feed, inputs)
    for name in missing:
        if name not in filled:
            found = _listed(raw)
            raise CalibrationError(
                f"{where}: input '{name}' is missing; found {found}, expected {_listed(names)}."
            )
    feed = {name: filled[name] for name in names}
    for spec in inputs:
        _check_values(feed[spec.name], spec, where)
    return Batch(feed, extras)


def _converted(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """``array`` in the model's element type where nothing is lost by it.

    Between float types the precision is the model's; integers must keep their values. Integers
    are not turned into floats: raw 8-bit pixels for a float input are missing preprocessing.
    """
    _check_shape(array, spec, where)
    have, want = array.dtype, spec.dtype
    if have == want:
        return array
    integers = "iub"
    if (have.kind == "f" and want.kind == "f") or (have.kind == "b" and want.kind in integers):
        return array.astype(want)
    if have.kind in integers and want.kind in integers:
        result = array.astype(want)
        if np.array_equal(result.astype(have), array):
            return result
    hint = ""
    if have.kind in "iu" and want.kind == "f":
        hint = " Apply the model's preprocessing (scaling, normalisation) first."
    raise CalibrationError(f"{where}: '{spec.name}' is {have}, the model expects {want}.{hint}")


def _check_values(array: np.ndarray, spec: InputSpec, where: str) -> None:
    if array.dtype.kind == "f" and array.size and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise CalibrationError(
            f"{where}: '{spec.name}' holds {count} NaN or infinite values; all must be finite."
        )
    if spec.vocab is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= spec.vocab:
            wrong = low if low < 0 else high
            raise CalibrationError(
                f"{where}: '{spec.name}' holds token id {wrong}, the model's vocabulary is "
                f"0..{spec.vocab - 1}; use the tokenizer of this model."
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
    added: list[str] = []
    for spec in inputs:
        if spec.name in result or not is_past(spec):
            continue
        shape = _empty_past(spec, batch)
        if shape is not None:
            result[spec.name] = np.zeros(shape, spec.dtype)
            added.append(spec.name)
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
        else:
            continue
        added.append(spec.name)
    if added:
        logger.debug("filled in inputs that the data lacks: %s", _listed(added))
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


def _stackable(a: Batch, b: Batch) -> bool:
    return _same_shapes(a.feed, b.feed) and _same_shapes(a.extras, b.extras)


def _same_shapes(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and (a[k].ndim > 0 or a[k] == b[k]) for k in a
    )


def _stack(samples: Sequence[Batch]) -> Batch:
    if len(samples) == 1:
        return samples[0]

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts[0].ndim else parts[0]

    first = samples[0]
    return Batch(
        {k: joined([s.feed[k] for s in samples]) for k in first.feed},
        {k: joined([s.extras[k] for s in samples]) for k in first.extras},
        len(samples),
    )
