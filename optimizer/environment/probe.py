"""Where facts come from: files below a root, folders of Python packages, other programs.

Everything that looks at a machine goes through one ``Probe``, so that any machine can be played by
a folder of files. Nothing foreign is loaded into this process: what must be imported is imported by
another one, which may crash or hang without harm.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optimizer.environment.facts import ImportResult

#: Seconds that another program may take. nvidia-smi needs some on a machine with many GPUs, and
#: hangs where the driver does.
TIME_LIMIT = 15.0


@dataclass(frozen=True)
class Outcome:
    """How another program ended.

    Attributes:
        code: Its exit status, negative for a signal; None where it could not be run to its end.
        out, err: What it wrote.
        problem: Why ``code`` is None: "not found" or "no answer within 15 s".
    """

    code: int | None
    out: str = ""
    err: str = ""
    problem: str = ""


def _working() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it has been removed
        return Path("/")


def _search_path() -> tuple[Path, ...]:
    return tuple(Path(item) if item else _working() for item in sys.path)


@dataclass(frozen=True)
class Probe:
    """One machine to look at; by default this one.

    Attributes:
        root: Where its file system begins.
        search_path: Folders in which Python looks for modules, in order.
        own: Folder that holds this program's packages.
        working: Folder the user is in.
        environment: Environment variables.
        python: The interpreter.
        system: ``sys.platform``.
        time_limit: Seconds for each other program.
    """

    root: Path = Path("/")
    search_path: tuple[Path, ...] = field(default_factory=_search_path)
    own: Path = Path(__file__).resolve().parents[2]
    working: Path = field(default_factory=_working)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: str = sys.executable
    system: str = sys.platform
    time_limit: float = TIME_LIMIT

    def below(self, path: str | Path) -> Path:
        """An absolute path of the machine, as a file here."""
        return self.root / str(path).lstrip("/")

    def read(self, path: str | Path) -> str | None:
        """A text file of the machine, or None where it cannot be read."""
        try:
            return self.below(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def run(self, words: Sequence[str]) -> Outcome:
        """Run a program of the machine's ``PATH``."""
        program = shutil.which(words[0], path=self.environment.get("PATH", os.defpath))
        if program is None:
            return Outcome(None, problem="not found")
        return self._run([program, *words[1:]], self.environment)

    def import_module(self, code: str) -> ImportResult:
        """Run Python code that imports something and prints one line of JSON about it."""
        paths = os.pathsep.join(str(path) for path in self.search_path)
        environment = {**self.environment, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        # -P: not from the folder the user happens to be in, -W: no warnings among the facts.
        done = self._run([self.python, "-P", "-W", "ignore", "-c", code], environment)
        if done.code == 0:
            try:
                return ImportResult(dict(json.loads(done.out.strip().splitlines()[-1])))
            except (ValueError, IndexError, TypeError):
                return ImportResult(None, "it printed nothing that can be read")
        lines = done.err.strip().splitlines()
        return ImportResult(None, _ending(done) or (lines[-1][:300] if lines else "it failed"))

    def _run(self, words: Sequence[str], environment: Mapping[str, str]) -> Outcome:
        try:
            process = subprocess.Popen(  # noqa: S603 - a program of the user's own PATH
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=dict(environment),
            )
        except OSError as error:
            return Outcome(None, problem=f"cannot be run: {error.strerror}")
        try:
            out, err = process.communicate(timeout=self.time_limit)
        except subprocess.TimeoutExpired:
            # Not waited for: a process that hangs in the driver does not die when it is killed.
            process.kill()
            return Outcome(None, problem=f"no answer within {self.time_limit:g} s")
        return Outcome(process.returncode, out, err)


def _ending(done: Outcome) -> str:
    """How a process ended that did not end by itself; empty if it did."""
    if done.code is None:
        return done.problem
    if done.code >= 0:
        return ""
    try:
        name = signal.Signals(-done.code).name
    except ValueError:
        name = f"signal {-done.code}"
    return f"the process was ended by {name}"


def system_name() -> str:
    """Such as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"
