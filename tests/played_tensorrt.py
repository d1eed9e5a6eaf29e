"""A played Jetson: TensorRT's Python API as far as a bundle uses it, and CUDA on the host.

The engine is the ONNX file itself, executed by ONNX's reference evaluator.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

_RUNTIME = """
#include <stdlib.h>
#include <string.h>
int cudaRuntimeGetVersion(int* v) { *v = 12060; return 0; }
int cudaMalloc(void** p, size_t n) { *p = malloc(n); return *p ? 0 : 2; }
int cudaFree(void* p) { free(p); return 0; }
int cudaMemcpy(void* to, const void* from, size_t n, int kind) {
  if (kind != 1 && kind != 2) return 1;
  memcpy(to, from, n);
  return 0;
}
int cudaDeviceSynchronize(void) { return 0; }
const char* cudaGetErrorString(int code) { return "played"; }
"""


def runtime(folder: Path, compiler: str) -> Path:
    """A library with the functions of libcudart, whose device is the host."""
    source, library = folder / "cudart.c", folder / "libcudart.so.12"
    source.write_text(_RUNTIME)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


class Played:
    """What the test sets and sees.

    Attributes:
        version: Of TensorRT.
        refuses: What the parser says of the last node.
        no_engine: What the builder logs instead of building.
        error: Added to every output.
        plugin_loads: Whether ``load_library`` succeeds.
        creators: Registered ones once the plugin is loaded: (name, namespace).
        interrupt: Called in the middle of a build.
        seen: What was called, in order.
    """

    def __init__(self) -> None:
        self.version, self.refuses, self.no_engine = "10.3.0", "", ""
        self.error, self.plugin_loads, self.interrupt = 0.0, True, None
        self.creators: list[tuple[str, str]] = [("SparseMatMul", "optimize")]
        self.seen: dict[str, Any] = {"loads": 0, "shapes": [], "pools": {}}

    def module(self) -> types.ModuleType:
        """What ``import tensorrt`` gives."""
        trt: Any = types.ModuleType("tensorrt")
        trt.__version__ = self.version
        trt.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})
        trt.IProgressMonitor = type("IProgressMonitor", (), {})
        trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        trt.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace", TACTIC_DRAM="dram")
        trt.TensorLocation = types.SimpleNamespace(HOST="host", DEVICE="device")
        trt.init_libnvinfer_plugins = lambda log, namespace: True
        trt.get_plugin_registry = lambda: _Registry(self)
        trt.Builder = lambda log: _Builder(self, log)
        trt.OnnxParser = lambda network, log: _Parser(self, network)
        trt.Runtime = lambda log: types.SimpleNamespace(
            deserialize_cuda_engine=lambda plan: _Engine(self, plan)
        )
        return trt


class _Registry:
    def __init__(self, played: Played) -> None:
        self._played = played
        self.all_creators = [
            types.SimpleNamespace(name=name, plugin_namespace=space)
            for name, space in played.creators
        ]

    def load_library(self, path: str) -> object | None:
        self._played.seen["loads"] += 1
        return object() if self._played.plugin_loads else None

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        assert version == "1"
        return object() if (name, namespace) in self._played.creators else None


class _Parser:
    def __init__(self, played: Played, network: Any) -> None:
        self._played, self._network = played, network
        network.parser = weakref.ref(self)

    def parse_from_file(self, path: str) -> bool:
        self._network.model = onnx.load(path)
        return not self._played.refuses

    num_errors = 1

    def get_error(self, index: int) -> Any:
        node = self._network.model.graph.node[-1]
        return types.SimpleNamespace(
            node_name=lambda: node.name or node.output[0],
            node_operator=lambda: node.op_type,
            desc=lambda: self._played.refuses,
        )


class _Builder:
    def __init__(self, played: Played, log: Any) -> None:
        self._played, self._log = played, log

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << 1, "strongly typed"
        return types.SimpleNamespace(model=None)

    def create_builder_config(self) -> Any:
        return _Config(self._played)

    def create_optimization_profile(self) -> Any:
        return types.SimpleNamespace(set_shape=lambda *row: self._played.seen["shapes"].append(row))

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        assert network.parser() is not None, "the weights are the parser's"
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            if self._played.interrupt is not None:
                self._played.interrupt(monitor)
            if not monitor.step_complete("Building", step):
                return None
        monitor.phase_finish("Building")
        if self._played.no_engine:
            self._log.log(1, self._played.no_engine)
            return None
        content: bytes = network.model.SerializeToString()
        return content


class _Config:
    builder_optimization_level = None

    def __init__(self, played: Played) -> None:
        self._played = played

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        assert pool != "dram" or size & (size - 1) == 0
        self._played.seen["pools"][pool] = size

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return cache in (b"", b"cache")

    def get_timing_cache(self) -> Any:
        return types.SimpleNamespace(serialize=lambda: b"cache")

    def add_optimization_profile(self, profile: Any) -> int:
        return 0


class _Engine:
    def __init__(self, played: Played, plan: bytes) -> None:
        self._played, self._model = played, onnx.load_from_string(bytes(plan))
        self._names = {
            value.name: value.type.tensor_type.elem_type
            for value in (*self._model.graph.input, *self._model.graph.output)
        }

    def get_tensor_dtype(self, name: str) -> str:
        kind = onnx.TensorProto.DataType.Name(self._names[name])
        return "DataType." + {"FLOAT16": "HALF", "BFLOAT16": "BF16"}.get(kind, kind)

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def create_execution_context(self) -> Any:
        return _Context(self._played, self._model)


class _Context:
    def __init__(self, played: Played, model: onnx.ModelProto) -> None:
        self._played, self._evaluator = played, ReferenceEvaluator(model)
        self._places: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._places[name] = pointer
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        shape = self._shapes["x"]
        content = ctypes.string_at(self._places["x"], 4 * int(np.prod(shape)))
        x = np.frombuffer(content, np.float32).reshape(shape)
        (y,) = self._evaluator.run(None, {"x": x})
        given = (y + np.float32(self._played.error)).astype(np.float32).tobytes()
        ctypes.memmove(self._places["y"], given, len(given))
        return True


def script(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The module ``build_engine`` of a bundle, freshly imported."""
    for name in ("build_engine", "engine_build", "engine_check"):
        patch.delitem(sys.modules, name, raising=False)
    patch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()
    return importlib.import_module("build_engine")
