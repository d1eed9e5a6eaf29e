"""The manifest beside an engine, and whether an engine fits a machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer.engines.plan import Plan
from optimizer.errors import EngineError
from optimizer.hashing import hash_file
from optimizer.model_writer import manifest_path

#: Oldest compute capability of an engine that is "hardware compatible" (Ampere and later).
_AMPERE = 80


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What lies beside an engine, or None.

    Raises:
        EngineError: It is no manifest, or is of another engine.
    """
    beside = manifest_path(path)
    if not beside.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(beside.read_text())
        stated = manifest["engine"]["sha256"]
        for key in ("compute_capabilities", "plugins", "version_compatible", "profiles"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{beside}: is no manifest of an engine ({error}); delete it, or build again"
        raise EngineError(msg) from error
    if stated != hash_file(path):
        msg = f"{path}: is not the engine that {beside.name} describes; copy or build both again"
        raise EngineError(msg)
    return manifest


def capabilities_text(plan: Plan, manifest: Mapping[str, Any] | None) -> str:
    """Which GPUs an engine is for, in words."""
    known = _known(plan, manifest)
    if known is not None:
        return f"a GPU of {' or '.join(map(str, known))}{' or later' if plan.later else ''}"
    built_on = None if manifest is None else manifest.get("gpu")
    if not built_on:
        return "the kind of GPU it was built on (the plan does not tell which)"
    if manifest is not None and manifest.get("hardware_compatible"):
        return f"a GPU of {_AMPERE} or later"
    return f"a GPU like the {built_on['name']} it was built on ({built_on['capability']})"


def _known(plan: Plan, manifest: Mapping[str, Any] | None) -> Sequence[int] | None:
    if plan.capabilities is not None:
        return plan.capabilities
    return None if manifest is None else manifest["compute_capabilities"]


def fits_gpu(plan: Plan, manifest: Mapping[str, Any] | None, capability: str) -> bool:
    """Whether an engine has code for a GPU, as far as plan and manifest tell.

    TensorRT for RTX: exactly those it was built for ("engine built for 8.6" does not run on 8.9);
    one that was built for all of them also runs on later ones. Full TensorRT: the compute
    capability it was built on, or 8.0 and later where it was built hardware compatible.

    Args:
        plan: Of the engine.
        manifest: Beside it, if any.
        capability: Of the GPU, such as "8.9".
    """
    number = int(capability.replace(".", ""))
    known = _known(plan, manifest)
    if known is not None:
        return number in known or (plan.later and number > max(known, default=0))
    built_on = None if manifest is None else manifest.get("gpu")
    if manifest is None or not built_on:
        return True
    if manifest.get("hardware_compatible"):
        return number >= _AMPERE
    return bool(built_on["capability"] == capability)


def fits_version(plan: Plan, manifest: Mapping[str, Any] | None, version: str) -> bool:
    """Whether a version of the library loads an engine.

    Major, minor and patch must be equal; an engine that was built version compatible is also loaded
    by later versions.
    """
    here, built = _release(version), _release(plan.version)
    if manifest is not None and manifest["version_compatible"]:
        return here >= built
    return here == built


def _release(version: str) -> tuple[int, ...]:
    """Major, minor and patch: the build number may differ."""
    parts = [*version.split("."), "0", "0"][:3]
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)
