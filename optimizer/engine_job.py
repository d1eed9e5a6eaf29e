"""One call of ``optimize build``: optimize for the target, build an engine, write it.

The engine and its side-car manifest appear together or not at all.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import onnx_ir as ir

from optimizer import __version__
from optimizer.api import optimize
from optimizer.engine_check import Evaluation, check_numbers
from optimizer.engines.child import installed_version, run_build
from optimizer.engines.flavours import Flavour, check_options, flavour_of
from optimizer.engines.library_path import find_plugins
from optimizer.engines.profiles import LONGEST, make_profiles, parse_shapes
from optimizer.engines.request import BuildRequest
from optimizer.errors import EngineError, ExportError, OptionError, UnsupportedError
from optimizer.hashing import hash_file
from optimizer.job import Result
from optimizer.listener import Listener, Silent
from optimizer.model_writer import check_output, complete_or_nothing, manifest_path

MANIFEST_VERSION = 1
#: Tokens below which no shorter default is tried.
_SHORTEST = 8


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        output: Of the engine; its manifest lies beside it.
        shapes: Words of ``--shapes``.
        capabilities: Compute capabilities (TensorRT for RTX).
        plugins: Libraries, besides the one that is found.
        timing_cache: Read and written (full TensorRT).
        hardware_compatible: See ``engines.request``.
        version_compatible: See ``engines.request``.
        max_memory: Bytes the build may allocate.
        log: Takes the library's whole log.
        force: Replace existing files.
    """

    output: Path
    shapes: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = ()
    plugins: tuple[Path, ...] = ()
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    max_memory: int | None = None
    log: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class EngineResult:
    """An engine that was written.

    Attributes:
        path: Of the engine.
        manifest: What lies beside it.
        files: All files written.
        result: Of the passes; None where the model was built as it is.
    """

    path: Path
    manifest: dict[str, Any]
    files: tuple[Path, ...]
    result: Result | None = field(default=None, repr=False)


def check_engine(target: str, options: EngineOptions, protected: Sequence[Path] = ()) -> Flavour:
    """Refuse what can be refused before any work is done.

    Raises:
        OptionError: Options that do not fit the target, or an output that exists.
    """
    if target == "jetson":
        msg = (
            "--target jetson: its engine is built on the device, and an engine file from here would"
            " not run there; write the model with 'optimize MODEL --target jetson' and build it on"
            " the device"
        )
        raise OptionError(msg)
    flavour = flavour_of(target)
    check_options(
        flavour,
        {
            "--compute-capability": options.capabilities,
            "--timing-cache": options.timing_cache,
            "--hardware-compatible": options.hardware_compatible,
            "--version-compatible": options.version_compatible,
        },
    )
    parse_shapes(options.shapes)
    find_plugins(options.plugins, ())
    beside = (manifest_path(options.output),)
    check_output(options.output, force=options.force, protected=protected, beside=beside)
    return flavour


def build_model(
    model: Any, passes: str, target: str, options: EngineOptions, **given: Any
) -> EngineResult:
    """Optimize a model for a target and build an engine of the result.

    Args:
        model: As for ``api.optimize``.
        passes: As for ``api.optimize``.
        target: "tensorrt-rtx", "tensorrt" (the version that is installed), "tensorrt-10", ...
        options: Of the engine.
        given: As for ``api.optimize``.

    Raises:
        OptimizerError: See ``optimizer.errors``; nothing is written then.
    """
    source = Path(model) if isinstance(model, str | Path) and Path(model).is_file() else None
    flavour = check_engine(target, options, () if source is None else (source.resolve(),))
    version = installed_version(flavour)
    exact = exact_target(target, version)
    with tempfile.TemporaryDirectory(prefix="optimize-engine-") as folder:
        legal = Path(folder) / "model.onnx"
        result = optimize(model, passes, target=exact, output=legal, **given)
        if result.path is None:
            raise OptionError("--dry-run: 'optimize build' always builds; drop one of the two")
        evaluation = _evaluation(result, source, given)
        made = build_file(
            legal, exact, options, listener=given.get("listener"), source=source,
            evaluation=evaluation,
        )  # fmt: skip
        return replace(made, result=result)


def _evaluation(
    result: Result, original: Path | None, given: Mapping[str, Any]
) -> Evaluation | None:
    """The data of a run, for its engine."""
    settings = result.recipe.settings
    if settings.verify == "off":
        return None
    data = [given.get("evaluation"), settings.evaluation]
    data += [given.get("calibration"), settings.calibration]
    return Evaluation(
        original,
        next((item for item in data if item is not None), None),
        settings.samples,
        int(given.get("threads") or 1),
        tuple(Path(item) for item in given.get("custom_ops") or ()),
        settings.budget,
        bool(given.get("keep_missed")),
    )


def build_result(
    result: Result, options: EngineOptions, listener: Listener, **given: Any
) -> EngineResult:
    """Build an engine of a result that was written for its target.

    Args:
        result: Of ``api.optimize``.
        options: Of the engine.
        listener: Is told the phases.
        given: What ``api.optimize`` was given.

    Raises:
        OptimizerError: See ``optimizer.errors``; the result stays, no engine is written.
    """
    if result.path is None:
        raise OptionError("--engine: the result was not written, so there is nothing to build")
    target = result.recipe.settings.target
    exact_target(target, installed_version(flavour_of(target)))
    source = Path(result.report.source)
    original = source if source.is_file() else None
    return build_file(
        result.path, target, options, listener=listener,
        evaluation=_evaluation(result, original, given),
    )  # fmt: skip


def exact_target(target: str, version: str) -> str:
    """The target whose legal form suits an installed version.

    Raises:
        UnsupportedError: The target is of another major version than what is installed.
    """
    if target == "tensorrt-rtx":
        return target
    major = int(version.split(".", maxsplit=1)[0])
    exact = f"tensorrt-{major}"
    if major not in (10, 11) or target not in ("tensorrt", exact):
        msg = (
            f"--target {target}: TensorRT {version} is installed here; choose --target tensorrt, "
            "or install a version 10.3 to 11"
        )
        raise UnsupportedError(msg)
    return exact


def build_file(
    legal: Path,
    target: str,
    options: EngineOptions,
    *,
    listener: Listener | None = None,
    source: Path | None = None,
    evaluation: Evaluation | None = None,
) -> EngineResult:
    """Build an engine of a file that already has the form of its target, and run it where it runs.

    Args:
        legal: The ONNX file.
        target: Exact, see ``exact_target``.
        options: Of the engine.
        listener: Is told the phases.
        source: The model that ``legal`` was made from, for the manifest.
        evaluation: What its numbers are compared with; None = they are not.

    Raises:
        OptimizerError: See ``optimizer.errors``; nothing is written then.
    """
    flavour = check_engine(target, options)
    model = ir.load(legal)  # as it was written: its operators are for TensorRT to judge
    own = {identifier[:2] for identifier in model.functions}
    custom = tuple(
        (str(node.name), node.domain, node.op_type)
        for node in model.graph.all_nodes()
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in own
    )
    plugins = find_plugins(options.plugins, {domain for _, domain, _ in custom})
    with tempfile.TemporaryDirectory(prefix="optimize-engine-") as folder:
        cache = options.timing_cache
        request = BuildRequest(
            flavour.name,
            str(legal),
            str(Path(folder) / "plan"),
            make_profiles(model.graph.inputs, options.shapes),
            options.capabilities or flavour.usual,
            tuple(str(item.resolve()) for item in plugins),
            custom,
            None if cache is None else str(cache),
            None if cache is None else str(Path(folder) / "cache"),
            options.hardware_compatible,
            options.version_compatible,
            options.max_memory,
        )
        with _log(options.log) as log:
            request, facts = _run(request, model, options, listener or Silent(), log)
        manifest = _manifest(model, legal, source, target, request, facts)
        manifest["checked"] = check_numbers(
            Path(request.output), legal, manifest, evaluation,
            plugins=plugins, listener=listener or Silent(),
        )  # fmt: skip
        files = _write(request, options, manifest)
    return EngineResult(options.output, manifest, files)


def _run(
    request: BuildRequest,
    model: ir.Model,
    options: EngineOptions,
    listener: Listener,
    log: IO[str] | None,
) -> tuple[BuildRequest, dict[str, Any]]:
    """Build; where the model does not take lengths that nobody gave, with half of them.

    A table of positions, for example, has an end that no axis tells of.
    """
    longest = LONGEST
    while True:
        try:
            return request, run_build(request, listener, log)
        except EngineError as error:
            longest //= 2
            shorter = make_profiles(model.graph.inputs, options.shapes, longest)
            if "violate shape constraints" not in str(error) or longest < _SHORTEST:
                raise
            if shorter == request.profiles:  # all lengths were given
                raise
            request = replace(request, profiles=shorter)
            listener.note(f"the model does not take {2 * longest} tokens; trying {longest}")


@contextlib.contextmanager
def _log(path: Path | None) -> Any:
    if path is None:
        yield None
        return
    try:
        file: IO[str] = path.open("w")
    except OSError as error:
        msg = f"--log: {path} cannot be written: {error.strerror}; choose another file"
        raise ExportError(msg) from error
    with file:
        yield file


def _manifest(
    model: ir.Model,
    legal: Path,
    source: Path | None,
    target: str,
    request: BuildRequest,
    facts: dict[str, Any],
) -> dict[str, Any]:
    recipe = model.metadata_props.get("optimize.recipe")
    return {
        "manifest": MANIFEST_VERSION,
        "tool": __version__,
        "target": target,
        "flavour": request.flavour,
        "version": facts["version"],
        "compute_capabilities": sorted(request.capabilities) or None,
        "gpu": facts["gpu"],
        "hardware_compatible": request.hardware_compatible,
        "version_compatible": request.version_compatible,
        "profiles": request.profiles,
        "precisions": facts["precisions"],
        "layers": facts["layers"],
        "plugin_layers": facts["plugin_layers"],
        "plugins": [
            {**item, "file": Path(item["file"]).name, "sha256": hash_file(Path(item["file"]))}
            for item in facts["plugins"]
        ],
        "model": {"sha256": hash_file(legal)},
        "source": None if source is None else {"file": source.name, "sha256": hash_file(source)},
        "recipe": None if recipe is None else json.loads(recipe),
    }


def _write(
    request: BuildRequest, options: EngineOptions, manifest: dict[str, Any]
) -> tuple[Path, ...]:
    plan = Path(request.output)
    manifest["engine"] = {"bytes": plan.stat().st_size, "sha256": hash_file(plan)}
    content = f"{json.dumps(manifest, indent=1, sort_keys=True)}\n".encode()
    targets = [options.output, manifest_path(options.output)]
    parts = [plan, None]
    if options.timing_cache is not None and request.new_timing_cache is not None:
        targets.append(options.timing_cache)
        parts.append(Path(request.new_timing_cache))
    with complete_or_nothing(targets, plan.stat().st_size + len(content)) as files:
        for file, part in zip(files, parts, strict=True):
            if part is None:
                file.write(content)
                continue
            with part.open("rb") as made:
                shutil.copyfileobj(made, file, 1 << 22)
    return tuple(targets)
