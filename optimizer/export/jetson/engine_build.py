"""Parses the model, builds the engine, and checks it; part of ``build_engine.py``.

Python 3.8, nothing but its own library; TensorRT comes as an argument.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any, List, Optional

import engine_check  # type: ignore[import-not-found]

ROOM, BUNDLE, SAMPLES, ENGINE = 1, 2, 3, 7
_MOST_LINES = 8


class BuildError(Exception):
    """No engine: the exit code of the command, and why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def say(text: str) -> None:
    """A line for whoever watches, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def build(
    trt: Any,
    cuda: Any,
    folder: str,
    manifest: Any,
    options: Any,
    workspace: int,
    library: Optional[str],
) -> None:
    """Write the engine and its manifest, or neither.

    Args:
        trt: The module ``tensorrt``.
        cuda: ``engine_check.Cuda``.
        folder: Of the bundle.
        manifest: Of the bundle.
        options: Of the command.
        workspace: Bytes of scratch memory that the builder may take.
        library: The plugin library, where the model needs one.

    Raises:
        BuildError: The plugin, the parser or the builder refused, or outputs differ.
        KeyboardInterrupt: Ctrl-C, after the builder has stopped.
    """
    log = _logger(trt)
    plan = _plan(trt, log, folder, manifest, options, workspace, library)
    differences = _checked(trt, cuda, log, folder, manifest, options, plan)
    content = {
        "bundle": manifest,
        "tensorrt": trt.__version__,
        "cuda": cuda.version(),
        "sha256": hashlib.sha256(plan).hexdigest(),
        "level": options.level,
        "workspace": workspace,
        "plugin": library and os.path.basename(library),
        "checked": differences,
    }
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    _write(options.output + ".manifest.json", text.encode("utf-8"))
    _write(options.output, plan)
    say(f"wrote {options.output} ({plan.nbytes / 2**20:.1f} MiB)")


def _plan(
    trt: Any,
    log: Any,
    folder: str,
    manifest: Any,
    options: Any,
    workspace: int,
    library: Optional[str],
) -> memoryview:
    """The serialized engine; the model and the builder are given up at the end."""
    builder = trt.Builder(log)  # before the registry is used, whose errors are lost otherwise
    trt.init_libnvinfer_plugins(log, "")
    if library is not None:
        _load_plugin(trt, log, library, manifest["creator"])
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.name = "model"  # else its number in this process becomes part of the engine
    parser = trt.OnnxParser(network, log)  # holds the weights until the engine is built
    _parse(log, parser, os.path.join(folder, "model.onnx"))
    config = _configure(trt, builder, manifest, options, workspace)
    plan = _run_builder(trt, log, builder, network, config)
    _save_cache(config, options.timing_cache)
    del parser
    return plan


def _logger(trt: Any) -> Any:
    """Shows warnings, and keeps errors for the message of a failure."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: List[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            elif severity == trt.ILogger.WARNING:
                say("TensorRT: " + text)

    return Logger()


def _because(log: Any, more: Optional[List[str]] = None) -> str:
    lines = (more or []) + log.errors
    return "".join("\n  " + line for line in lines[:_MOST_LINES]) or " (TensorRT gave no reason)"


def _load_plugin(trt: Any, log: Any, path: str, creator: Any) -> None:
    registry = trt.get_plugin_registry()
    if registry.load_library(path) is None:
        raise BuildError(ENGINE, f"plugin: {path} could not be loaded:{_because(log)}")
    words = (creator["name"], creator["version"], creator["namespace"])
    if registry.get_creator(*words) is None:
        names = sorted({item.plugin_namespace + "::" + item.name for item in registry.all_creators})
        raise BuildError(
            ENGINE,
            "plugin: {} registered no {}::{} version {}; registered are {}".format(
                path, words[2], words[0], words[1], ", ".join(names) or "none"
            ),
        )


def _parse(log: Any, parser: Any, path: str) -> None:
    say(f"parsing {path}")
    if parser.parse_from_file(path):
        return
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}")
    raise BuildError(ENGINE, f"the parser refused the model:{_because(log, found)}")


def _configure(trt: Any, builder: Any, manifest: Any, options: Any, workspace: int) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM, _power_of_two(2 * workspace))
    old = b""
    if os.path.exists(options.timing_cache):
        with open(options.timing_cache, "rb") as file:
            old = file.read()
    cache = config.create_timing_cache(old)
    if not config.set_timing_cache(cache, False):  # noqa: FBT003
        say(f"timing cache: {options.timing_cache} is of another device or version; starting anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)  # noqa: FBT003
    for number, shapes in enumerate(manifest["profiles"]):
        profile = builder.create_optimization_profile()
        for name, row in shapes.items():
            profile.set_shape(name, tuple(row["min"]), tuple(row["opt"]), tuple(row["max"]))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(ENGINE, "profile %d does not fit the model: %s" % (number, shapes))
    return config


def _power_of_two(size: int) -> int:
    """At most ``size``: TensorRT takes no other limit of this pool."""
    return 1 << max(size.bit_length() - 1, 20)


def _monitor(trt: Any) -> Any:
    """Tells the phases of the outermost level, and stops the builder when asked to."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._started = time.monotonic()
            self._told = 0.0

        def phase_start(self, name: str, parent: Optional[str], steps: int) -> None:
            if parent is None:
                self._tell("%s (%d steps)" % (name, steps))

        def step_complete(self, name: str, step: int) -> bool:
            if time.monotonic() - self._told > 5:
                self._tell("%s: step %d" % (name, step + 1))
            return not self.cancelled

        def cancel(self) -> None:
            self.cancelled = True
            say("stopping")

        def phase_finish(self, name: str) -> None:
            """Nothing is told of it."""

        def _tell(self, text: str) -> None:
            self._told = time.monotonic()
            say(f"{self._told - self._started:5.0f} s  {text}")

    return Monitor()


def _run_builder(trt: Any, log: Any, builder: Any, network: Any, config: Any) -> memoryview:
    """In a thread, because Python handles signals only between calls of the main one."""
    monitor = _monitor(trt)
    config.progress_monitor = monitor
    plans: List[Any] = []
    done = threading.Event()

    def work() -> None:
        try:
            plans.append(builder.build_serialized_network(network, config))
        except Exception as error:
            log.errors.append(f"{type(error).__name__}: {error}")
        finally:
            done.set()

    say("building; Ctrl-C stops it")
    before = signal.signal(signal.SIGINT, lambda *_: monitor.cancel())
    try:
        threading.Thread(target=work).start()
        while not done.wait(0.2):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    if monitor.cancelled:
        raise KeyboardInterrupt
    if not plans or plans[0] is None:
        text = _because(log)
        code = ROOM if "out of memory" in text.lower() or "outofmemory" in text.lower() else ENGINE
        raise BuildError(code, f"the builder made no engine:{text}")
    return memoryview(plans[0])


def _save_cache(config: Any, path: str) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        _write(path, bytes(cache.serialize()))


def _checked(
    trt: Any, cuda: Any, log: Any, folder: str, manifest: Any, options: Any, plan: memoryview
) -> Any:
    """What was found for each output, or None where nothing is to be checked."""
    table = manifest["samples"]
    if table is None or options.no_check:
        return None
    say("checking the engine against the stored samples")
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(ENGINE, f"the engine cannot be read back:{_because(log)}")
    try:
        stored = engine_check.read_samples(os.path.join(folder, "samples.npz"))
        found = engine_check.run(trt, engine, cuda, table, stored)
    except engine_check.CheckError as error:
        raise BuildError(ENGINE, "check: {}{}".format(error, "".join(log.errors[:1]))) from error
    rows = [
        engine_check.compare(
            row["name"],
            row["dtype"],
            found[row["name"]],
            stored["output." + row["name"]].data,
            table["tolerance"],
        )
        for row in table["outputs"]
    ]
    for row in rows:
        say("output '{}': {} {:.3g}, allowed {:.3g}".format(*row))
    if any(row.too_large for row in rows):
        raise BuildError(
            SAMPLES,
            "the engine's outputs are not those of the samples (above); it was not kept. "
            "--no-check keeps it",
        )
    return [row._asdict() for row in rows]


def _write(path: str, content: Any) -> None:
    """Under a temporary name, then renamed."""
    made = "%s.%d.tmp" % (path, os.getpid())
    try:
        with open(made, "wb") as file:
            file.write(content)
        os.replace(made, path)
    finally:
        if os.path.exists(made):
            os.unlink(made)
