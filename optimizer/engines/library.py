"""The only way to TensorRT's Python modules, and the only place where plugins are loaded.

TensorRT for RTX opens ``libtensorrt_rtx.so`` when its parser meets a plugin; the wheel only has
``libtensorrt_rtx.so.1``, and the process aborts. So its libraries are loaded from a folder of links
that has both names, before anything imports the module, and the folder stays until the process
ends.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimizer.elf import read_dynamic
from optimizer.engines.flavours import Flavour
from optimizer.errors import EngineError, MissingDependencyError, UnsupportedError

#: Loaded in this order: the parser needs the core.
_RTX_LIBRARIES = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")
#: Keeps the links until the process ends.
_links: list[tempfile.TemporaryDirectory[str]] = []
#: (module, library) -> what ``load_plugins`` says of it; they stay until the process ends.
_loaded: dict[tuple[str, Path], dict[str, Any]] = {}
_RTX = "TensorRT for RTX"
_CORE = re.compile(r"libnvinfer(?:_[a-z]+)?\.so\.(\d+)")


def import_tensorrt(flavour: Flavour) -> Any:
    """The module of a flavour.

    Raises:
        MissingDependencyError: It is not installed, or cannot be loaded.
    """
    if importlib.util.find_spec(flavour.module) is None:
        msg = f"{flavour.title} is not installed here (no module '{flavour.module}'): "
        raise MissingDependencyError(msg + flavour.install)
    try:
        if flavour.name == "tensorrt-rtx" and not _links:
            _load_rtx(flavour)
        module = importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:
        msg = f"{flavour.title} is installed but cannot be loaded: {error}; 'optimize doctor' may"
        raise MissingDependencyError(f"{msg} say why") from error
    if not hasattr(module, "Builder"):
        msg = f"'{flavour.module}' is not {flavour.title}: it has no Builder; install it again: "
        raise MissingDependencyError(msg + flavour.install)
    return module


def _load_rtx(flavour: Flavour) -> None:
    if flavour.module in sys.modules:
        msg = f"{flavour.module} was imported before its libraries were prepared; import it only "
        raise MissingDependencyError(f"{msg}through optimizer.engines.library")
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return  # libraries of the system, which have all names
    folder = tempfile.TemporaryDirectory(prefix="optimize-rtx-")
    _links.append(folder)
    for path in Path(spec.origin).parent.glob("lib*.so*"):
        for name in {path.name, path.name.split(".so")[0] + ".so"}:
            (Path(folder.name) / name).symlink_to(path)
    for name in _RTX_LIBRARIES:
        ctypes.CDLL(str(Path(folder.name) / name), mode=ctypes.RTLD_GLOBAL)


def load_plugins(
    trt: Any, paths: Sequence[Path], errors: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Load each library once in a process and name the creators that came with it.

    Call it after a Builder or a Runtime was made: before, errors are not logged.

    Args:
        trt: The module.
        paths: Libraries; what was loaded before is not loaded again.
        errors: What the library logs as errors; grows.

    Returns:
        For each library "file" and "creators", as ``namespace::name, version``.

    Raises:
        EngineError: A library is not one, is for another major version, or registers nothing.
    """
    registry, loaded = trt.get_plugin_registry(), []
    major = int(str(trt.__version__).split(".")[0])
    for path in dict.fromkeys(item.resolve() for item in paths):
        known = _loaded.get((trt.__name__, path))
        if known is not None:
            loaded.append(known)
            continue
        _check_library(path, major, rtx=trt.__name__ == "tensorrt_rtx")
        before = set(creators(registry))
        if registry.load_library(str(path)) is None:
            said = errors[-1] if errors else "it gave no reason"
            msg = f"plugin library {path}: TensorRT {trt.__version__} could not load it: {said}; "
            raise EngineError(f"{msg}build it for this machine as plugins/README.md says")
        new = sorted(set(creators(registry)) - before)
        if not new:
            msg = f"plugin library {path} registers no creator that was not there: expected at "
            raise EngineError(f"{msg}least one; is it loaded twice, or for another TensorRT?")
        known = {"file": str(path), "creators": new}
        _loaded[trt.__name__, path] = known
        loaded.append(known)
    return loaded


def _check_library(path: Path, major: int, *, rtx: bool) -> None:
    try:
        needed = read_dynamic(path).needed
    except UnsupportedError as error:
        msg = f"plugin library {error}; build it as plugins/README.md says"
        raise EngineError(msg) from error
    here = _RTX if rtx else f"TensorRT {major}"
    for name in needed:
        found = _CORE.match(name)
        if name.startswith("libtensorrt_rtx"):
            built = _RTX
        elif found is not None:
            built = f"TensorRT {found[1]}"
        else:
            continue
        if built != here:
            msg = (
                f"plugin library {path} is built for {built} ({name}), this is {here}; build it "
                "again with this version's headers, without linking a TensorRT library"
            )
            raise EngineError(msg)


def creators(registry: Any) -> list[str]:
    """Every registered creator as ``namespace::name, version``."""
    found = getattr(registry, "all_creators", None)
    if found is None:
        found = registry.plugin_creator_list
    return [f"{item.plugin_namespace}::{item.name}, {item.plugin_version}" for item in found]


def check_creators(registry: Any, wanted: Sequence[tuple[str, str, str]]) -> None:
    """Refuse nodes without a creator before the parser meets them.

    Args:
        registry: With all libraries loaded.
        wanted: (node, domain, operator) of nodes outside of ONNX's own domain.

    Raises:
        EngineError: There is none; names the node and lists what is registered.
    """
    known = creators(registry)
    names = {item.rpartition(",")[0] for item in known}
    for node, domain, kind in wanted:
        if f"{domain}::{kind}" in names:
            continue
        close = difflib.get_close_matches(f"{domain}::{kind}", names, n=1, cutoff=0.5)
        hint = f" (the nearest: {close[0]})" if close else ""
        listed = "; ".join(sorted(known)[:12]) or "none"
        msg = (
            f"node '{node}': no plugin creates {domain}::{kind}; load its library with --plugin. "
            f"Registered{hint}: {listed}"
        )
        raise EngineError(msg)
