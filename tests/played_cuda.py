"""A played driver of NVIDIA's: memory of the host, streams that do nothing before they must.

What is put into a stream is done when it is synchronized, so that a missing wait shows as wrong
numbers, and every address must lie in memory that was allocated.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimizer.engines import cuda, library

#: The folder of the module that stands in for TensorRT.
FAKE = Path(__file__).resolve().parent / "engines" / "fake"
#: The driver of the test that runs; the module that stands in for TensorRT works on it.
CURRENT: PlayedDriver | None = None


class PlayedDriver:
    """The functions of ``libcuda`` that are used.

    Attributes:
        gpus: (name, compute capability) of each.
        fails: Function -> status to return instead of working.
        memory: Address -> what was allocated there.
        streams: Handle -> what waits in it.
        calls: Names of functions, in order.
        limit: Bytes that can be allocated.
    """

    def __init__(self, *capabilities: str) -> None:
        self.gpus = [("Played GPU", item) for item in capabilities or ("8.9",)]
        self.fails: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.calls: list[str] = []
        self.limit = 1 << 30
        self.context = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(type(self), f"_{name}")

        def call(*words: Any) -> int:
            self.calls.append(name)
            if name in self.fails:
                return self.fails[name]
            status = function(self, *words)
            return int(status or 0)

        return call

    def at(self, pointer: int, size: int) -> int:
        """The address, if so many bytes were allocated there."""
        held = self.memory.get(pointer)
        assert held is not None, f"{pointer} was not allocated"
        assert size <= len(held), f"{size} bytes at memory of {len(held)}"
        return pointer

    def put(self, stream: int, work: Callable[[], None]) -> None:
        """Wait in a stream."""
        self.streams[stream].append(work)

    def drain(self, stream: int) -> None:
        """Do what waits."""
        while self.streams[stream]:
            self.streams[stream].pop(0)()

    def _cuInit(self, flags: Any) -> int:
        return 0 if self.gpus else 100

    def _cuGetErrorString(self, status: Any, text: Any) -> None:
        text._obj.value = {700: b"an illegal memory access was encountered"}.get(
            status.value, b"played failure"
        )

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(self.gpus)

    def _cuDeviceGet(self, device: Any, index: Any) -> None:
        device._obj.value = index.value

    def _cuDeviceGetName(self, name: Any, size: Any, device: Any) -> None:
        name.value = self.gpus[device.value][0].encode()

    def _cuDeviceGetAttribute(self, number: Any, kind: Any, device: Any) -> None:
        major, minor = self.gpus[device.value][1].split(".")
        number._obj.value = int({75: major, 76: minor}[kind.value])

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        context._obj.value = 1000 + device.value

    def _cuCtxSetCurrent(self, context: Any) -> None:
        self.context = context.value

    def _cuStreamCreate(self, stream: Any, flags: Any) -> None:
        stream._obj.value = 0x5000 + len(self.streams)
        self.streams[stream._obj.value] = []

    def _cuStreamDestroy_v2(self, stream: Any) -> None:
        del self.streams[stream.value]

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self.drain(stream.value)

    def _cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        assert size.value > 0, "the driver refuses to allocate nothing"
        if sum(map(len, self.memory.values())) + size.value > self.limit:
            return 2
        held = ctypes.create_string_buffer(b"\xff" * size.value, size.value)
        pointer._obj.value = ctypes.addressof(held)
        self.memory[pointer._obj.value] = held
        return 0

    def _cuMemFree_v2(self, pointer: Any) -> None:
        del self.memory[pointer.value]

    def _cuMemcpyHtoDAsync_v2(self, to: Any, host: Any, size: Any, stream: Any) -> None:
        target = self.at(to.value, size.value)
        self.put(stream.value, lambda: ctypes.memmove(target, host.value, size.value) and None)

    def _cuMemcpyDtoHAsync_v2(self, host: Any, source: Any, size: Any, stream: Any) -> None:
        origin = self.at(source.value, size.value)
        self.put(stream.value, lambda: ctypes.memmove(host.value, origin, size.value) and None)


def stage(patch: Any, *capabilities: str, version: str = "10.3.0.30") -> PlayedDriver:
    """A machine with GPUs of these compute capabilities (8.9) and a version of TensorRT.

    Both stand in, here and in processes that are started.
    """
    driver = PlayedDriver(*capabilities)
    patch.setenv("FAKE_TENSORRT", "ok")
    patch.setenv("FAKE_TENSORRT_VERSION", version)
    patch.setenv("PYTHONPATH", f"{FAKE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    patch.syspath_prepend(str(FAKE))
    for name in ("tensorrt", "tensorrt._runtime"):
        patch.delitem(sys.modules, name, raising=False)
    patch.setattr(library, "_loaded", {})
    patch.setattr(cuda, "load_library", lambda: driver)
    patch.setattr(sys.modules[__name__], "CURRENT", driver)
    return driver
