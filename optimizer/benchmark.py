"""Measures latencies of models against each other, in one process, taking turns.

Clock speed and neighbours on the machine change over seconds; models that take turns within
milliseconds see the same conditions, so the ratio of two latencies of one round is steadier than
either latency. The latency of a turn is that of its fastest run: whatever interrupts a run only
ever adds to it. The result is the median of the rounds' ratios, with the 95 % interval of that
median by bootstrap (percentile method, Efron and Tibshirani 1993, section 13.3).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.errors import ExportError, OptionError
from optimizer.machine import describe_machine
from optimizer.operands import Operand, Setup, Timed, make_operand

__all__ = ["BenchmarkResult", "Operand", "Setup", "Timing", "benchmark", "compare", "write_result"]

_WARM_UP = 3
_MIN_ROUNDS = 5
#: One turn of a model lasts at least this long (seconds), in as many runs as that takes.
_TURN = 0.02
_MAX_RUNS = 100
#: Rounds stop early when the 95 % interval of every ratio is this narrow, relative to it.
_PRECISION = 0.005
_RESAMPLES = 1000


@dataclass(frozen=True)
class Timing:
    """Latencies of one model.

    Attributes:
        label: What the model is called.
        median_ms, min_ms, p95_ms: Over all timed runs.
        speedup: Median over rounds of (first model's latency / this one's).
        quartiles: 25 % and 75 % of these ratios.
        interval: 95 % confidence interval of the median ratio.
        runs: Number of timed runs.
        load_seconds: Time to create the session.
        device: "cpu", or the GPU that ran it.
    """

    label: str
    median_ms: float
    min_ms: float
    p95_ms: float
    speedup: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    runs: int
    load_seconds: float
    device: str = "cpu"


@dataclass(frozen=True)
class BenchmarkResult:
    """Timings of several models, the first of them being the baseline.

    Attributes:
        timings: One per model, in the order given.
        rounds: Number of turns each model had.
        threads: Threads within an operator.
        shapes: Shapes of the baseline's inputs.
        machine: See ``machine.describe_machine``.
    """

    timings: tuple[Timing, ...]
    rounds: int
    threads: int
    shapes: Mapping[str, tuple[int, ...]]
    machine: Mapping[str, Any]

    def speedup(self) -> float:
        """How many times as fast as the first model the last one is."""
        return self.timings[-1].speedup

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "timings": [
                {**t.__dict__, "quartiles": list(t.quartiles), "interval": list(t.interval)}
                for t in self.timings
            ],
            "rounds": self.rounds,
            "threads": self.threads,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "machine": dict(self.machine),
        }


def benchmark(
    models: Sequence[ir.Model | str | Path],
    setup: Setup | None = None,
    *,
    labels: Sequence[str] | None = None,
    rounds: int = 30,
    seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkResult:
    """Time models against the first of them.

    Args:
        models: Graphs, ONNX files or engines.
        setup: How to run them.
        labels: Names in the result; by default the file names.
        rounds: Turns of each model, at most; fewer where the ratios are known precisely.
        seconds: Stop after this time even if fewer rounds are done.
        progress: Called with (rounds done, rounds).

    Raises:
        OptionError: There is no model.
        OptimizerError: A model cannot be loaded or run.
    """
    setup = setup or Setup()
    names = list(labels) if labels is not None else _labels(models)
    operands = [make_operand(model, setup, name) for model, name in zip(models, names, strict=True)]
    return compare(
        operands, threads=setup.threads, rounds=rounds, seconds=seconds, progress=progress
    )


def compare(
    operands: Sequence[Timed],
    *,
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkResult:
    """Time operands against the first of them; see ``benchmark``."""
    if not operands:
        raise OptionError("there is no model to measure; name at least one ONNX file.")
    repeats = [_warm_up(operand) for operand in operands]
    turns: list[list[np.ndarray]] = [[] for _ in operands]
    deadline = time.perf_counter() + seconds
    for done in itertools.count(1):
        # Nobody is always first after the clock's or the progress bar's interruption.
        for offset in range(len(operands)):
            i = (done + offset) % len(operands)
            turns[i].append(_turn(operands[i], repeats[i]))
        if progress is not None:
            progress(done, rounds)
        late = time.perf_counter() > deadline
        if done >= rounds or late or (done >= _MIN_ROUNDS and _precise(turns)):
            break
    return BenchmarkResult(
        tuple(_timing(o, turn, turns[0]) for o, turn in zip(operands, turns, strict=True)),
        len(turns[0]),
        threads,
        {name: array.shape for name, array in operands[0].feed.items()},
        describe_machine(),
    )


def _labels(models: Sequence[ir.Model | str | Path]) -> list[str]:
    return [
        f"model {i}" if isinstance(model, ir.Model) else str(model)
        for i, model in enumerate(models)
    ]


def _warm_up(operand: Timed) -> int:
    """Run a few times; returns the number of runs that fill one turn."""
    fastest = float("inf")
    for _ in range(_WARM_UP):
        started = time.perf_counter()
        operand.run()
        fastest = min(fastest, time.perf_counter() - started)
    return int(min(max(1, _TURN // max(fastest, 1e-9)), _MAX_RUNS))


def _turn(operand: Timed, repeats: int) -> np.ndarray:
    """Latencies in seconds; the first run, which finds another model's caches, does not count."""
    operand.run()
    result = np.empty(repeats)
    for i in range(repeats):
        started = time.perf_counter()
        operand.run()
        result[i] = time.perf_counter() - started
    return result


def _ratios(turns: Sequence[np.ndarray], first: Sequence[np.ndarray]) -> np.ndarray:
    """Per round: the first model's latency divided by this one's."""
    own = np.array([turn.min() for turn in turns])
    base = np.array([turn.min() for turn in first])
    result: np.ndarray = base / own
    return result


def _interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the median, with a fixed seed."""
    index = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[index], axis=1), [2.5, 97.5])
    return float(low), float(high)


def _precise(turns: Sequence[Sequence[np.ndarray]]) -> bool:
    # With one model there is no ratio; all rounds are used.
    if len(turns) < 2:
        return False
    for turn in turns[1:]:
        ratios = _ratios(turn, turns[0])
        low, high = _interval(ratios)
        if high - low > _PRECISION * float(np.median(ratios)):
            return False
    return True


def _timing(operand: Timed, turns: list[np.ndarray], first: list[np.ndarray]) -> Timing:
    runs = np.concatenate(turns) * 1e3
    ratios = _ratios(turns, first)
    quartiles = np.percentile(ratios, [25, 75])
    return Timing(
        label=operand.label,
        median_ms=float(np.median(runs)),
        min_ms=float(runs.min()),
        p95_ms=float(np.percentile(runs, 95)),
        speedup=float(np.median(ratios)),
        quartiles=(float(quartiles[0]), float(quartiles[1])),
        interval=_interval(ratios),
        runs=len(runs),
        load_seconds=operand.load_seconds,
        device=getattr(operand, "device", "cpu"),
    )


def write_result(path: Path, result: BenchmarkResult | Mapping[str, Any], **context: Any) -> None:
    """Write a result as JSON, with what else there is to say about it; all or nothing.

    Raises:
        ExportError: The file cannot be written.
    """
    content = result.as_dict() if isinstance(result, BenchmarkResult) else dict(result)
    text = json.dumps({**context, **content}, indent=2, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        file = made.open("x", encoding="utf-8")
        try:
            with file:
                file.write(text)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from error
