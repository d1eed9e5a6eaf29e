"""What an engine needs and what this machine has, for ``optimize inspect x.engine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimizer.engines.plan import Plan, read_plan
from optimizer.environment import collect
from optimizer.environment.facts import Facts
from optimizer.errors import EngineError
from optimizer.export.onnx_file import manifest_path
from optimizer.hashing import hash_file


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
    manifest = _manifest(path)
    here = collect() if facts is None else facts
    installed = here.flavour(plan.flavour)
    version = None if installed is None else installed.version
    gpus = [gpu.capability for gpu in here.nvidia.gpus]
    needs = {
        "flavour": plan.flavour,
        "version": plan.version,
        "compute_capabilities": None if manifest is None else manifest["compute_capabilities"],
        "plugins": None if manifest is None else [item["file"] for item in manifest["plugins"]],
    }
    problems = _problems(plan, manifest, version, gpus)
    return {
        "file": str(path),
        "bytes": plan.size,
        "needs": needs,
        "here": {"version": version, "gpus": gpus},
        "problems": problems,
        "text": _text(needs, version, gpus, problems),
        "manifest": manifest,
    }


def _manifest(path: Path) -> dict[str, Any] | None:
    beside = manifest_path(path)
    if not beside.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(beside.read_text())
        stated = manifest["engine"]["sha256"]
        needed = [
            manifest[key] for key in ("compute_capabilities", "plugins", "version_compatible")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{beside}: is no manifest of an engine ({error}); delete it, or build again"
        raise EngineError(msg) from error
    if stated != hash_file(path) or len(needed) != 3:
        msg = f"{path}: is not the engine that {beside.name} describes; copy or build both again"
        raise EngineError(msg)
    return manifest


def _problems(
    plan: Plan, manifest: dict[str, Any] | None, version: str | None, gpus: list[str]
) -> list[str]:
    found = []
    compatible = manifest is not None and manifest["version_compatible"]
    if version is None:
        found.append(f"{plan.flavour} is not installed")
    elif not compatible and _release(version) != _release(plan.version):
        found.append(f"version {version} is installed")
    if not gpus:
        found.append("there is no NVIDIA GPU")
    elif manifest is not None and manifest["compute_capabilities"]:
        numbers = [int(gpu.replace(".", "")) for gpu in gpus]
        if not set(numbers) & set(manifest["compute_capabilities"]):
            found.append(f"it has no kernels for compute capability {', '.join(gpus)}")
    return found


def _release(version: str) -> list[str]:
    """Major, minor and patch: the build number may differ."""
    return version.split(".")[:3]


def _text(needs: dict[str, Any], version: str | None, gpus: list[str], problems: list[str]) -> str:
    wanted = f"needs {needs['flavour']} {needs['version']}"
    if needs["compute_capabilities"]:
        wanted += f", a GPU of {' or '.join(map(str, needs['compute_capabilities']))}"
    else:
        wanted += ", the kind of GPU it was built on (the plan does not tell which)"
    if needs["plugins"]:
        wanted += f", the plugins {', '.join(needs['plugins'])}"
    has = f"this machine has {version or 'none of it'}, {', '.join(gpus) or 'no GPU'}"
    return f"{wanted}; {has}: {'; '.join(problems) or 'nothing against it'}"
