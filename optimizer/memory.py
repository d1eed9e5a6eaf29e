"""Peak memory of a stretch of work."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """Context manager: the largest resident memory of the process inside it.

    Linux lets a process reset its own high-water mark; elsewhere the peak since the start of the
    process is reported, which is an upper bound. Memory-mapped weights count while they are
    resident, although the system can drop those pages at any time.

    Attributes:
        bytes: Set at the end.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # "5" resets VmHWM: proc(5), /proc/pid/clear_refs
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bytes = high_water()


def resident() -> int:
    """Resident memory now, in bytes; where the system does not say, the largest so far."""
    return _status("VmRSS:")


def high_water() -> int:
    """Largest resident memory since the last reset, in bytes."""
    return _status("VmHWM:")


def _status(key: str) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text("ascii", "replace").splitlines()
        line = next(text for text in lines if text.startswith(key))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
