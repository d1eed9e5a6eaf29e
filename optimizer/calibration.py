"""Sample data at work: statistics of activations, and the measured drift of a model.

Everything streams: memory depends on the model and the batch, not on the number of samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer.errors import CalibrationError
from optimizer.metrics import Drift, DriftMeter
from optimizer.observers import (
    ChannelRange,
    ChannelSquareSum,
    Extreme,
    Observer,
    RowMaximum,
    TokenCosine,
    valid_rows,
)
from optimizer.runners.base import Runner
from optimizer.runners.ort import OrtRunner
from optimizer.samples import Batch, InputSpec, SampleSet, sequence_length, valid_tokens

__all__ = [
    "Calibration",
    "ChannelRange",
    "ChannelSquareSum",
    "Extreme",
    "Observer",
    "Reference",
    "RowMaximum",
    "TokenCosine",
    "input_specs",
    "valid_rows",
]

logger = logging.getLogger(__name__)

#: Tokens per batch that calibration aims at; more only costs memory.
_BATCH_TOKENS = 1024
_MAX_BATCH = 16
_DEFAULT_BATCH = 8

#: Outputs of a reference model that are kept in memory; beyond, they are computed again.
REFERENCE_BYTES = 1 << 28

#: Operators whose output holds the token ids of their first input.
_SAME_IDS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """What the inputs of ``model`` accept; the vocabulary is the length of the table looked up."""
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        dims: tuple[int | str | None, ...] = ()
        if value.shape is not None:
            dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        vocab = _vocabulary(value) if np.dtype(dtype).kind in "iu" else None
        specs.append(InputSpec(str(value.name), np.dtype(dtype), dims, vocab))
    return tuple(specs)


def _vocabulary(ids: ir.Value) -> int | None:
    """Rows of the constant table that ``ids`` indexes directly, or None."""
    for node, index in ids.uses():
        if node.op_type in _SAME_IDS and index == 0 and node.domain == "":
            rows = _vocabulary(node.outputs[0])
        elif node.op_type == "Gather" and index == 1 and node.attributes.get_int("axis", 0) == 0:
            rows = _table_rows(node.inputs[0])
        else:
            rows = None
        if rows is not None:
            return rows
    return None


def _table_rows(value: ir.Value | None) -> int | None:
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            rows = tensor.shape[0] if len(tensor.shape) == 2 else None
            return rows if isinstance(rows, int) else None
        producer = value.producer()
        if producer is None or producer.op_type not in {"DequantizeLinear", "Cast", "Identity"}:
            return None
        value = producer.inputs[0]
    return None


def primary_output(model: ir.Model) -> str:
    """The output that drift is measured on: ``logits``, or the first float output.

    Raises:
        CalibrationError: The model has no float output.
    """
    names = [str(v.name) for v in model.graph.outputs]
    if "logits" in names:
        return "logits"
    for value in model.graph.outputs:
        floating = value.dtype is None or value.dtype.is_floating_point()
        if floating and not str(value.name).startswith("present"):
            return str(value.name)
    raise CalibrationError(
        f"drift cannot be measured: none of the outputs ({', '.join(names)}) is a float tensor."
    )


@dataclass(frozen=True)
class Reference:
    """What a model answered to the samples.

    Attributes:
        output: Name of the output.
        scores: Its rows are class scores.
        causal: Token t's row depends on tokens 0..t only, so it predicts token t+1.
        samples: The samples, bound to the model's inputs.
        batch: Samples per batch.
    """

    output: str
    scores: bool
    causal: bool
    samples: SampleSet
    batch: int
    _kept: tuple[np.ndarray, ...]
    _runner: Runner | None

    def array(self, index: int, batch: Batch) -> np.ndarray:
        """The output for one batch."""
        if index < len(self._kept):
            return self._kept[index]
        if self._runner is None:  # pragma: no cover - the number of batches is fixed
            raise CalibrationError("sample data changed between two passes over it.")
        return self._runner.run(batch.feed)[self.output]


class Calibration:
    """Samples and how to run models on them.

    Attributes:
        samples: Bound to the inputs of the model first seen; bound anew for others.
        progress: Called with (samples done, samples in total) after every batch.
    """

    def __init__(
        self,
        samples: SampleSet,
        *,
        batch: int | None = None,
        threads: int = 1,
        custom_ops: Sequence[str | Path] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.samples = samples
        self.progress = progress
        self._batch = batch
        self._threads = threads
        self._custom_ops = tuple(custom_ops)

    def limited(self, samples: int) -> Calibration:
        """The same over the first ``samples`` samples."""
        return Calibration(
            self.samples.limited(samples),
            batch=self._batch,
            threads=self._threads,
            custom_ops=self._custom_ops,
            progress=self.progress,
        )

    def sized(self, batch: int) -> Calibration:
        """The same with this many samples per batch."""
        return Calibration(
            self.samples,
            batch=batch,
            threads=self._threads,
            custom_ops=self._custom_ops,
            progress=self.progress,
        )

    @property
    def batch(self) -> int:
        """Samples per batch."""
        if self._batch is None:
            first = next(iter(self.samples))
            sequence = sequence_length(first.feed)
            size = _BATCH_TOKENS // max(1, sequence) if sequence else _DEFAULT_BATCH
            self._batch = min(max(1, size), _MAX_BATCH)
        return self._batch

    def runner(self, model: ir.Model, extra_outputs: Sequence[ir.Value] = ()) -> OrtRunner:
        """A runner of ``model`` as it is now."""
        return OrtRunner(
            model,
            threads=self._threads,
            extra_outputs=extra_outputs,
            custom_ops=self._custom_ops,
        )

    def observe(self, model: ir.Model, observers: Sequence[Observer]) -> None:
        """Run all samples once through ``model`` as it is now and show them to the observers.

        Raises:
            CalibrationError: The samples do not fit the model's inputs.
        """
        wanted = list(dict.fromkeys(v for o in observers for v in o.values))
        if not wanted:
            return
        samples = self.samples.bind(input_specs(model))
        runner = self.runner(model, wanted)
        done = 0
        for batch in samples.iterate(self.batch):
            arrays = runner.run(batch.feed)
            valid = valid_in(batch)
            for observer in observers:
                observer.update(tuple(arrays[str(v.name)] for v in observer.values), valid)
            done += batch.samples
            self._report(done, samples.count)

    def reference(self, model: ir.Model, output: str | None = None) -> Reference:
        """Run ``model`` on all samples and keep one output, its primary one, for ``drift``."""
        kept = primary_output(model) if output is None else output
        return self.reference_of(self.runner(model), input_specs(model), kept)

    def reference_of(self, runner: Runner, specs: Sequence[InputSpec], output: str) -> Reference:
        """The same with whatever runs a model: its inputs accept ``specs``."""
        samples = self.samples.bind(specs)
        kept: list[np.ndarray] = []
        size, done, complete = 0, 0, True
        for batch in samples.iterate(self.batch):
            array = runner.run(batch.feed)[output]
            size += array.nbytes
            if size > REFERENCE_BYTES:
                complete = False
                break
            kept.append(array)
            done += batch.samples
            self._report(done, samples.count)
        scores = output == "logits" or _is_vocabulary(kept, specs)
        causal = scores and _is_causal(runner, samples, output)
        return Reference(
            output, scores, causal, samples, self.batch, tuple(kept), None if complete else runner
        )

    def drift(self, reference: Reference, model: ir.Model) -> Drift:
        """Measure how far ``model`` is from ``reference``, over valid tokens.

        Raises:
            CalibrationError: The model lacks the output, or its shape differs.
        """
        return self.drift_of(reference, self.runner(model), input_specs(model))

    def drift_of(self, reference: Reference, runner: Runner, specs: Sequence[InputSpec]) -> Drift:
        """The same with whatever runs a model: its inputs accept ``specs``."""
        samples = reference.samples.bind(specs)
        if reference.output not in runner.output_names:
            raise CalibrationError(
                f"drift cannot be measured: the model has no output '{reference.output}' any more; "
                f"found {', '.join(runner.output_names[:4])}."
            )
        meter = DriftMeter(scores=reference.scores)
        pairs = zip(
            reference.samples.iterate(reference.batch),
            samples.iterate(reference.batch),
            strict=True,
        )
        done = 0
        for index, (original, batch) in enumerate(pairs):
            expected = reference.array(index, original)
            found = runner.run(batch.feed)[reference.output]
            if expected.shape != found.shape:
                raise CalibrationError(
                    f"drift cannot be measured: output '{reference.output}' has shape "
                    f"{list(found.shape)}, the reference {list(expected.shape)}."
                )
            valid = valid_in(original)
            rows = expected.shape[:-1]
            meter.update(
                expected,
                found,
                valid if valid is not None and valid.shape == rows else None,
                targets_in(original, rows) if reference.causal else None,
            )
            done += batch.samples
            self._report(done, samples.count)
        return meter.result()

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


def valid_in(batch: Batch) -> np.ndarray | None:
    """[B, S] bool: not padding by the attention mask, nor by an extra array ``valid``."""
    sequence = sequence_length(batch.feed)
    if sequence is None:
        return None
    valid = valid_tokens(batch.feed, sequence)
    extra = batch.extras.get("valid")
    if extra is not None and extra.ndim == 2 and extra.shape[1] == sequence:
        valid = extra != 0 if valid is None else valid & (extra != 0)
    return valid


def targets_in(batch: Batch, rows: tuple[int, ...]) -> np.ndarray | None:
    """[B, S] token that each row should predict, -1 where none counts.

    An array ``targets`` is taken as it is. Otherwise the target of row t is token t+1, counted
    where ``valid`` [t] says so, or, without it, where both tokens are not padding.
    """
    given = batch.extras.get("targets")
    if given is not None and given.shape == rows:
        return given
    ids = batch.feed.get("input_ids")
    if ids is None or ids.shape != rows or len(rows) != 2 or rows[1] < 2:
        return None
    targets = np.full(rows, -1, np.int64)
    targets[:, :-1] = ids[:, 1:]
    counted = batch.extras.get("valid")
    if counted is not None and counted.shape == rows:
        return np.where(counted != 0, targets, -1)
    mask = valid_tokens(batch.feed, rows[1])
    if mask is not None:
        targets[~mask] = -1
        targets[:, :-1][~mask[:, 1:]] = -1
    return targets


def _is_vocabulary(arrays: Sequence[np.ndarray], specs: Sequence[InputSpec]) -> bool:
    vocab = next((s.vocab for s in specs if s.name == "input_ids"), None)
    return bool(arrays) and arrays[0].ndim == 3 and arrays[0].shape[-1] == vocab


def _is_causal(runner: Runner, samples: SampleSet, output: str) -> bool:
    """Tried out: does changing the last token leave all earlier rows alone?"""
    feed = next(samples.iterate(1)).feed
    ids = feed.get("input_ids")
    spec = next((s for s in samples.inputs if s.name == "input_ids"), None)
    if ids is None or ids.ndim != 2 or ids.shape[1] < 2:
        return False
    vocab = spec.vocab if spec is not None and spec.vocab else int(ids.max()) + 1
    changed = ids.copy()
    changed[:, -1] = (changed[:, -1] + 1) % max(vocab, 2)
    before = runner.run(feed)[output]
    after = runner.run({**feed, "input_ids": changed})[output]
    if before.shape[:-1] != ids.shape:
        return False
    # Float noise is 1e-6 of the values; attention to a later token moves logits by 1e-2 and more.
    return bool(np.allclose(before[:, :-1], after[:, :-1], rtol=1e-4, atol=1e-5)) and not bool(
        np.array_equal(before[:, -1], after[:, -1])
    )
