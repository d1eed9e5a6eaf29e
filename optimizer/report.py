"""What a run did, as data: one row per stage, the drift, and the manifest beside the output."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizer import __version__
from optimizer.metrics import Drift
from optimizer.pass_base import Exactness, Skip
from optimizer.recipe import Recipe

#: Packages whose version can change the result.
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class Size:
    """Extent of a model.

    Attributes:
        nodes: Of the main graph.
        bytes: Of all initializers.
    """

    nodes: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """One stage: a pass, or the lowering at the end.

    Attributes:
        name: Of the pass, or ``legalize``.
        exactness: What the pass promises.
        modified: Whether the graph changed.
        applied: Number of sites rewritten.
        skipped: Sites left alone, with reasons.
        sites: Names of the rewritten sites.
        details: Facts the pass reports (chosen groups, ...).
        notes: What the user should know about the result.
        before, after: Extent of the model.
        seconds: Of the rewrite itself, and of checking and measuring it.
        seconds_checking: Of checking and measuring it.
        peak_bytes: Largest resident memory of the process during the stage.
        drift: Of the model after this stage against the original; None if not measured.
        verdict: What verification found, as a phrase; None if it did not run.
    """

    name: str
    exactness: Exactness
    modified: bool
    applied: int
    skipped: tuple[Skip, ...]
    sites: tuple[str, ...]
    details: dict[str, Any]
    before: Size
    after: Size
    seconds: float
    seconds_checking: float
    peak_bytes: int
    drift: Drift | None = None
    verdict: str | None = None
    notes: tuple[str, ...] = ()

    def statistics(self) -> dict[str, Any]:
        """JSON-compatible, without what differs from run to run."""
        return {
            "pass": self.name,
            "exactness": self.exactness.value,
            "modified": self.modified,
            "applied": self.applied,
            "sites": list(self.sites),
            "skipped": [{"site": skip.site, "reason": skip.reason} for skip in self.skipped],
            "nodes": [self.before.nodes, self.after.nodes],
            "bytes": [self.before.bytes, self.after.bytes],
            "drift": None if self.drift is None else self.drift.as_dict(),
            "verification": self.verdict,
            "details": self.details,
            "notes": list(self.notes),
        }


@dataclass
class RunReport:
    """What one run did.

    Attributes:
        source: The model as the user named it.
        opset: Of the input.
        before: Extent of the input.
        rows: One per stage.
        drift: Of the result against the original; None if not measured.
        samples: Number of samples that the drift is measured on.
        speedup: Latency of original and result, when measured.
        missed: Why the result misses the budget or the required speed-up, if it was kept.
    """

    source: str
    opset: int
    before: Size
    rows: list[Row] = field(default_factory=list)
    drift: Drift | None = None
    samples: int = 0
    speedup: dict[str, Any] | None = None
    missed: str | None = None

    @property
    def after(self) -> Size:
        """Extent of the result."""
        return self.rows[-1].after if self.rows else self.before

    def matched(self) -> int:
        """Sites rewritten by the passes that the user named."""
        return sum(row.applied for row in self.rows if row.name not in ("canonicalize", "legalize"))

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible form with times and memory."""
        return {
            "source": self.source,
            "opset": self.opset,
            "nodes": [self.before.nodes, self.after.nodes],
            "bytes": [self.before.bytes, self.after.bytes],
            "passes": [
                {
                    **row.statistics(),
                    "seconds": round(row.seconds, 3),
                    "seconds_checking": round(row.seconds_checking, 3),
                    "peak_bytes": row.peak_bytes,
                }
                for row in self.rows
            ],
            "drift": None if self.drift is None else self.drift.as_dict(),
            "samples": self.samples,
            "speedup": self.speedup,
            "missed": self.missed,
        }


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change the result."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_manifest(
    report: RunReport,
    recipe: Recipe,
    *,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    data: dict[str, str],
    kv_cache: dict[str, Any] | None,
    plugins: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of the manifest file.

    Only the key ``run`` (times, memory) differs between two runs of the same command.

    Args:
        report: Of the run.
        recipe: With all options resolved.
        inputs: (file name, SHA-256) of the model read and its data.
        outputs: The same of the files written.
        data: Digest of the calibration and evaluation data.
        kv_cache: Which layers' caches live where, if the layout was changed.
        plugins: Operators of our own that the model has.
    """
    return {
        "manifest": 1,
        "tool": {"name": "optimize-onnx", "version": __version__},
        "recipe": recipe.as_dict(),
        "inputs": [{"file": name, "sha256": digest} for name, digest in inputs],
        "outputs": [{"file": name, "sha256": digest} for name, digest in outputs],
        "data_sha256": data,
        "kv_cache": kv_cache,
        "plugins": list(plugins),
        "statistics": [row.statistics() for row in report.rows],
        "drift": None if report.drift is None else report.drift.as_dict(),
        "samples": report.samples,
        "libraries": library_versions(),
        "run": {
            "seconds": {
                row.name: round(row.seconds + row.seconds_checking, 3) for row in report.rows
            },
            "peak_bytes": max((row.peak_bytes for row in report.rows), default=0),
            "speedup": report.speedup,
        },
    }
