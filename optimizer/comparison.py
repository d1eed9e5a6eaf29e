"""Compares the numbers of two model files: for ``optimize check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optimizer.calibration import Calibration, input_specs
from optimizer.metrics import Drift
from optimizer.model_io import load_model
from optimizer.model_tensors import belongs
from optimizer.probes import make_probes
from optimizer.samples import SampleSpec, load_samples


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
) -> Comparison:
    """Run two models on the same samples.

    Args:
        first: The reference.
        second: Its inputs may differ in the KV cache only.
        data: See ``samples.load_samples``; None = the data beside ``first``, else made up.
        samples: Use only the first samples.
        threads: Of each run.
        custom_ops: Libraries of custom operators.

    Raises:
        ModelError: A model cannot be loaded or run.
        CalibrationError: The data does not fit, or there is no common output.
    """
    reference, candidate = (load_model(path, custom_ops) for path in (first, second))
    spec: SampleSpec | None = data if data is not None else beside(Path(first))
    source = str(spec) if isinstance(spec, str | Path) else "the data given"
    specs = input_specs(reference)
    if spec is None:
        spec = [probe.feed for probe in make_probes(specs)]
        source = "made-up inputs"
    loaded = load_samples(spec, specs, limit=samples, option="--eval")
    calibration = Calibration(loaded, threads=threads, custom_ops=custom_ops)
    drift = calibration.drift(calibration.reference(reference), candidate)
    return Comparison(drift, loaded.count, source)


def beside(path: Path) -> Path | None:
    """The evaluation, else the calibration data that lies beside a model, and belongs to it."""
    files = (path.parent / f"{path.stem}.{kind}.npz" for kind in ("eval", "calibration"))
    return next((f for f in files if f.is_file() and belongs(f.resolve(), path)), None)
