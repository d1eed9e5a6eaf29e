"""Run on a machine with AMX as if it had none: a class of machines more to measure.

    python benchmarks/without_amx.py benchmarks/sparse.py [arguments]

Linux gives the tile registers of AMX only to processes that ask for them. This denies the question
with a filter of system calls, so that ONNX Runtime takes its kernels for AVX-512 VNNI, tells our
library to do the same, and runs the script. What it cannot imitate: clock rates and caches stay
those of the machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import struct
import sys
from pathlib import Path

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001

#: Environment variable that says so to whoever labels results.
MARK = "OPTIMIZE_WITHOUT_AMX"


def deny_amx() -> None:
    """Deny AMX to this process, before ONNX Runtime is imported.

    Raises:
        RuntimeError: The processor or system is another one, or the filter has no effect.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        msg = f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
        raise RuntimeError(msg)
    if "onnxruntime" in sys.modules:
        msg = "onnxruntime was imported before: it has asked for AMX already"
        raise RuntimeError(msg)
    statement = struct.Struct("HBBI")
    program = b"".join(
        statement.pack(*line)
        for line in (
            (0x20, 0, 0, 0),  # the number of the call
            (0x15, 0, 3, _ARCH_PRCTL),  # another one: allow
            (0x20, 0, 0, 16),  # its first argument
            (0x15, 0, 1, _REQUEST),
            (0x06, 0, 0, _EPERM),
            (0x06, 0, 0, _ALLOW),
        )
    )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("statements", ctypes.c_void_p))

    buffer = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    filter_ = Program(len(program) // statement.size, ctypes.addressof(buffer))
    if (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        or libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(filter_))
        or libc.syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0
    ):
        msg = f"AMX could not be denied: {os.strerror(ctypes.get_errno())}"
        raise RuntimeError(msg)
    os.environ["OPTIMIZE_ISA"] = "avx512"
    os.environ[MARK] = "1"


def main() -> None:
    """The command."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    try:
        deny_amx()
    except RuntimeError as error:
        raise SystemExit(f"without_amx: {error}") from error
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
