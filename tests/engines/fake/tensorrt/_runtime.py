"""Engines of the module that stands in: the ONNX model in the plan, run by ONNX Runtime.

It works on the memory and the streams of ``played_cuda`` and holds callers to TensorRT's rules:
shapes within the active profile, an address for every tensor, nothing read before it was set.
"""

import ctypes
import enum
import json
import struct

import numpy as np
import onnx

_HEADER = 32
#: Operators whose output has a size that depends on what is computed.
_OPEN = {"NonZero", "Compress", "Unique"}
_KINDS = {
    1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF",
    16: "BF16", 17: "FP8", 22: "INT4",
}  # fmt: skip
DataType = enum.Enum("DataType", {kind: number for number, kind in _KINDS.items()})


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class IOutputAllocator:
    pass


def pack(version, profiles, sets, model):
    """A plan: header, profiles and flags as JSON, the model."""
    numbers = [int(part) for part in version.split(".")]
    head = b"ftrt" + bytes(20) + bytes([*numbers, 0, 0, 0, 0][:4]) + bytes(4)
    facts = json.dumps({"profiles": profiles, "sets": repr(sets)}).encode()
    return head + struct.pack("<Q", len(facts)) + facts + model.SerializeToString()


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        from tensorrt import Severity, mode

        said = {
            "corrupt": "Serialization assertion plan.header.size == blobSize failed",
            "no gpu memory": "Error Code 2: OutOfMemory (Requested size was 9 bytes.)",
            "plugin missing": "could not find plugin: SparseMatMul version: 1 namespace: optimize",
            "other driver": "Error Code 1: Cuda Runtime (cudaError 35: driver is insufficient)",
        }.get(mode())
        if said is not None:
            self.logger.log(Severity.ERROR, said)
            return None
        (size,) = struct.unpack_from("<Q", plan, _HEADER)
        facts = json.loads(plan[_HEADER + 8 : _HEADER + 8 + size])
        if "VERSION_COMPATIBLE" in facts["sets"]:
            assert self.engine_host_code_allowed
        model = onnx.load_from_string(bytes(plan[_HEADER + 8 + size :]))
        return ICudaEngine(self.logger, model, facts["profiles"])


class ICudaEngine:
    def __init__(self, logger, model, profiles):
        self.logger, self.model, self.profiles = logger, model, profiles
        graph = model.graph
        weights = {item.name for item in graph.initializer}
        self.inputs = [item for item in graph.input if item.name not in weights]
        self.values = {item.name: item for item in (*self.inputs, *graph.output)}

    @property
    def num_io_tensors(self):
        return len(self.values)

    @property
    def num_optimization_profiles(self):
        return max(1, len(self.profiles))

    def get_tensor_name(self, index):
        return list(self.values)[index]

    def get_tensor_mode(self, name):
        given = any(item.name == name for item in self.inputs)
        return TensorIOMode.INPUT if given else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType(self.values[name].type.tensor_type.elem_type)

    def get_tensor_shape(self, name):
        dims = self.values[name].type.tensor_type.shape.dim
        return tuple(item.dim_value if item.HasField("dim_value") else -1 for item in dims)

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name.startswith("host_") else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def create_execution_context(self):
        from tensorrt import mode

        return None if mode() == "no context" else IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine):
        import onnx_ir as ir
        import played_cuda

        from optimizer.runners.ort import OrtRunner

        self._engine = engine
        self._driver = played_cuda.CURRENT
        kinds = [item.type.tensor_type.elem_type for item in engine.values.values()]
        if onnx.TensorProto.INT4 not in kinds:  # which ONNX Runtime has for weights only
            self._runner = OrtRunner(ir.serde.deserialize_model(engine.model))
        self._open = any(node.op_type in _OPEN for node in engine.model.graph.node)
        self._profile = 0
        self._shapes, self._places, self._allocators = {}, {}, {}

    def _refuse(self, text):
        from tensorrt import Severity

        self._engine.logger.log(Severity.ERROR, text)
        return False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle in self._driver.streams
        if profile_index >= self._engine.num_optimization_profiles:
            return self._refuse("profile index is out of range")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name, shape):
        if -1 in self._engine.get_tensor_shape(name):
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return self._refuse(f"set_input_shape: {name} {shape} is not in {low} to {high}")
        self._shapes[name] = shape
        return True

    def infer_shapes(self):
        return [item.name for item in self._engine.inputs if item.name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return self._shapes[name]
        if self._open:
            return self._engine.get_tensor_shape(name)
        feed = {
            spec.name: self._read(spec)
            if self._engine.get_tensor_location(spec.name) == TensorLocation.HOST
            else np.zeros(self._shapes[spec.name], spec.dtype)
            for spec in self._runner.inputs
        }
        return self._runner.run(feed)[name].shape

    def set_tensor_address(self, name, memory):
        assert isinstance(memory, int)
        if not memory:
            return self._refuse(f"the address of {name} is null")
        self._places[name] = memory
        return True

    def set_output_allocator(self, name, output_allocator):
        self._allocators[name] = output_allocator
        return True

    def execute_async_v3(self, stream_handle):
        from tensorrt import mode

        if mode() == "fails":
            return self._refuse("Error Code 7: Internal Error (a shape is inconsistent)")
        for name in self._engine.values:
            if not self._places.get(name) and not self._allocators.get(name):
                return self._refuse(f"neither address nor allocator is set for {name}")
        if any(self._allocators.values()):  # the size must be known when this returns
            self._driver.drain(stream_handle)
            return self._work(stream_handle) or self._refuse("Error Code 2: no output memory")
        self._driver.put(stream_handle, lambda: self._work(stream_handle))
        return True

    def _work(self, stream):
        found = self._runner.run({spec.name: self._read(spec) for spec in self._runner.inputs})
        for name, array in found.items():
            place = self._places.get(name, 0)
            allocator = self._allocators.get(name)
            if allocator is not None:
                place = allocator.reallocate_output_async(name, 0, array.nbytes, 256, stream)
                if not place:
                    return False
                allocator.notify_shape(name, array.shape)
            self._copy(place, array)
        return True

    def _read(self, spec):
        shape = self._shapes[spec.name]
        array = np.empty(shape, spec.dtype)
        place = self._places[spec.name]
        if self._engine.get_tensor_location(spec.name) == TensorLocation.DEVICE:
            self._driver.at(place, array.nbytes)
        ctypes.memmove(array.ctypes.data, place, array.nbytes)
        return array

    def _copy(self, place, array):
        array = np.ascontiguousarray(array)
        ctypes.memmove(self._driver.at(place, array.nbytes), array.ctypes.data, array.nbytes)
