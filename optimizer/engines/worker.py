"""The process that builds: ``python -m optimizer.engines.worker REQUEST`` or ``--version FLAVOUR``.

Events go to what was standard output, one JSON object a line, unbuffered; whatever libraries
print goes to standard error. The process ends with the one that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from optimizer.engines.build import build
from optimizer.engines.flavours import FLAVOURS
from optimizer.engines.library import import_tensorrt
from optimizer.engines.request import BuildRequest
from optimizer.errors import OptimizerError

_PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    """Build, or say the version; failures are events too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    events = os.dup(1)
    os.dup2(2, 1)

    def tell(event: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(events, f"{json.dumps(event)}\n".encode())

    try:
        if words[0] == "--version":
            tell({"result": {"version": str(import_tensorrt(FLAVOURS[words[1]]).__version__)}})
            return 0
        request = BuildRequest.read(Path(words[0]))
        if request.max_memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (request.max_memory, request.max_memory))
        tell({"result": build(request, tell)})
    except OptimizerError as error:
        tell({"refused": type(error).__name__, "text": str(error)})
    except MemoryError:
        tell({"memory": True})
    except OSError as error:
        tell({"system": error.strerror or str(error), "file": str(error.filename)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
