"""Judges models by a command of the user's, as ``git bisect run`` judges revisions."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import onnx_ir as ir

from optimizer.errors import OptionError
from optimizer.judges import Candidate, Outcome, Verdict
from optimizer.model_writer import save_model

#: Exit status of a command that cannot say whether a model is good; that of ``git bisect run``.
CANNOT_JUDGE = 125
#: Is replaced by the path of the model; without it the path comes last.
PLACEHOLDER = "{model}"

#: Lines of output that are kept for the report, bytes that are looked at for them, and letters
#: that are kept of each.
_TAIL_LINES, _TAIL_BYTES, _LINE = 8, 4096, 200
#: Seconds that a command has to end by itself.
_GRACE = 2.0


@dataclass
class CommandJudge:
    """Runs a command on each candidate: exit status 0 = good, 125 = cannot be judged, other = bad.

    The command is started without a shell, with nothing on its standard input and in a process
    group of its own, which is ended with it.

    Attributes:
        command: Words as for a shell.
        model: The original.
        path: Where it lies, if it does; else it is written for the command too.
        timeout: Seconds; a command that takes longer cannot judge. None = no limit.
        echo: Is given each line that the command prints, once it has ended.
    """

    command: str
    model: ir.Model
    path: Path | None = None
    timeout: float | None = None
    echo: Callable[[str], None] | None = None
    title: str = field(init=False)
    stepwise: bool = field(default=False, init=False)
    lowered: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.title = f"exit status of: {self.command}"
        self._words = parse_command(self.command)

    def original(self) -> Verdict:
        """Run the command on the original model."""
        if self.path is not None:
            return self._judge(self.path.resolve())
        return self._judge_written(self.model)

    def judge(self, candidate: Candidate) -> Verdict:
        """Write the model, run the command, delete the model."""
        return self._judge_written(candidate.model)

    def _judge_written(self, model: ir.Model) -> Verdict:
        with tempfile.TemporaryDirectory(prefix="optimize-bisect-") as folder:
            path = Path(folder) / "candidate.onnx"
            save_model(model, path)
            return self._judge(path)

    def _judge(self, path: Path) -> Verdict:
        words = [word.replace(PLACEHOLDER, str(path)) for word in self._words]
        with tempfile.TemporaryFile() as output:
            status = self._run(words, output)
            lines = _last_lines(output)
            if self.echo is not None:
                output.seek(0)
                for raw in output:
                    self.echo(raw.decode(errors="replace").rstrip())
        return Verdict(*_meaning(status, self.timeout), lines)

    def _run(self, words: list[str], output: IO[bytes]) -> int | None:
        """The exit status, negative for a signal; None where the time was over."""
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command, and no shell
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise _not_started(words[0], error.strerror or str(error)) from error
        with _ended(process):
            try:
                return process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return None


def parse_command(text: str) -> list[str]:
    """The words of a command, the placeholder among them.

    Raises:
        OptionError: There are none, a quotation is open, or there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        msg = f"--check: '{text}' cannot be read: {error}"
        raise OptionError(msg) from error
    if not words:
        msg = "--check: the command is empty; expected a command such as 'python check.py {model}'"
        raise OptionError(msg)
    if PLACEHOLDER not in words[0] and shutil.which(words[0]) is None:
        raise _not_started(words[0], "there is no such program")
    if not any(PLACEHOLDER in word for word in words):
        words.append(PLACEHOLDER)
    return words


def _not_started(program: str, reason: str) -> OptionError:
    return OptionError(
        f"--check: '{program}' cannot be started: {reason}; expected a program and its arguments, "
        "such as 'python check.py {model}' (no shell runs it)"
    )


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Do not leave the process behind, whatever happens inside."""
    try:
        yield
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
            finally:  # also where the user has no patience
                if process.poll() is None:
                    _signal(process, signal.SIGKILL)
                    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the process and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _meaning(status: int | None, timeout: float | None) -> tuple[Outcome, str]:
    if status is None:
        return Outcome.UNKNOWN, f"the command took longer than {timeout:g} s"
    if status == CANNOT_JUDGE:
        return Outcome.UNKNOWN, f"exit status {CANNOT_JUDGE}"
    if status < 0:
        with contextlib.suppress(ValueError):
            return Outcome.BAD, f"the command was ended by {signal.Signals(-status).name}"
    return Outcome.GOOD if status == 0 else Outcome.BAD, f"exit status {status}"


def _last_lines(output: IO[bytes]) -> tuple[str, ...]:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - _TAIL_BYTES))
    text = output.read().decode(errors="replace")
    return tuple(line.rstrip()[:_LINE] for line in text.splitlines() if line.strip())[-_TAIL_LINES:]
