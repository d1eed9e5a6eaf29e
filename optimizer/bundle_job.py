"""From a model to a bundle for a Jetson: the target's passes, one sample, and a folder."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.api import optimize
from optimizer.calibration import input_specs
from optimizer.engines.profiles import make_profiles
from optimizer.export.bundle import write_bundle
from optimizer.feeds import Sizes, synthesize
from optimizer.job import Result
from optimizer.model_io import load_model
from optimizer.runners.ort import OrtRunner

TARGET = "jetson"


@dataclass(frozen=True)
class BundleResult:
    """A bundle that was written.

    Attributes:
        folder: Of the bundle.
        files: All files in it.
        result: Of the passes.
    """

    folder: Path
    files: tuple[Path, ...]
    result: Result = field(repr=False)


def build_bundle(
    model: Any,
    passes: str,
    folder: Path,
    *,
    jetpack: str = "6.2",
    shapes: tuple[str, ...] = (),
    force: bool = False,
    **given: Any,
) -> BundleResult:
    """Optimize a model for a Jetson and write what builds its engine there.

    The sample that the device proves its engine with is made up, in the usual shapes of the first
    profile; what is expected is what ONNX Runtime computes here, in the types of the graph.

    Args:
        model: As for ``api.optimize``.
        passes: As for ``api.optimize``.
        folder: Is made.
        jetpack: Version of JetPack.
        shapes: Words of ``--shapes``.
        force: Replace an existing bundle.
        given: As for ``api.optimize``.

    Raises:
        OptimizerError: See ``optimizer.errors``; nothing is written then.
    """
    with tempfile.TemporaryDirectory(prefix="optimize-bundle-") as temporary:
        legal = Path(temporary) / "model.onnx"
        result = optimize(model, passes, target=TARGET, output=legal, **given)
        lowered = load_model(legal, given.get("custom_ops", ()), check_numbers=False)
        profiles = make_profiles(lowered.graph.inputs, shapes)
        feed = _sample(lowered, profiles)
        expected = OrtRunner(lowered).run(feed)
        files = write_bundle(
            lowered,
            folder,
            profiles=profiles,
            manifest={k: v for k, v in result.manifest.items() if k not in ("run", "outputs")},
            samples=feed,
            expected=expected,
            jetpack=jetpack,
            force=force,
        )
    return BundleResult(folder, files, result)


def _sample(model: ir.Model, profiles: Any) -> dict[str, np.ndarray]:
    """Random values in the usual shapes."""
    specs = input_specs(model)
    usual = profiles[0] if profiles else {}
    named = {
        axis: length
        for spec in specs
        if spec.name in usual
        for axis, length in zip(spec.shape, usual[spec.name][1], strict=True)
        if isinstance(axis, str)
    }
    sizes = Sizes.parse(named)
    return synthesize(specs, sizes, np.random.default_rng(0))
