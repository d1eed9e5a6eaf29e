"""What the first bytes of an engine say: its flavour, the version that made it, its size, its GPUs.

Layout: the tag, the size of the file at byte 16 (TensorRT for RTX) and major, minor, patch and
build at bytes 24 to 27, as ``trtexec --getPlanVersionOnly`` reads them (TensorRT 8.6 and later).
TensorRT for RTX 1.7 has one bit per compute capability at byte 32, found by building for each of
them; its library refuses a GPU whose bit is not set.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import EngineError

_TAGS = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt"}
_SUFFIXES = (".engine", ".plan")
_HEADER = 32
#: Compute capability of each bit; the last stands for GPUs later than those named.
_BITS = (75, 80, 86, 89, 120, 121)
_LATER = 1 << len(_BITS)
#: Layout of the header that these bits were found in.
_LAYOUT = 2


def is_engine(path: object) -> bool:
    """Whether a path is that of an engine and not of an ONNX model, by its name or first bytes."""
    if not isinstance(path, str | Path):
        return False
    if Path(path).suffix in _SUFFIXES:
        return True
    try:
        with Path(path).open("rb") as file:
            return file.read(4) in _TAGS
    except OSError:
        return False


@dataclass(frozen=True)
class Plan:
    """What a plan says of itself.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        version: major.minor.patch.build of the library that made it.
        size: Bytes of the file.
        capabilities: Compute capabilities it has kernels for; None = it does not tell.
        later: Whether it also runs on GPUs that are newer than all of them.
    """

    flavour: str
    version: str
    size: int
    capabilities: tuple[int, ...] | None = None
    later: bool = False


def read_plan(path: Path) -> Plan:
    """Read the header of an engine.

    Raises:
        EngineError: It is no engine, is cut off, or cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER + 8)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}; expected an engine"
        raise EngineError(msg) from error
    flavour = _TAGS.get(head[:4])
    if flavour is None or len(head) < _HEADER:
        msg = (
            f"{path}: is no TensorRT engine (it starts with {head[:4]!r}); build one with 'optimize"
            " build MODEL'"
        )
        raise EngineError(msg)
    capabilities, later = None, False
    if flavour == "tensorrt-rtx":
        stated = struct.unpack_from("<Q", head, 16)[0]
        if stated != size:
            msg = (
                f"{path}: the engine is damaged: it says that it has {stated} bytes, the file has "
                f"{size}; build or copy it again"
            )
            raise EngineError(msg)
        capabilities, later = _gpus(head)
    version = ".".join(str(part) for part in head[24:28])
    return Plan(flavour, version, size, capabilities, later)


def _gpus(head: bytes) -> tuple[tuple[int, ...] | None, bool]:
    """Compute capabilities of a plan of TensorRT for RTX; None where the layout is another one."""
    if len(head) < _HEADER + 8 or struct.unpack_from("<I", head, 8)[0] != _LAYOUT:
        return None, False
    bits = struct.unpack_from("<Q", head, _HEADER)[0]
    if head[28:32] != head[:4] or not bits or bits >= 2 * _LATER:
        return None, False
    return tuple(n for i, n in enumerate(_BITS) if bits >> i & 1), bool(bits & _LATER)
