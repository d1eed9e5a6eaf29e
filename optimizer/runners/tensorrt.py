"""Runs TensorRT engines, full TensorRT and TensorRT for RTX alike, on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from optimizer.engines.cuda import Gpu, Memory
from optimizer.engines.loading import load_engine
from optimizer.engines.profiles import Shape
from optimizer.errors import CalibrationError, EngineError
from optimizer.runners.base import Feed
from optimizer.samples import InputSpec, check_feed

#: TensorRT's name of a type -> numpy's. Types of less than a byte are no inputs or outputs here.
_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass
class _Tensor:
    """One input or output: where it lies now.

    Attributes:
        spec: Name, type, and shape, None where a length varies.
        host: Whether TensorRT reads it from the host's memory (values that decide shapes).
        memory: Of the GPU.
        array: What a feed gave, kept while it is copied, or while TensorRT reads it.
        allocator: Of an output whose size depends on data.
    """

    spec: InputSpec
    host: bool
    memory: Memory | None = None
    array: np.ndarray | None = None
    allocator: Any = None

    def place(self, gpu: Gpu, size: int) -> int:
        """Address of memory of at least this size; what there is is used again."""
        if self.memory is None or self.memory.size < size:
            if self.memory is not None:
                self.memory.free()
            self.memory = None
            self.memory = gpu.allocate(size)
        return self.memory.pointer


@dataclass(frozen=True)
class _Profile:
    """Smallest, usual and largest shape of every input with dynamic axes."""

    index: int
    shapes: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)

    def misfit(self, feed: Mapping[str, np.ndarray]) -> str | None:
        """The first input that is out of range, in words."""
        for name, (low, _, high) in self.shapes.items():
            shape = feed[name].shape
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return f"'{name}' {list(shape)}, profile {self.index} takes {list(low)} to " + (
                    str(list(high))
                )
        return None


class TensorRTRunner:
    """One engine on a GPU, with an execution context and a stream of its own.

    ``run`` copies a feed to the GPU, executes, and copies the outputs back. For latencies, ``bind``
    does the first and ``outputs`` the last of these, and ``execute`` what is between: the time of
    the engine alone, until the GPU is done.

    Attributes:
        inputs: What a feed must hold.
        gpu: Name and compute capability of the GPU.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        plugins: Sequence[str | Path] = (),
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the engine.

        Args:
            path: Of the plan.
            plugins: Libraries of plugins, besides those found by the manifest.
            manifest: Instead of the one beside the file.

        Raises:
            MissingDependencyError: There is no GPU here, or no TensorRT of this flavour.
            EngineError: The engine cannot be used here; says why.
        """
        self._where, self._heard = str(path), 0
        loaded = load_engine(
            Path(path), plugins=[Path(item) for item in plugins], manifest=manifest
        )
        self._loaded, self._gpu, self._trt = loaded, loaded.gpu, loaded.trt
        self.gpu = loaded.gpu.device
        engine = loaded.engine
        self._context = _context(loaded.trt, engine)
        if self._context is None:
            raise self._error("no memory for its activations on the GPU")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs: dict[str, _Tensor] = {}
        self._outputs: dict[str, _Tensor] = {}
        for name in names:
            mine = self._inputs if self._is_input(name) else self._outputs
            mine[name] = self._tensor(name)
        self.inputs = tuple(tensor.spec for tensor in self._inputs.values())
        self.profiles = tuple(
            _Profile(index, self._ranges(index))
            for index in range(engine.num_optimization_profiles)
        )
        self._active: int | None = None

    def _is_input(self, name: str) -> bool:
        return bool(self._loaded.engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _tensor(self, name: str) -> _Tensor:
        engine = self._loaded.engine
        kind = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        if kind not in _DTYPES:
            msg = f"{self._where}: '{name}' has the type {kind}, which no feed can hold; expected "
            raise EngineError(f"{msg}one of {', '.join(_DTYPES)}; build it with a Cast in front")
        shape = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
        host = engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        return _Tensor(InputSpec(name, np.dtype(_DTYPES[kind]), shape), bool(host))

    def _ranges(self, index: int) -> dict[str, tuple[Shape, Shape, Shape]]:
        found = {}
        for spec in self.inputs:
            if None in spec.shape:
                three = self._loaded.engine.get_tensor_profile_shape(spec.name, index)
                low, usual, high = (tuple(shape) for shape in three)
                found[spec.name] = (low, usual, high)
        return found

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that a feed must hold."""
        return tuple(self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the engine's order."""
        return tuple(self._outputs)

    def primary_output(self) -> str:
        """The output that drift is measured on: ``logits``, or the first float output.

        Raises:
            CalibrationError: There is none.
        """
        floating = [
            name
            for name, tensor in self._outputs.items()
            if tensor.spec.dtype.kind in "fV" and not name.startswith("present")
        ]
        if "logits" in self._outputs or floating:
            return "logits" if "logits" in self._outputs else floating[0]
        msg = f"{self._where}: none of its outputs ({', '.join(self._outputs)}) is a float tensor"
        raise CalibrationError(msg)

    def largest_batch(self) -> int | None:
        """Rows that any profile takes, None where the engine has no dynamic first axis."""
        most = [
            min(three[2][0] for three in profile.shapes.values() if three[2])
            for profile in self.profiles
            if any(three[2] for three in profile.shapes.values())
        ]
        return max(most, default=None)

    def takes(self, feed: Feed) -> bool:
        """Whether a profile has room for a feed."""
        return any(profile.misfit(feed) is None for profile in self.profiles)

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        """Run once and return every output by name.

        Raises:
            CalibrationError: The feed does not fit the inputs, or no profile.
            EngineError: The GPU or the engine failed.
        """
        self.bind(feed)
        self.execute()
        return self.outputs()

    def bind(self, feed: Feed) -> None:
        """Copy a feed to the GPU and make room for the outputs.

        Raises:
            CalibrationError: The feed does not fit the inputs, or no profile.
            EngineError: The GPU has not enough memory, or the engine refuses the shapes.
        """
        check_feed(feed, self.inputs, self._where)
        self._heard = len(self._loaded.errors)
        self._gpu.activate()
        self._choose(feed)
        for name, tensor in self._inputs.items():
            tensor.array = np.ascontiguousarray(feed[name])
            if not self._context.set_input_shape(name, tuple(tensor.array.shape)):
                raise self._error(f"it refuses '{name}' {list(tensor.array.shape)}")
            if tensor.host:
                # An empty array may have no address of its own.
                tensor.array = (
                    tensor.array if tensor.array.size else np.zeros(1, tensor.array.dtype)
                )
                self._address(name, tensor.array.ctypes.data)
                continue
            pointer = tensor.place(self._gpu, tensor.array.nbytes)
            self._gpu.upload(pointer, tensor.array)
            self._address(name, pointer)
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._error(f"it refuses these shapes ({error})") from error
        if missing:
            raise self._error(f"nothing says what the shape or value of {', '.join(missing)} is")
        for name, tensor in self._outputs.items():
            self._prepare(name, tensor)
        self._gpu.synchronize()

    def _choose(self, feed: Feed) -> None:
        """Make the profile active that takes the feed; the active one is asked first."""
        profiles = sorted(self.profiles, key=lambda item: item.index != self._active)
        fitting = next((item for item in profiles if item.misfit(feed) is None), None)
        if fitting is None:
            reasons = "; ".join(str(profile.misfit(feed)) for profile in self.profiles)
            msg = f"{self._where}: no optimization profile fits: found {reasons}; give other data "
            raise CalibrationError(f"{msg}or --shape, or build the engine with --shapes for it")
        if fitting.index == self._active:
            return
        if not self._context.set_optimization_profile_async(fitting.index, self._gpu.stream):
            raise self._error(f"it does not take its profile {fitting.index}")
        self._gpu.synchronize()
        self._active = fitting.index

    def _prepare(self, name: str, tensor: _Tensor) -> None:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:  # known when it has been computed
            tensor.allocator = tensor.allocator or _allocator(self._trt, self._gpu, tensor)
            tensor.array = None
            if not self._context.set_output_allocator(name, tensor.allocator):
                raise self._error(f"it takes no memory for output '{name}'")
            return
        if tensor.allocator is not None:
            self._context.set_output_allocator(name, None)
            tensor.allocator = None
        tensor.array = np.empty(shape, tensor.spec.dtype)
        if tensor.host:
            self._address(name, tensor.array.ctypes.data)
        else:
            self._address(name, tensor.place(self._gpu, tensor.array.nbytes))

    def _address(self, name: str, pointer: int) -> None:
        if not self._context.set_tensor_address(name, pointer):
            raise self._error(f"it takes no memory for '{name}'")

    def execute(self) -> None:
        """Run once on what was bound; returns when the GPU is done.

        Raises:
            EngineError: It failed.
        """
        self._heard = len(self._loaded.errors)
        self._gpu.activate()
        if not self._context.execute_async_v3(self._gpu.stream):
            raise self._error("it failed")
        try:
            self._gpu.synchronize()
        except EngineError as error:
            raise self._error(str(error)) from error

    def outputs(self) -> dict[str, np.ndarray]:
        """Outputs of the last run, copied from the GPU.

        Raises:
            EngineError: The GPU failed.
        """
        self._gpu.activate()
        found = {}
        for name, tensor in self._outputs.items():
            array = tensor.array
            if tensor.allocator is not None:
                array = np.empty(tensor.allocator.shape, tensor.spec.dtype)
            assert array is not None  # noqa: S101 - ``bind`` comes first
            array = array.copy()  # the caller's; the next run must not change it
            if not tensor.host and tensor.memory is not None:
                self._gpu.download(array, tensor.memory.pointer)
            found[name] = array
        self._gpu.synchronize()
        return found

    def named(self, axes: Mapping[str, Sequence[int | str | None]]) -> tuple[InputSpec, ...]:
        """The inputs with the names of dynamic axes that another model has for them."""
        found = []
        for spec in self.inputs:
            other = axes.get(spec.name, ())
            if len(other) == len(spec.shape):
                pairs = zip(spec.shape, other, strict=True)
                names = tuple(
                    size if size is not None or isinstance(name, int) else name
                    for size, name in pairs
                )
                spec = replace(spec, shape=names)  # noqa: PLW2901
            found.append(spec)
        return tuple(found)

    def _error(self, what: str) -> EngineError:
        """An error, with what the library said about it first."""
        new = self._loaded.errors[self._heard :]
        said = f": {new[0]}" if new else ""
        return EngineError(
            f"{self._where}: the engine cannot be run on {self.gpu.name}: {what}{said}"
        )


def _context(trt: Any, engine: Any) -> Any:
    """An execution context.

    TensorRT for RTX compiles kernels for the shapes that it meets. Unless it is told to wait for
    them it goes on with slower ones meanwhile, and which kernels ran would be a matter of time.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)


def _allocator(trt: Any, gpu: Gpu, tensor: _Tensor) -> Any:
    """Gives memory for an output when TensorRT knows how much."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shape: Shape = ()

        def reallocate_output_async(
            self, _name: str, _memory: int, size: int, _alignment: int, _stream: int
        ) -> int:
            """Memory that is large enough; 0 tells TensorRT that there is none."""
            try:
                return tensor.place(gpu, size)
            except EngineError:
                return 0

        def notify_shape(self, _name: str, shape: Sequence[int]) -> None:
            """What came out."""
            self.shape = tuple(shape)

    return Allocator()
