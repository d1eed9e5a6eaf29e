"""What an engine needs and what this machine has, for ``optimize inspect x.engine``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.engines.manifest import capabilities_text, fits_gpu, fits_version, read_manifest
from optimizer.engines.plan import Plan, read_plan
from optimizer.environment import collect
from optimizer.environment.facts import Facts


def describe_engine(path: Path, facts: Facts | None = None) -> dict[str, Any]:
    """What an engine needs, from its side-car manifest or from the plan alone.

    Args:
        path: Of the engine.
        facts: Of the machine; None = this one.

    Returns:
        "needs", "here", "problems" (why it does not run here, as far as that can be known without
        running it), "text" (all of that on one line), "manifest" (None where there is none).

    Raises:
        EngineError: It is no engine, is damaged, or is not the one that its manifest describes.
    """
    plan = read_plan(path)
    manifest = read_manifest(path)
    here = collect() if facts is None else facts
    installed = here.flavour(plan.flavour)
    version = None if installed is None else installed.version
    gpus = [gpu.capability for gpu in here.nvidia.gpus]
    capabilities = plan.capabilities
    if capabilities is None and manifest is not None:
        capabilities = manifest["compute_capabilities"]
    needs = {
        "flavour": plan.flavour,
        "version": plan.version,
        "compute_capabilities": None if capabilities is None else list(capabilities),
        "later_gpus": plan.later,
        "plugins": None if manifest is None else [item["file"] for item in manifest["plugins"]],
    }
    problems = _problems(plan, manifest, version, gpus)
    return {
        "file": str(path),
        "bytes": plan.size,
        "needs": needs,
        "here": {"version": version, "gpus": gpus},
        "problems": problems,
        "text": _text(plan, manifest, version, gpus, problems),
        "manifest": manifest,
    }


def _problems(
    plan: Plan, manifest: dict[str, Any] | None, version: str | None, gpus: list[str]
) -> list[str]:
    found = []
    if version is None:
        found.append(f"{plan.flavour} is not installed")
    elif not fits_version(plan, manifest, version):
        found.append(f"version {version} is installed")
    if not gpus:
        found.append("there is no NVIDIA GPU")
    elif not any(fits_gpu(plan, manifest, gpu) for gpu in gpus):
        found.append(f"it has no kernels for compute capability {', '.join(gpus)}")
    return found


def _text(
    plan: Plan,
    manifest: dict[str, Any] | None,
    version: str | None,
    gpus: list[str],
    problems: list[str],
) -> str:
    wanted = f"needs {plan.flavour} {plan.version}, {capabilities_text(plan, manifest)}"
    if manifest is not None and manifest["plugins"]:
        wanted += f", the plugins {', '.join(item['file'] for item in manifest['plugins'])}"
    has = f"this machine has {version or 'none of it'}, {', '.join(gpus) or 'no GPU'}"
    return f"{wanted}; {has}: {'; '.join(problems) or 'nothing against it'}"
