"""A folder from which a Jetson builds its engine: model, plugin sources, samples, one command.

Engines are not portable between platforms, so what leaves this machine is everything that the
device needs beyond JetPack, which is nothing but the folder. On it runs ``build_engine.py``, with
the Python and the compiler that JetPack brings.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import __version__
from optimizer.custom_ops.bodies import left_out, plugins_of
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE
from optimizer.errors import ExportError, MissingDependencyError, OptionError
from optimizer.export.bundle_samples import Profile, check_profiles, describe_samples
from optimizer.export.support import check_supported
from optimizer.hashing import hash_file
from optimizer.model_writer import save_model

#: Number of the form of ``manifest.json``.
FORMAT = 1
_KIND = "optimize-onnx Jetson bundle"


@dataclass(frozen=True)
class JetPack:
    """What a release of JetPack brings: the L4T release of its system, TensorRT, CUDA."""

    l4t: str
    tensorrt: str
    cuda: str


#: With TensorRT 10.3; the others bring a parser whose operators are not recorded.
JETPACKS = {
    "6.1": JetPack("36.4.0", "10.3", "12.6"),
    "6.2": JetPack("36.4.3", "10.3", "12.6"),
}
#: Orin, the only chips that JetPack 6 runs on.
COMPUTE_CAPABILITY = "87"

_DEVICE = Path(__file__).parent / "jetson"
#: Written as they are: the command of the device and its parts.
SCRIPTS = ("build_engine.py", "engine_build.py", "engine_check.py")
#: What the plugin library is compiled from, below ``plugins/``.
COMPILED = (
    "sparse_matmul/cuda/decode.cu",
    "sparse_matmul/cuda/sparse24.cu",
    "sparse_matmul/cuda/quantize.cu",
    "sparse_matmul/cuda/run.cu",
    "sparse_matmul/cuda/validate.cc",
    "sparse_matmul/tensorrt/plugin.cc",
    "sparse_matmul/tensorrt/library.cc",
)
_INCLUDED = (
    "sparse_matmul/declaration.h",
    "sparse_matmul/sparse_matmul.h",
    "sparse_matmul/cuda/common.h",
    "sparse_matmul/cuda/kernels.h",
    "sparse_matmul/cuda/ptx.h",
    "sparse_matmul/tensorrt/plugin.h",
    "sparse_matmul/tensorrt/exports.map",
)
_PACKAGE = Path(__file__).resolve().parent.parent
#: The wheel's copy of the sources, and those of a source checkout.
_SOURCES = (_PACKAGE / "plugins", _PACKAGE.parent / "plugins")


def write_bundle(
    model: ir.Model,
    folder: Path,
    *,
    profiles: Sequence[Profile],
    manifest: Mapping[str, Any],
    samples: Mapping[str, np.ndarray] | None,
    expected: Mapping[str, np.ndarray] | None,
    jetpack: str = "6.2",
    force: bool = False,
) -> tuple[Path, ...]:
    """Write the folder: all of it or nothing.

    Args:
        model: Lowered for the target ``jetson``: opset 20 at most, types in the graph. Unchanged.
        folder: Is made; its parent exists.
        profiles: Optimization profiles, min, opt and max shape of each input whose sizes vary.
        manifest: How the model was made; goes under "source" of the bundle's manifest.
        samples: One feed, by input; with it the device proves its engine. None without.
        expected: The outputs of that feed, by output, in the types of the model.
        jetpack: A key of ``JETPACKS``.
        force: Replace an existing bundle; another folder never.

    Returns:
        The files, the manifest last.

    Raises:
        OptionError: The folder exists or cannot be, another JetPack, or profiles that contradict
            the model, or samples without expected outputs.
        CalibrationError: Samples that do not fit the model or its profiles.
        UnsupportedError: The parser of TensorRT 10.3 does not take the model.
        MissingDependencyError: The plugin's sources are not with this installation.
        ExportError: The system refused to write.
    """
    folder = folder.absolute()
    release = _release(jetpack)
    if (samples is None) != (expected is None):
        raise OptionError("stored samples: give inputs and expected outputs, or neither")
    _check_folder(folder, force=force)
    check_supported(model)
    check_profiles(model, profiles)
    stored: dict[str, np.ndarray] = {}
    table = None
    if samples is not None and expected is not None:
        stored, table = describe_samples(model, profiles, samples, expected)
    plugins = plugins_of(model)
    sources = _plugin_sources() if plugins else None
    content = {
        "kind": _KIND,
        "format": FORMAT,
        "made_by": f"optimize-onnx {__version__}",
        "jetpack": jetpack,
        "l4t": release.l4t,
        "tensorrt": release.tensorrt,
        "cuda": release.cuda,
        "compute_capability": COMPUTE_CAPABILITY,
        "opset": model.graph.opset_imports.get("", 0),
        "profiles": [_profile(profile) for profile in profiles],
        "plugins": plugins,
        "compiled": [f"plugins/{name}" for name in COMPILED] if plugins else [],
        "exports": "plugins/sparse_matmul/tensorrt/exports.map" if plugins else None,
        "creator": {"name": OP_TYPE, "version": "1", "namespace": DOMAIN} if plugins else None,
        "samples": table,
        "source": dict(manifest),
    }
    with _complete_folder(folder) as made:
        _write_model(model, made / "model.onnx")
        for name in SCRIPTS:
            shutil.copyfile(_DEVICE / name, made / name)
        for name in (*COMPILED, *_INCLUDED) if sources else ():
            (made / "plugins" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile((sources or made) / name, made / "plugins" / name)
        if stored:
            np.savez(made / "samples.npz", **stored)  # type: ignore[arg-type]
        (made / "README.txt").write_text(_readme(content), "utf-8")
        names = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file())
        content["files"] = {name: hash_file(made / name) for name in names}
        text = json.dumps(content, indent=1, sort_keys=True, default=str)
        (made / "manifest.json").write_text(f"{text}\n", "utf-8")
    return tuple(folder / name for name in (*names, "manifest.json"))


def _release(jetpack: str) -> JetPack:
    if jetpack not in JETPACKS:
        raise OptionError(
            f"--jetpack: found '{jetpack}', expected one of {', '.join(JETPACKS)} (TensorRT 10.3); "
            "JetPack 7 has another GPU and TensorRT, earlier ones have none that is strongly typed"
        )
    return JETPACKS[jetpack]


def _check_folder(folder: Path, *, force: bool) -> None:
    if not folder.parent.is_dir():
        msg = f"output {folder}: folder '{folder.parent}' does not exist; create it first"
        raise OptionError(msg)
    if not (folder.exists() or folder.is_symlink()):
        return
    if not force:
        msg = f"output {folder} exists; choose another -o, or replace it with --force"
        raise OptionError(msg)
    if not _is_bundle(folder):
        raise OptionError(
            f"output {folder} exists and is no bundle of this program, so --force does not replace "
            "it; choose another -o"
        )


def _is_bundle(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        content = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == _KIND


def _plugin_sources() -> Path:
    for folder in _SOURCES:
        if all((folder / name).is_file() for name in (*COMPILED, *_INCLUDED)):
            return folder
    raise MissingDependencyError(
        f"the model has nodes {DOMAIN}::{OP_TYPE}, and the sources of their plugin are not with "
        f"this installation (looked for {COMPILED[0]} in {_SOURCES[0]}); reinstall optimize-onnx, "
        "or make the model without sparse-matmul"
    )


def _profile(profile: Profile) -> dict[str, Any]:
    return {
        name: dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))
        for name, shapes in profile.items()
    }


def _write_model(model: ir.Model, path: Path) -> None:
    """Weights outside of the protobuf, which then stays small: the device maps them."""
    with left_out(model):
        save_model(model, path, "always")


@contextlib.contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place at the end, or vanishes."""
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        made.mkdir()
        yield made
        if folder.exists():
            folder.rename(replaced)
        try:
            made.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
    except OSError as error:
        raise ExportError(
            f"{folder}: could not be written: {error.strerror or error}; choose another folder "
            "with -o; nothing was kept"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _readme(content: Mapping[str, Any]) -> str:
    lines = [
        f"A model for NVIDIA Jetson Orin with JetPack {content['jetpack']} (TensorRT "
        f"{content['tensorrt']}, CUDA {content['cuda']}).",
        "",
        "On the device, with nothing installed but JetPack:",
        "",
        "    python3 build_engine.py",
        "",
        "builds model.engine in this folder and compares it with the stored samples.",
        "On any machine, `python3 build_engine.py --dry-run` checks the files and says what would",
        "be done; `python3 build_engine.py --help` lists options and exit codes.",
    ]
    if content["plugins"]:
        lines += [
            "",
            "The model needs a plugin, which is compiled from plugins/ with JetPack's nvcc.",
            "Programs that run the engine load liboptimize_tensorrt.so before they read it.",
        ]
    return "\n".join([*lines, ""])
