"""Text that a language model samples itself, to be calibrated on when there is no other data.

Source: the data-free scheme of LLM-QAT (Liu et al., 2023, arXiv 2305.17888, section 2.1): the
first tokens are taken greedily, the rest sampled from the model's distribution. Where the start
token is known, text starts with it; otherwise with a random token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer.calibration import input_specs
from optimizer.errors import CalibrationError, OptimizerError
from optimizer.metrics import log_softmax
from optimizer.runners.ort import OrtRunner
from optimizer.samples import InputSpec, fill_missing, is_past

#: Metadata key of the model: id of the token that starts a text.
START_KEY = "optimize.bos_token_id"

_SEED = 20240
_BATCH = 16
#: Tokens taken greedily after a random first token (LLM-QAT: 3 to 5).
_GREEDY = 3
#: Texts are not made shorter than this to fit a model.
_SHORTEST = 16


def self_samples(
    model: ir.Model,
    samples: int = 32,
    length: int = 128,
    *,
    start: int | None = None,
    threads: int = 1,
    custom_ops: Sequence[str | Path] = (),
) -> dict[str, np.ndarray]:
    """Sample token ids from a causal language model, with and without KV cache.

    The result is the same for the same model and arguments: the seed is fixed.

    Args:
        model: Maps ``input_ids`` to ``logits``.
        samples: Number of texts.
        length: Tokens per text; halved until the model takes it (learned positions end somewhere).
        start: Id of the first token; None = the model's metadata, else random.
        threads: As for ``OrtRunner``.
        custom_ops: As for ``OrtRunner``.

    Returns:
        ``{"input_ids": [samples, length] int64}``, as ``samples.load_samples`` takes it.

    Raises:
        CalibrationError: The model does not map ``input_ids`` to ``logits``, or needs inputs that
            do not follow from token ids.
    """
    specs = input_specs(model)
    ids = next((s for s in specs if s.name == "input_ids"), None)
    names = [str(v.name) for v in model.graph.outputs]
    if ids is None or "logits" not in names:
        raise CalibrationError(
            "--calibration self: only a language model can write its own text: expected an input "
            f"'input_ids' and an output 'logits', found {', '.join(s.name for s in specs)} -> "
            f"{', '.join(names[:3])}. Give a file with samples instead."
        )
    if start is None and (known := model.metadata_props.get(START_KEY)) is not None:
        start = int(known)
    runner = OrtRunner(model, threads=threads, custom_ops=custom_ops)
    generator = _Generator(runner, specs, ids)
    length = generator.reach(length)
    rng = np.random.default_rng(_SEED)
    rows = [
        generator.run(min(_BATCH, samples - done), length, start, rng)
        for done in range(0, samples, _BATCH)
    ]
    return {"input_ids": np.concatenate(rows)}


class _Generator:
    """Extends a batch of token rows, one token at a time."""

    def __init__(self, runner: OrtRunner, specs: Sequence[InputSpec], ids: InputSpec) -> None:
        self._runner = runner
        self._specs = specs
        self._ids = ids
        self._cache = _cache_names([s.name for s in specs if is_past(s)], runner.output_names)

    def reach(self, length: int) -> int:
        """The largest of ``length``, its half, ... that the model runs on."""
        while length > _SHORTEST:
            try:
                self._runner.run(self._feed(np.zeros((1, length), np.int64), {}))
            except OptimizerError:
                length //= 2
            else:
                break
        return length

    def run(
        self, rows: int, length: int, start: int | None, rng: np.random.Generator
    ) -> np.ndarray:
        """Return [rows, length] int64."""
        vocab = self._ids.vocab
        if start is not None:
            first = np.full(rows, start)
        elif vocab is not None:
            first = rng.integers(0, vocab, rows)
        else:
            raise CalibrationError(
                "--calibration self: the model's vocabulary is unknown (its token table is not a "
                "constant); give a file with samples instead."
            )
        tokens = np.zeros((rows, length), np.int64)
        tokens[:, 0] = first
        past: dict[str, np.ndarray] = {}
        for t in range(1, length):
            known = tokens[:, t - 1 : t] if past else tokens[:, :t]
            outputs = self._runner.run(self._feed(known, past))
            past = {name: outputs[source] for name, source in self._cache.items()}
            logits = outputs["logits"][:, -1].astype(np.float64)
            greedy = start is None and t <= _GREEDY
            tokens[:, t] = logits.argmax(-1) if greedy else _draw(logits, rng)
        return tokens

    def _feed(self, ids: np.ndarray, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed = {self._ids.name: ids.astype(self._ids.dtype), **past}
        filled = fill_missing(feed, self._specs)
        for spec in self._specs:
            if spec.name not in filled:
                raise CalibrationError(
                    f"--calibration self: input '{spec.name}' does not follow from token ids; give "
                    "a file with samples instead."
                )
        return filled


def _draw(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One token per row of [rows, vocab] from softmax(logits), by the Gumbel-max trick."""
    noise = rng.gumbel(size=logits.shape)
    result: np.ndarray = (log_softmax(logits) + noise).argmax(-1)
    return result


def _cache_names(pasts: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Cache input name -> output that holds its next value.

    Raises:
        CalibrationError: An input has no such output.
    """
    result = {}
    for name in pasts:
        candidates = [
            name.replace("past_key_values", "present", 1),
            name.replace("past", "present", 1),
        ]
        found = next((c for c in candidates if c in outputs), None)
        if found is None:
            raise CalibrationError(
                f"--calibration self: no output holds the next value of cache input '{name}'; "
                f"expected '{candidates[0]}'. Give a file with samples instead."
            )
        result[name] = found
    return result
