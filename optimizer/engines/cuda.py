"""One GPU through the driver's own interface (``libcuda``): memory, copies, a stream.

Its functions and the name of its library are the same for every version of CUDA, and it is there
exactly where a driver is; a CUDA runtime or torch need not be. TensorRT works in the device's
primary context, which is the one that is used here (CUDA driver API, "Primary Context Management").
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.errors import EngineError, MissingDependencyError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
#: Of CUresult and CUdevice_attribute in cuda.h.
_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
_MAJOR, _MINOR = 75, 76
_NON_BLOCKING = 1
_ELSEWHERE = "an engine runs where a GPU is, and 'optimize doctor' says what a machine has"


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        index: In the driver's order, as CUDA_VISIBLE_DEVICES leaves it.
        name: Of the product.
        capability: Compute capability, such as "8.9".
    """

    index: int
    name: str
    capability: str


class Driver:
    """The driver and the GPUs it shows.

    Attributes:
        devices: At least one.
    """

    def __init__(self) -> None:
        """Load and initialize it.

        Raises:
            MissingDependencyError: There is no driver, it fails, or it shows no GPU.
        """
        try:
            self._library: Any = load_library()
        except OSError as error:
            msg = f"there is no NVIDIA driver here ({_LIBRARY} is not found)"
            raise MissingDependencyError(f"{msg}; {_ELSEWHERE}") from error
        status = self._library.cuInit(ctypes.c_uint(0))
        if status == _NO_DEVICE:
            msg = (
                "the NVIDIA driver shows no GPU; is CUDA_VISIBLE_DEVICES set, or the container "
                f"started without its GPUs? {_ELSEWHERE}"
            )
            raise MissingDependencyError(msg)
        if status:
            msg = f"the NVIDIA driver does not start ({self._error(status)}); 'optimize doctor' may"
            raise MissingDependencyError(f"{msg} say why")
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        self.devices = tuple(self._device(index) for index in range(count.value))

    def _device(self, index: int) -> Device:
        handle, name = self.handle(index), ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, ctypes.c_int(256), handle)
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            number = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(number), ctypes.c_int(attribute), handle)
            numbers.append(number.value)
        text = name.value.decode(errors="replace")
        return Device(index, text, ".".join(map(str, numbers)))

    def handle(self, index: int) -> ctypes.c_int:
        """The driver's name of a GPU."""
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        return device

    def call(self, name: str, *words: Any) -> None:
        """Call a function.

        Raises:
            EngineError: It failed; says how.
        """
        status = getattr(self._library, name)(*words)
        if status == _OUT_OF_MEMORY:
            msg = f"the GPU has not enough memory ({name}); give smaller shapes, or close other"
            raise EngineError(f"{msg} programs that use it")
        if status:
            raise EngineError(f"{name} failed: {self._error(status)}")

    def _error(self, status: int) -> str:
        text = ctypes.c_char_p()
        with contextlib.suppress(AttributeError):
            self._library.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        return f"CUDA error {status}: {(text.value or b'unknown').decode(errors='replace')}"


def load_library() -> Any:
    """The driver's library.

    Raises:
        OSError: There is none.
    """
    return ctypes.CDLL(_LIBRARY)


class Gpu:
    """The primary context of one GPU, and a stream of its own.

    Attributes:
        device: Which.
        stream: The stream's handle.
    """

    def __init__(self, driver: Driver, device: Device) -> None:
        self.device = device
        self._driver = driver
        self._context = ctypes.c_void_p()
        handle = driver.handle(device.index)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        self.activate()
        made = ctypes.c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(made), ctypes.c_uint(_NON_BLOCKING))
        self.stream: int = made.value or 0
        # The context is left to the end of the process: engines and torch may use it too.
        self._close = weakref.finalize(self, _quietly, driver, "cuStreamDestroy_v2", made)

    def activate(self) -> None:
        """Make it the GPU of this thread."""
        self._driver.call("cuCtxSetCurrent", self._context)

    def synchronize(self) -> None:
        """Wait until everything in the stream is done.

        Raises:
            EngineError: Something in it failed.
        """
        self._driver.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def allocate(self, size: int) -> Memory:
        """Memory of at least one byte: TensorRT wants an address for empty tensors too."""
        size, pointer = max(size, 1), ctypes.c_uint64()
        self._driver.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return Memory(self._driver, pointer.value, size)

    def upload(self, pointer: int, array: np.ndarray) -> None:
        """Copy an array, which must stay as it is until ``synchronize``."""
        if array.nbytes:
            self._driver.call(
                "cuMemcpyHtoDAsync_v2",
                ctypes.c_uint64(pointer),
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_size_t(array.nbytes),
                ctypes.c_void_p(self.stream),
            )

    def download(self, array: np.ndarray, pointer: int) -> None:
        """Copy into an array, which is filled after ``synchronize``."""
        if array.nbytes:
            self._driver.call(
                "cuMemcpyDtoHAsync_v2",
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_uint64(pointer),
                ctypes.c_size_t(array.nbytes),
                ctypes.c_void_p(self.stream),
            )


class Memory:
    """Memory of the GPU, until this object is gone.

    Attributes:
        pointer: Its address.
        size: Bytes.
    """

    def __init__(self, driver: Driver, pointer: int, size: int) -> None:
        self.pointer = pointer
        self.size = size
        self.free = weakref.finalize(
            self, _quietly, driver, "cuMemFree_v2", ctypes.c_uint64(pointer)
        )


def _quietly(driver: Driver, name: str, handle: Any) -> None:
    """At the end of a process the driver may be gone already."""
    with contextlib.suppress(EngineError):
        driver.call(name, handle)
