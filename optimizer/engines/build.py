"""One build through TensorRT's Python interface, for both flavours and versions 10.3 to 11.

Networks are strongly typed: types are what the model says. Runs in a process of its own
(``engines.worker``), because the library may end it.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from optimizer.engines.cuda import Driver
from optimizer.engines.flavours import FLAVOURS
from optimizer.engines.library import check_creators, import_tensorrt, load_plugins
from optimizer.engines.request import BuildRequest
from optimizer.errors import EngineError, OptimizerError, OptionError

#: Is given one event, which JSON can hold.
Tell: TypeAlias = Callable[[dict[str, Any]], None]
#: The same in every version of the network, so that bytes do not depend on how many came before.
_NETWORK_NAME = "optimize"
_PARSING = "Parsing node: "


def build(request: BuildRequest, tell: Tell) -> dict[str, Any]:
    """Build one engine and write it.

    Args:
        request: What to build.
        tell: Is told of the node that is parsed, of phases, and of what the library logs.

    Returns:
        What the manifest says of it: version, layers with their precision, plugins.

    Raises:
        EngineError: The parser or the builder refused.
        MissingDependencyError: The flavour is not installed.
        OptionError: A profile that the model does not take.
    """
    flavour = FLAVOURS[request.flavour]
    trt = import_tensorrt(flavour)
    logger = _logger(trt, tell)
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        msg = f"{flavour.title} {trt.__version__} made no builder: {error}; it needs an NVIDIA GPU"
        raise EngineError(f"{msg} and driver, or use --target tensorrt-rtx") from error
    plugins = load_plugins(trt, [Path(item) for item in request.plugins], logger.errors)
    check_creators(trt.get_plugin_registry(), request.custom)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    network.name = _NETWORK_NAME
    _parse(trt, network, logger, request.model)
    split = _allow_decomposed_attention(trt, network)
    config = _config(trt, builder, request, tell)
    _add_profiles(builder, network, config, request)
    names = [network.get_layer(index).name for index in range(network.num_layers)]
    tell({"layers": len(names)})
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(_failure(logger.errors, names))
    with Path(request.output).open("wb") as file:
        file.write(plan)
    if request.new_timing_cache is not None:
        Path(request.new_timing_cache).write_bytes(config.get_timing_cache().serialize())
    layers = _layers(network)
    return {
        "version": str(trt.__version__),
        "layers": layers,
        "precisions": dict(collections.Counter(item["precision"] for item in layers)),
        "plugins": plugins,
        "plugin_layers": sum(item["type"].startswith("PLUGIN") for item in layers),
        "decomposable_attention": split,
        "gpu": None if flavour.capabilities else _gpu(),
    }


def _gpu() -> dict[str, str] | None:
    """The GPU that an engine was built on and for."""
    with contextlib.suppress(OptimizerError):
        device = Driver().devices[0]
        return {"name": device.name, "capability": device.capability}
    return None


def _logger(trt: Any, tell: Tell) -> Any:
    """Tells of the node that is parsed, and keeps errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Of the library; from any of its threads."""
            kind = str(severity).rpartition(".")[2]
            if kind in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            if message.startswith(_PARSING):
                tell({"node": message.removeprefix(_PARSING)})
            tell({"log": kind, "text": message})

    return Logger()


def _parse(trt: Any, network: Any, logger: Any, model: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(model):
        return
    first = parser.get_error(0) if parser.num_errors else None
    if first is None:
        raise EngineError(_failure(logger.errors, ()))
    operator, node = first.node_operator(), first.node_name()
    # What a plugin says of itself comes before what the parser makes of it.
    own = [item for item in logger.errors if "Importer" not in item and first.desc() not in item]
    reason = "; ".join([*own[:1], first.desc()])
    msg = (
        f"TensorRT {trt.__version__} does not take node '{node}' ({operator}): "
        f"{reason}; write it in other operators, or load its plugin with --plugin"
    )
    raise EngineError(msg)


def _allow_decomposed_attention(trt: Any, network: Any) -> int:
    """Let attention run without a fused kernel too; returns the number of attentions.

    Without, a build fails for every head size, type and GPU that has none.
    """
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if str(layer.type).rpartition(".")[2] == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def _config(trt: Any, builder: Any, request: BuildRequest, tell: Tell) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, tell)
    if request.capabilities:
        config.num_compute_capabilities = len(request.capabilities)
        for index, number in enumerate(sorted(request.capabilities)):
            capability = getattr(trt.ComputeCapability, f"SM{number}", None)
            if capability is None or not config.set_compute_capability(capability, index):
                msg = f"--compute-capability: {trt.__version__} has no kernels for {number}"
                raise OptionError(msg)
    if request.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.new_timing_cache is not None:
        known = b""
        if request.timing_cache is not None and Path(request.timing_cache).is_file():
            known = Path(request.timing_cache).read_bytes()
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            msg = f"--timing-cache: {request.timing_cache} is of another GPU or version; name a new"
            raise OptionError(f"{msg} file")
    return config


def _monitor(trt: Any, tell: Tell) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            self.steps[phase_name] = num_steps
            tell({"phase": phase_name, "parent": parent_phase, "done": 0, "total": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Goes on: a build is stopped by ending the process."""
            total = self.steps.get(phase_name, 0)
            tell({"phase": phase_name, "done": step + 1, "total": total})
            return True

        def phase_finish(self, phase_name: str) -> None:
            """A phase is over."""
            self.steps.pop(phase_name, None)

    return Monitor()


def _add_profiles(builder: Any, network: Any, config: Any, request: BuildRequest) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for value in inputs:
        if value.is_shape_tensor:
            msg = f"input '{value.name}' decides shapes; export the model with it as a constant"
            raise EngineError(msg)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for value in inputs:
            if value.name in shapes and -1 in tuple(value.shape):
                low, usual, high = (tuple(item) for item in shapes[value.name])
                profile.set_shape(value.name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise OptionError("--shapes: TensorRT does not take the profile for this model")


def _failure(errors: Sequence[str], names: Sequence[str]) -> str:
    """One message: the node or layer that the errors name, and the first error."""
    text = " ".join(errors)
    found = sorted((name for name in names if len(name) > 3 and name in text), key=len)
    where = f" at '{found[-1]}'" if found else ""
    first = errors[0] if errors else "it gave no reason"
    return f"TensorRT built no engine{where}: {first}; the whole log: --log FILE"


def _layers(network: Any) -> list[dict[str, str]]:
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        output = layer.get_output(0) if layer.num_outputs else None
        kind = "NONE" if output is None else str(output.dtype).rpartition(".")[2]
        name = str(layer.type).rpartition(".")[2]
        found.append({"name": layer.name, "type": name, "precision": kind.lower()})
    return found
