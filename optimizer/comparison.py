"""Compares the numbers of two models, ONNX files or engines: for ``optimize check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer.calibration import Calibration, Reference, input_specs
from optimizer.engines.plan import is_engine
from optimizer.feeds import Sizes, synthesize
from optimizer.metrics import Drift
from optimizer.model_io import load_model
from optimizer.model_tensors import belongs
from optimizer.probes import make_probes
from optimizer.runners.tensorrt import TensorRTRunner
from optimizer.samples import InputSpec, SampleSpec, is_past, load_samples


@dataclass(frozen=True)
class Comparison:
    """How far the second model is from the first.

    Attributes:
        drift: Over the primary output.
        samples: Number of samples compared.
        source: Where they come from, in words.
    """

    drift: Drift
    samples: int
    source: str


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: SampleSpec | None = None,
    samples: int | None = None,
    threads: int = 1,
    custom_ops: Sequence[str | Path] = (),
    plugins: Sequence[str | Path] = (),
) -> Comparison:
    """Run two models on the same samples.

    Args:
        first: The reference: an ONNX file, which ONNX Runtime runs on the CPU, or an engine.
        second: Likewise. Its inputs may differ in the KV cache only.
        data: See ``samples.load_samples``; None = the data beside ``first``, else made up.
        samples: Use only the first samples.
        threads: Of each run in ONNX Runtime.
        custom_ops: Libraries of custom operators.
        plugins: Libraries of plugins, for engines.

    Raises:
        ModelError: A model cannot be loaded or run.
        EngineError: An engine cannot be used here.
        MissingDependencyError: An engine, and no GPU or no TensorRT.
        CalibrationError: The data does not fit, or there is no common output.
    """
    loaded: list[ir.Model | TensorRTRunner] = [
        TensorRTRunner(path, plugins=plugins)
        if is_engine(path)
        else load_model(Path(path), custom_ops)
        for path in (first, second)
    ]
    engines = [item for item in loaded if isinstance(item, TensorRTRunner)]
    spec: SampleSpec | None = data if data is not None else beside(Path(first))
    source = str(spec) if isinstance(spec, str | Path) else "the data given"
    specs = specs_of(loaded[0])
    if spec is None:
        spec, source = made_up(specs, engines), "made-up inputs"
    found = load_samples(spec, specs, limit=samples, option="--eval")
    calibration = for_engines(Calibration(found, threads=threads, custom_ops=custom_ops), engines)
    drift = drift_between(calibration, reference_of(calibration, loaded[0]), loaded[1])
    return Comparison(drift, found.count, source)


def specs_of(model: ir.Model | TensorRTRunner) -> tuple[InputSpec, ...]:
    """What the inputs of a model or an engine accept."""
    return model.inputs if isinstance(model, TensorRTRunner) else input_specs(model)


def reference_of(calibration: Calibration, model: ir.Model | TensorRTRunner) -> Reference:
    """What a model or an engine answers to the samples."""
    if isinstance(model, TensorRTRunner):
        return calibration.reference_of(model, model.inputs, model.primary_output())
    return calibration.reference(model)


def drift_between(
    calibration: Calibration, reference: Reference, model: ir.Model | TensorRTRunner
) -> Drift:
    """How far a model or an engine is from a reference."""
    if isinstance(model, TensorRTRunner):
        return calibration.drift_of(reference, model, model.inputs)
    return calibration.drift(reference, model)


def for_engines(calibration: Calibration, engines: Sequence[TensorRTRunner]) -> Calibration:
    """The same with as many samples at a time as the profiles of engines take; one, if none."""
    most = [size for engine in engines if (size := engine.largest_batch()) is not None]
    largest = calibration.sized(min([calibration.batch, *most]))
    return largest if fit(largest, engines) else calibration.sized(1)


def fit(calibration: Calibration, engines: Sequence[TensorRTRunner]) -> bool:
    """Whether every batch of samples is in the range of a profile of each engine."""
    return all(
        engine.takes(feed)
        for engine in engines
        for feed in calibration.samples.bind(engine.inputs).batches(calibration.batch)
    )


def made_up(
    specs: Sequence[InputSpec], engines: Sequence[TensorRTRunner] = ()
) -> list[dict[str, np.ndarray]]:
    """Feeds of random values; for an engine of the usual shapes of each of its profiles."""
    if not engines:
        return [probe.feed for probe in make_probes(specs)]
    engine, rng = engines[-1], np.random.default_rng(0)
    return [_usual(specs, engine, index, rng) for index in range(len(engine.profiles))]


def _usual(
    specs: Sequence[InputSpec], engine: TensorRTRunner, index: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One feed. Caches are filled where both models have the same ones, else empty."""
    shapes = {spec.name: spec.shape for spec in engine.inputs}
    shapes |= {name: three[1] for name, three in engine.profiles[index].shapes.items()}
    pasts = [spec for spec in specs if is_past(spec)]
    same = all(_alike(spec.shape, shapes.get(spec.name, ())) for spec in pasts)
    # What follows from the tokens where there is no past: see ``inputs.fill_missing``.
    derived = () if same and pasts else ("attention_mask", "position_ids", "token_type_ids")
    given, named = [], dict[str, int]()
    for spec in specs:
        shape = shapes.get(spec.name, ())
        if (spec.name in derived and len(spec.shape) == 2) or (is_past(spec) and not same):
            continue
        if len(shape) == len(spec.shape):
            pairs = zip(spec.shape, shape, strict=True)
            named |= {a: size for a, size in pairs if isinstance(a, str) and isinstance(size, int)}
            spec = replace(spec, shape=shape)  # noqa: PLW2901
        given.append(spec)
    past = next((spec.shape[2] for spec in given if is_past(spec)), 0)
    return synthesize(given, Sizes(past=past if isinstance(past, int) else 0, named=named), rng)


def _alike(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two caches [B, H, T, c] differ in dynamic axes only."""
    return len(one) == len(other) and one[1] == other[1] and one[3] == other[3]


def beside(path: Path) -> Path | None:
    """The evaluation, else the calibration data that lies beside a model, and belongs to it."""
    files = (path.parent / f"{path.stem}.{kind}.npz" for kind in ("eval", "calibration"))
    return next((f for f in files if f.is_file() and belongs(f.resolve(), path)), None)
