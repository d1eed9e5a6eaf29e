"""From the file of an engine to an engine on a GPU, or the reason why not.

What can be known without the library is looked at first: the plan, its manifest, the GPU, the
version. What the library logs when it refuses is the rest of the message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.engines.cuda import Device, Driver, Gpu
from optimizer.engines.flavours import FLAVOURS
from optimizer.engines.library import creators, import_tensorrt, load_plugins
from optimizer.engines.library_path import find_engine_plugins
from optimizer.engines.manifest import capabilities_text, fits_gpu, fits_version, read_manifest
from optimizer.engines.plan import Plan, read_plan
from optimizer.errors import EngineError, MissingDependencyError

_TITLES = {item.module: item.title for item in FLAVOURS.values()}
_MEMORY = ("out of memory", "OutOfMemory", "bad_alloc")


@dataclass(frozen=True)
class LoadedEngine:
    """An engine on a GPU.

    Attributes:
        engine: The library's object.
        trt: The module.
        gpu: Where it is.
        errors: What the library has logged as errors, the newest last; grows.
        runtime: Must outlive ``engine``.
    """

    engine: Any
    trt: Any
    gpu: Gpu
    errors: list[str]
    runtime: Any


def load_engine(
    path: Path,
    *,
    plugins: Sequence[Path] = (),
    manifest: Mapping[str, Any] | None = None,
) -> LoadedEngine:
    """Load an engine onto the first GPU that it has code for.

    Args:
        path: Of the plan.
        plugins: Libraries, besides those that the manifest names and that are found.
        manifest: Instead of the one beside the file.

    Raises:
        MissingDependencyError: There is no driver or no GPU here, or this flavour of TensorRT is
            not installed.
        EngineError: The plan is damaged, or for another GPU or version; a plugin is missing or is
            another one; the GPU has not enough memory.
    """
    plan = read_plan(path)
    manifest = read_manifest(path) if manifest is None else manifest
    flavour = FLAVOURS[plan.flavour]
    try:
        driver = Driver()
        trt = import_tensorrt(flavour)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{path}: cannot be run here: {error}") from error
    device = _fitting(path, plan, manifest, driver)
    version = str(trt.__version__)
    if not fits_version(plan, manifest, version):
        msg = (
            f"{path}: {flavour.title} {plan.version} built this engine, {version} is installed "
            "here, which does not load it; build it again, or install that version"
        )
        raise EngineError(msg)
    gpu = Gpu(driver, device)
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    libraries = find_engine_plugins(path, plugins, [] if manifest is None else manifest["plugins"])
    load_plugins(trt, libraries, logger.errors)
    if manifest is not None and manifest["version_compatible"]:
        runtime.engine_host_code_allowed = True  # the plan holds the library that runs it
    engine = runtime.deserialize_cuda_engine(_content(path))
    if engine is None:
        raise EngineError(f"{path}: {_refused(trt, logger.errors)}")
    return LoadedEngine(engine, trt, gpu, logger.errors, runtime)


def why_not_here(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why an engine that was built here cannot be run here; None where a GPU can run it.

    Raises:
        EngineError: It is no engine.
    """
    try:
        driver = Driver()
    except MissingDependencyError as error:
        return f"no GPU here: {str(error).partition(';')[0]}"
    plan = read_plan(path)
    if any(fits_gpu(plan, manifest, device.capability) for device in driver.devices):
        return None
    here = ", ".join(f"{device.name} ({device.capability})" for device in driver.devices)
    return f"it needs {capabilities_text(plan, manifest)}, here is {here}"


def _fitting(path: Path, plan: Plan, manifest: Mapping[str, Any] | None, driver: Driver) -> Device:
    for device in driver.devices:
        if fits_gpu(plan, manifest, device.capability):
            return device
    here = ", ".join(f"{device.name} ({device.capability})" for device in driver.devices)
    msg = (
        f"{path}: needs {capabilities_text(plan, manifest)}, here is {here}; build it for this GPU "
        f"(--compute-capability {driver.devices[0].capability.replace('.', '')}, or on this "
        "machine with --target tensorrt)"
    )
    raise EngineError(msg)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "not enough memory"
        raise EngineError(f"{path}: cannot be read: {reason}; expected an engine") from error


def make_logger(trt: Any) -> Any:
    """A quiet logger that keeps errors in ``errors``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Of the library; from any of its threads."""
            if str(severity).rpartition(".")[2] in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)

    return Logger()


def _refused(trt: Any, errors: Sequence[str]) -> str:
    """Why an engine was not loaded, from what was logged."""
    first = errors[0] if errors else "it gave no reason"
    text = " ".join(errors)
    where = f"{_TITLES.get(trt.__name__, trt.__name__)} {trt.__version__}"
    if any(word in text for word in _MEMORY):
        msg = f"not enough memory on the GPU for this engine ({first}); close other programs"
        return f"{msg}, or build smaller profiles (--shapes)"
    if "plugin" in text.lower():
        listed = "; ".join(sorted(creators(trt.get_plugin_registry()))[:12]) or "none"
        msg = f"{where} lacks a plugin of this engine: {first}; name its library with --plugin. "
        return f"{msg}Registered: {listed}"
    if "serialization" in text.lower() or "magic" in text.lower() or "version tag" in text.lower():
        return f"the engine is damaged, or of another version than {where}: {first}; build it again"
    return f"{where} does not load this engine: {first}; build it again on this machine"
