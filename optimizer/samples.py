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
from optimizer.inputs import (
    InputSpec,
    check_feed,
    check_shape,
    fill_missing,
    is_past,
    listed,
    meant,
    past_length,
    sequence_length,
    valid_tokens,
)
from optimizer.sample_sources import Source, open_source

logger = logging.getLogger(__name__)

__all__ = [
    "Batch",
    "InputSpec",
    "SampleSet",
    "SampleSpec",
    "check_feed",
    "fill_missing",
    "is_past",
    "load_samples",
    "past_length",
    "sequence_length",
    "valid_tokens",
]

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
class Batch:
    """One feed and the arrays that came with it.

    Attributes:
        feed: Model inputs by name.
        extras: Other arrays by name ("valid", "labels", ...), stacked like the feed.
        samples: Number of samples in it.
        filled: Names of inputs that the data lacks and that were filled in.
    """

    feed: dict[str, np.ndarray]
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    samples: int = 1
    filled: tuple[str, ...] = ()


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
        count, extras, filled = 0, dict[str, None](), dict[str, None]()
        raw_pixels: set[str] = set()
        for sample in self:
            count += 1
            raw_pixels.update(_raw_pixels(sample.feed))
            extras.update(dict.fromkeys(sample.extras))
            filled.update(dict.fromkeys(sample.filled))
        if filled:
            logger.info("%s: filled in %s, which the data lacks", self._option, listed(filled))
        for name in sorted(raw_pixels):
            logger.warning(
                "%s: '%s' holds values from 0 up to 255: if the model expects normalised pixels, "
                "apply its preprocessing first",
                self._option,
                name,
            )
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
                f"{where}: '{name}' is not an input of the model; {meant(name, missing)}"
            )
        extras[name] = np.asarray(array)
    feed = {s.name: _converted(np.asarray(raw[s.name]), s, where) for s in inputs if s.name in raw}
    filled = fill_missing(feed, inputs)
    for name in missing:
        if name not in filled:
            found = listed(raw)
            raise CalibrationError(
                f"{where}: input '{name}' is missing; found {found}, expected {listed(names)}."
            )
    feed = {name: filled[name] for name in names}
    for spec in inputs:
        _check_values(feed[spec.name], spec, where)
    return Batch(feed, extras, filled=tuple(missing))


def _converted(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """``array`` in the model's element type where nothing is lost by it.

    Between float types the precision is the model's; integers must keep their values. Integers
    are not turned into floats: raw 8-bit pixels for a float input are missing preprocessing.
    """
    check_shape(array, spec, where)
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


def _raw_pixels(feed: Mapping[str, np.ndarray]) -> list[str]:
    """Names of images that look as if nobody had scaled them.

    Missing preprocessing is easily taken for damage done by a pass.
    """
    return [
        name
        for name, array in feed.items()
        if array.ndim == 4
        and array.dtype.kind == "f"
        and array.size
        and array.min() >= 0
        and 32 < array.max() <= 255
    ]


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
