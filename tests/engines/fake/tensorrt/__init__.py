"""Stands in for the module ``tensorrt``, where engines are built and where they are run.

It has the names that the program uses; FAKE_TENSORRT says how a build or a run goes.
"""

import enum
import json
import os
import pathlib
import sys
import time

import numpy as np
import onnx

from tensorrt._runtime import (
    DataType,
    ICudaEngine,
    IExecutionContext,
    IOutputAllocator,
    Runtime,
    TensorIOMode,
    TensorLocation,
    pack,
)


def _numbers(text):
    return [int(part) for part in text.split(".")]


__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0.30")
_MODE = os.environ.get("FAKE_TENSORRT", "ok")


def mode():
    """What FAKE_TENSORRT says now."""
    return os.environ.get("FAKE_TENSORRT", "ok")


_TURN = {"plugin_namespace": "acme", "name": "Turn", "plugin_version": "1"}
_FILE = pathlib.Path(__file__).parent.parent.parent / "api_surface.json"
#: Class -> names, of the newest recorded release that is not newer than this version.
SURFACE = [
    names
    for release, names in sorted(
        json.loads(_FILE.read_text()).items(), key=lambda item: _numbers(item[0])
    )
    if _numbers(release)[:2] <= _numbers(__version__)[:2]
][-1]


class _Record:
    """An object of a class of TensorRT's: what the version's class does not have, it refuses."""

    def __init__(self, kind, values, **hidden):
        assert set(values) <= set(SURFACE[kind]), f"{kind} of {__version__} lacks one of {values}"
        self.__dict__.update(values, **hidden)


#: Factor on the weights of the engine, by what FAKE_TENSORRT says.
_WRONG = {"wrong engine": np.float32(1.5), "coarse engine": np.float32(1 + 1e-4)}


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    pass


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    VERSION_COMPATIBLE = 0


class HardwareCompatibilityLevel(enum.Enum):
    AMPERE_PLUS = 1


_KINDS = ["MATRIX_MULTIPLY", "ATTENTION_OUTPUT"]
LayerType = enum.Enum("LayerType", [kind for kind in _KINDS if kind in SURFACE["LayerType"]])


class IPluginRegistry:
    all_creators = (_Record("IPluginCreatorV3One", _TURN),)

    def load_library(self, path):
        return None


def get_plugin_registry():
    return IPluginRegistry()


class Builder:
    def __init__(self, logger):
        self.logger = logger
        if _MODE == "no gpu":
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags):
        assert flags == 1 << 1, "strongly typed"
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 3)
        monitor.step_complete("Building Engine", 0)
        if _MODE == "hang":
            pathlib.Path(os.environ["FAKE_TENSORRT_PID"]).write_text(str(os.getpid()))
            time.sleep(600)
        if _MODE == "abort in build":
            sys.stderr.write("terminate called without an active exception\n")
            sys.stderr.flush()
            os.abort()
        if _MODE == "killed":
            os.kill(os.getpid(), 9)
        if _MODE == "memory":
            return bytearray(1 << 34)
        if _MODE == "refuse in build":
            self.logger.log(Severity.ERROR, "could not find any implementation for node layer_one")
            return None
        assert _attention is None or _attention.decomposable
        model = network.model
        if _MODE in _WRONG:  # as a defect of the library, or its rounding, would make it
            for tensor in model.graph.initializer:
                array = onnx.numpy_helper.to_array(tensor)
                if array.dtype == "float32" and array.ndim == 2:
                    tensor.CopyFrom(
                        onnx.numpy_helper.from_array(array * _WRONG[_MODE], tensor.name)
                    )
        return pack(__version__, config.profiles, config.sets, model)


class INetworkDefinition:
    name = ""
    num_layers = len(LayerType.__members__)

    @property
    def num_inputs(self):
        return len(self._inputs())

    def _inputs(self):
        weights = {item.name for item in self.model.graph.initializer}
        return [item for item in self.model.graph.input if item.name not in weights]

    def get_input(self, index):
        value = self._inputs()[index]
        dims = value.type.tensor_type.shape.dim
        shape = tuple(item.dim_value if item.HasField("dim_value") else -1 for item in dims)
        shaping = _MODE == "shape input"
        return _Record("ITensor", {"name": value.name, "shape": shape, "is_shape_tensor": shaping})

    def get_layer(self, index):
        has_attention = "ATTENTION_OUTPUT" in LayerType.__members__
        return _Attention() if has_attention and index == 1 else _Layer("MATRIX_MULTIPLY")


class ILayer:
    name = "layer_one"
    num_outputs = 1

    def get_output(self, index):
        return _Record("ITensor", {"dtype": DataType.FLOAT})


class _Layer(ILayer):
    def __init__(self, kind):
        self.type = LayerType[kind]


class IAttentionOutputLayer(ILayer):
    """The class that a layer of that type gets; without it, it has no attention."""

    @property
    def attention(self):
        return _attention


class _Attention(_Layer):
    def __init__(self):
        super().__init__("ATTENTION_OUTPUT")


class IOptimizationProfile:
    def __init__(self):
        self._shapes = []

    def set_shape(self, name, low, usual, high):
        self._shapes.append((name, low, usual, high))


_attention = _Record("IAttention", {"decomposable": False}) if "IAttention" in SURFACE else None


class IBuilderConfig:
    progress_monitor = None

    def __init__(self):
        self.sets, self.profiles = [], []
        self.cache = b""

    def set_flag(self, flag):
        self.sets.append(flag)

    def add_optimization_profile(self, profile):
        self.sets += profile._shapes
        self.profiles.append({name: three for name, *three in profile._shapes})
        return len(self.profiles) - 1

    def create_timing_cache(self, content):
        return _Record("ITimingCache", {}, content=content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache.content
        return cache.content != b"other GPU"

    def get_timing_cache(self):
        return _Record("ITimingCache", {"serialize": lambda: self.cache + b"+"})


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.logger, self._network = logger, network

    def parse_from_file(self, path):
        self.logger.log(Severity.VERBOSE, "Parsing node: first [MatMul]")
        if _MODE == "abort in parser":
            os.abort()
        if _MODE == "refuse in parser":
            self.num_errors = 1
            return False
        self._network.model = onnx.load(path)
        return True

    def get_error(self, index):
        values = {
            "node_operator": lambda: "ScatterND",
            "node_name": lambda: "second",
            "desc": lambda: "reduction is not supported",
        }
        return _Record("ParserError", values)


for _kind in (
    Builder, BuilderFlag, HardwareCompatibilityLevel, IBuilderConfig, ILayer, INetworkDefinition,
    ICudaEngine, IExecutionContext, IOptimizationProfile, IOutputAllocator, IPluginRegistry,
    IProgressMonitor, NetworkDefinitionCreationFlag, OnnxParser, Runtime, TensorIOMode,
    TensorLocation,
):  # fmt: skip
    _own = {name for name in vars(_kind) if not name.startswith("_")}
    _lacks = _own - set(SURFACE[_kind.__name__]) - {"logger", "sets", "cache", "value"}
    assert not _lacks, f"{_kind.__name__} of {__version__} has no {_lacks}"
