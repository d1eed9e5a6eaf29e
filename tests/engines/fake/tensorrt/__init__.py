"""Stands in for the module ``tensorrt`` in the process that builds.

It has the names that the program uses; FAKE_TENSORRT says how a build goes.
"""

import enum
import os
import pathlib
import sys
import time
from types import SimpleNamespace

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0.30")
_MODE = os.environ.get("FAKE_TENSORRT", "ok")


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


class LayerType(enum.Enum):
    MATRIX_MULTIPLY = 0
    ATTENTION_OUTPUT = 1


class DataType(enum.Enum):
    FLOAT = 0


class _Registry:
    all_creators = (SimpleNamespace(plugin_namespace="acme", name="Turn", plugin_version="1"),)

    def load_library(self, path):
        return None


def get_plugin_registry():
    return _Registry()


class Builder:
    def __init__(self, logger):
        self.logger = logger
        if _MODE == "no gpu":
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags):
        assert flags == 1 << 1, "strongly typed"
        return _Network()

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

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
        return b"ftrt" + bytes(20) + bytes((10, 3, 0, 30)) + bytes(100) + repr(config.sets).encode()


class _Network:
    name = ""
    num_inputs = 1
    num_layers = 1

    def get_input(self, index):
        return SimpleNamespace(name="x", shape=(-1, 4), is_shape_tensor=_MODE == "shape input")

    def get_layer(self, index):
        return SimpleNamespace(
            name="layer_one",
            type=LayerType.MATRIX_MULTIPLY,
            num_outputs=1,
            get_output=lambda _: SimpleNamespace(dtype=DataType.FLOAT),
        )


class _Profile:
    def set_shape(self, name, low, usual, high):
        self.shapes = (name, low, usual, high)


class _Config:
    progress_monitor = None

    def __init__(self):
        self.sets = []
        self.cache = b""

    def set_flag(self, flag):
        self.sets.append(flag)

    def add_optimization_profile(self, profile):
        self.sets.append(profile.shapes)
        return 0

    def create_timing_cache(self, content):
        return SimpleNamespace(content=content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache.content
        return cache.content != b"other GPU"

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.cache + b"+")


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.logger = logger

    def parse_from_file(self, path):
        self.logger.log(Severity.VERBOSE, "Parsing node: first [MatMul]")
        if _MODE == "abort in parser":
            os.abort()
        if _MODE == "refuse in parser":
            self.num_errors = 1
            return False
        return True

    def get_error(self, index):
        return SimpleNamespace(
            node_operator=lambda: "ScatterND",
            node_name=lambda: "second",
            desc=lambda: "reduction is not supported",
        )
