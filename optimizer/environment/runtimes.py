"""ONNX Runtime and TensorRT as they are installed: versions, providers, real shared libraries."""

from __future__ import annotations

import re
from pathlib import Path

from optimizer.environment import packages
from optimizer.environment.facts import Distribution, OnnxRuntime, TensorRt
from optimizer.environment.libraries import Libraries, version_in_name
from optimizer.environment.probe import Probe
from optimizer.environment.versions import normalize

#: Is run by another process: prints what ONNX Runtime says about itself.
_ASK_ONNXRUNTIME = """\
import json, onnxruntime
print(json.dumps({
    "version": onnxruntime.__version__,
    "file": onnxruntime.__file__,
    "providers": onnxruntime.get_available_providers(),
}))
"""
_PROVIDER = re.compile(r"libonnxruntime_providers_(?P<name>\w+)\.so$")
#: What the providers share, and no provider itself.
_SHARED = "shared"
_ASSIGNED = re.compile(r"^(?P<name>\w+) = '(?P<value>[^']*)'$", re.MULTILINE)
_TORCH_CUDA = re.compile(r"^cuda\b[^=]*= '(?P<version>[\d.]+)'", re.MULTILINE)
#: Flavour, as its distributions are called -> core library and parser.
_FLAVOURS = {
    "tensorrt": ("libnvinfer.so", "libnvonnxparser.so"),
    "tensorrt-rtx": ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"),
}


def find_onnxruntime(
    probe: Probe, libraries: Libraries, installed: dict[str, Distribution]
) -> OnnxRuntime:
    """The ONNX Runtime that Python would import, if any; it is imported by another process."""
    folder = _package_folder(probe, "onnxruntime")
    owners = packages.owners(installed, "onnxruntime")
    if folder is None:
        return OnnxRuntime(tuple(item.name for item in owners))
    owners = tuple(item for item in owners if item.folder.parent == folder.parent)
    says = _build_information(folder / "capi" / "build_and_package_info.py")
    wheel = normalize(says.get("package_name", owners[0].name if owners else ""))
    version = says.get("__version__") or (owners[0].version if owners else "")
    return OnnxRuntime(
        distributions=tuple(item.name for item in owners),
        folder=folder,
        complete=(folder / "__init__.py").is_file(),
        wheel=wheel,
        version=version,
        cuda=says.get("cuda_version"),
        loaded=probe.import_module(_ASK_ONNXRUNTIME),
        providers={
            found["name"]: libraries.describe(path)
            for path in sorted((folder / "capi").glob("*.so*"))
            if (found := _PROVIDER.match(path.name)) and found["name"] != _SHARED
        },
    )


def _package_folder(probe: Probe, name: str) -> Path | None:
    """The folder that Python imports: without ``__init__.py`` only where no other has one."""
    folders = [item / name for item in probe.search_path if (item / name).is_dir()]
    regular = (item for item in folders if (item / "__init__.py").is_file())
    return next(regular, next(iter(folders), None))


def _build_information(path: Path) -> dict[str, str]:
    """The assignments of a generated module, which is not run."""
    return {item["name"]: item["value"] for item in _ASSIGNED.finditer(_text_of(path) or "")}


def find_tensorrt(libraries: Libraries, installed: dict[str, Distribution]) -> tuple[TensorRt, ...]:
    """Installed flavours of TensorRT, as Python packages or in the system."""
    found = []
    for flavour, (core, parser) in _FLAVOURS.items():
        named = re.compile(rf"{flavour}(-cu(?P<cuda>\d+))?(?P<part>-libs|-bindings)?$")
        owners = [(item, named.match(name)) for name, item in installed.items()]
        files = [
            next(iter((*libraries.in_packages(stem), *libraries.known_to_loader(stem))), None)
            for stem in (core, parser)
        ]
        present = tuple(path for path in files if path is not None)
        versions = [item.version for item, match in owners if match]
        cuda = [int(match["cuda"]) for _, match in owners if match and match["cuda"]]
        if versions:
            python = any(match and match["part"] != "-libs" for _, match in owners)
            found.append(
                TensorRt(flavour, versions[0], present, python, cuda=next(iter(cuda), None))
            )
        elif present:
            version = version_in_name(present[0]) or "0"
            found.append(TensorRt(flavour, version, present, python=False))
    return tuple(found)


def torch_cuda(probe: Probe) -> str | None:
    """Version of CUDA that the installed torch was built for; None for a CPU build."""
    for folder in probe.search_path:
        text = _text_of(folder / "torch" / "version.py")
        if text is not None:
            found = _TORCH_CUDA.search(text)
            return None if found is None else found["version"]
    return None


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
