"""What the first bytes of an engine say: its flavour, the version that made it, its size.

Layout: the tag, the size of the file at byte 16 (TensorRT for RTX) and major, minor, patch and
build at bytes 24 to 27, as ``trtexec --getPlanVersionOnly`` reads them (TensorRT 8.6 and later).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import EngineError

_TAGS = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt"}
_HEADER = 32


@dataclass(frozen=True)
class Plan:
    """What a plan says of itself.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        version: major.minor.patch.build of the library that made it.
        size: Bytes of the file.
    """

    flavour: str
    version: str
    size: int


def read_plan(path: Path) -> Plan:
    """Read the header of an engine.

    Raises:
        EngineError: It is no engine, is cut off, or cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER)
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
    if flavour == "tensorrt-rtx":
        stated = struct.unpack_from("<Q", head, 16)[0]
        if stated != size:
            msg = (
                f"{path}: the engine is damaged: it says that it has {stated} bytes, the file has "
                f"{size}; build or copy it again"
            )
            raise EngineError(msg)
    return Plan(flavour, ".".join(str(part) for part in head[24:28]), size)
