"""Starts the process that builds, follows it, and turns every way it can end into one message."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from optimizer import errors
from optimizer.engines.flavours import Flavour
from optimizer.engines.request import BuildRequest
from optimizer.errors import EngineError, ExportError
from optimizer.listener import Listener, Silent

#: Lines of the library's log that are kept for a message.
_TAIL = 400
_ADVICE = "the whole log: --log FILE"


def installed_version(flavour: Flavour) -> str:
    """The version of a flavour that Python would import here.

    Raises:
        MissingDependencyError: There is none, or it cannot be loaded.
        EngineError: Loading it ended the process.
    """
    with _started(["--version", flavour.name]) as (process, log):
        return str(_follow(process, log, _Story(Silent()))["version"])


def run_build(
    request: BuildRequest, listener: Listener, log_file: IO[str] | None = None
) -> dict[str, Any]:
    """Build in a process of its own; an interrupt ends it at once.

    Args:
        request: What to build; its ``output`` is complete when this returns.
        listener: Is told the phases.
        log_file: Takes everything that the library logs.

    Returns:
        See ``engines.build.build``.

    Raises:
        EngineError: No engine, whatever the reason; names the node where there is one.
        OptionError: Options that the library does not take.
        MissingDependencyError: The flavour is not installed.
        ExportError: The disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="optimize-build-") as folder:
        path = Path(folder) / "request.json"
        request.write(path)
        with _started([str(path)]) as (process, log):
            return _follow(process, log, _Story(listener, log_file))


@contextlib.contextmanager
def _started(words: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and a module of this package
            [sys.executable, "-m", "optimizer.engines.worker", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


class _Story:
    """What the process has told so far."""

    def __init__(self, listener: Listener, log_file: IO[str] | None = None) -> None:
        self.node: str | None = None
        self.phase: str | None = None
        self.log: collections.deque[str] = collections.deque(maxlen=_TAIL)
        self.errors: list[str] = []
        self.end: dict[str, Any] | None = None
        self._listener = listener
        self._file = log_file

    def take(self, event: dict[str, Any]) -> None:
        """One event."""
        if "node" in event:
            self.node = event["node"]
        elif "layers" in event:
            self.node = None
            self._listener.stage(f"building {event['layers']} layers")
        elif "phase" in event:
            self._show(event)
        elif "log" in event:
            line = f"{event['log']}: {event['text']}"
            self.log.append(line)
            if "ERROR" in event["log"]:
                self.errors.append(event["text"])
            if self._file is not None:
                self._file.write(line + "\n")
        else:
            self.end = event

    def _show(self, event: dict[str, Any]) -> None:
        if event["phase"] != self.phase:
            self.phase = event["phase"]
            self._listener.stage(f"building: {self.phase}")
        if event["total"]:
            self._listener.progress(event["done"], event["total"])

    def where(self) -> str:
        """The node that was parsed, or the phase of the build."""
        if self.node is not None:
            return f"while it parsed node {self.node}"
        return "while it was loaded" if self.phase is None else f"in phase '{self.phase}'"


def _follow(process: subprocess.Popen[bytes], log: IO[bytes], story: _Story) -> dict[str, Any]:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    for line in process.stdout:
        try:
            story.take(json.loads(line))
        except json.JSONDecodeError:  # the process ended in the middle of a line
            break
    status = process.wait()
    end = story.end
    if end is None:
        raise _ended(status, story, log)
    if "result" in end:
        result: dict[str, Any] = end["result"]
        return result
    if "refused" in end:
        raise getattr(errors, end["refused"])(end["text"])
    if "system" in end:
        msg = f"{end['file']}: could not be written during the build: {end['system']}; make room"
        raise ExportError(f"{msg}, or set TMPDIR to a folder that has some; nothing was kept")
    raise _no_memory(story)


def _ended(status: int, story: _Story, log: IO[bytes]) -> EngineError:
    """The process ended without a last word."""
    log.seek(0)
    printed = log.read().decode(errors="replace").strip().splitlines()
    reason = (story.errors or printed or ["it printed nothing"])[-1][:200]
    text = " ".join((*story.errors, *printed))
    if status == -signal.SIGKILL or "bad_alloc" in text or "MemoryError" in text:
        return _no_memory(story)
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return EngineError(f"TensorRT ended its process ({name}) {story.where()}: {reason}; {_ADVICE}")


def _no_memory(story: _Story) -> EngineError:
    return EngineError(
        f"not enough memory for the build, {story.where()}; give it more (--max-memory), close "
        "other programs, or build smaller profiles (--shapes)"
    )
