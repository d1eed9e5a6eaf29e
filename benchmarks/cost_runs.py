"""Runs commands for ``cost.py``: time, peak memory, and what became of the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: A small process in between: what a process is forked from counts towards its peak. It also ends
#: what grows beyond a limit, before the machine runs out of memory.
_TIMER = """
import os, subprocess, sys, threading, time
limit, errors, command = int(sys.argv[1]), open(sys.argv[2], "wb"), sys.argv[3:]
start = time.perf_counter()
process = subprocess.Popen(command, stdout=errors, stderr=errors)
killed = []
def watch():
    while not killed:
        try:
            pages = int(open(f"/proc/{process.pid}/statm").read().split()[1])
        except (OSError, IndexError):
            return
        if pages * os.sysconf("SC_PAGE_SIZE") > limit:
            killed.append(process.kill())
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
cpu = usage.ru_utime + usage.ru_stime
print(seconds, cpu, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), len(killed))
"""
_CHECK = Path(__file__).with_name("cost_check.py")
#: What libraries say of a message that is larger than protobuf allows, in their words.
_TOO_LARGE = (
    "serialize",
    "encodeerror",
    "2gb",
    "2gib",
    "2 gb",
    "2 gib",
    "exceeds maximum protobuf",
)
#: Largest difference of an output from the original's, relative to its largest number.
_TOLERANCE = 1e-4


@dataclass
class Run:
    """One run of a command.

    Attributes:
        seconds: From start to exit.
        cpu: Seconds of processor time.
        peak: Largest resident memory in bytes, mapped files included.
        problem: Why it failed, in one line; empty for success.
    """

    seconds: float
    cpu: float
    peak: int
    problem: str = ""


@dataclass
class Tool:
    """A column of runs.

    Attributes:
        name: In the table.
        command: Of one run, which writes ``target``.
        target: The model that it writes, in a folder of its own.
        alone: Runs without this checkout on its path.
        result: What is known of the model that it wrote.
        runs: Those made so far.
    """

    name: str
    command: list[str]
    target: Path
    alone: bool = True
    result: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)


def measure(command: list[str], folder: Path, limit: int, *, alone: bool) -> Run:
    """Run one command in ``folder``, at most to ``limit`` bytes of resident memory."""
    environment = dict(os.environ)
    if alone:  # ONNX Runtime's tools have a module of the same name as ours
        environment.pop("PYTHONPATH", None)
    os.sync()  # what an earlier run left to be written is not this one's
    with tempfile.NamedTemporaryFile() as said:
        timer = [sys.executable, "-c", _TIMER, str(limit), said.name, *command]
        found = subprocess.check_output(timer, text=True, cwd=folder, env=environment).split()
        seconds, cpu = map(float, found[:2])
        peak, code, killed = map(int, found[2:])
        if killed:
            return Run(seconds, cpu, peak, f"failed: more than {limit / 1e9:.0f} GB of memory")
        return Run(seconds, cpu, peak, _problem(code, Path(said.name).read_text(errors="replace")))


def _problem(code: int, said: str) -> str:
    if not code:
        return ""
    if code < 0:
        return f"failed: signal {-code}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line.partition(":")[0]]
    text = (errors or lines or [f"exit code {code}"])[-1][:160]
    large = any(word in text.lower() for word in _TOO_LARGE)
    return f"{'too large' if large else 'failed'}: {text}"


def run_once(tool: Tool, limit: int, expected: dict[str, np.ndarray]) -> None:
    """Run a tool; look at what it wrote, the first time."""
    folder = tool.target.parent
    shutil.rmtree(folder, ignore_errors=True)  # to replace a file may take longer than to write one
    folder.mkdir(parents=True)
    tool.runs.append(measure(tool.command, folder, limit, alone=tool.alone))
    if len(tool.runs) == 1:
        tool.result = judge(tool, expected)
    shutil.rmtree(folder)


def judge(tool: Tool, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Nodes, attentions, size and validity of what a tool wrote."""
    problem = tool.runs[-1].problem
    if problem:
        return {"verdict": problem}
    if not tool.target.exists():
        return {"verdict": "failed: exit code 0, and no model"}
    parts = [item for item in tool.target.parent.iterdir() if item.suffix != ".json"]
    found, outputs, verdict = inspect(tool.target)
    found["bytes"] = sum(item.stat().st_size for item in parts)
    found["verdict"] = verdict or _compare(expected, outputs)
    return found


def inspect(model: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """Facts, outputs on a fixed feed, and why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.npz"
        done = subprocess.run(
            [sys.executable, str(_CHECK), str(model), str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        facts = json.loads(lines[0]) if lines else {}
        if done.returncode:
            said = _problem(done.returncode, done.stderr).partition(": ")[2]
            return facts, {}, f"invalid: {said}"
        with np.load(path) as arrays:
            return facts, dict(arrays), ""


def _compare(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> str:
    if expected.keys() != found.keys():
        return f"invalid: has the outputs {', '.join(found)}"
    for name, array in expected.items():
        if array.shape != found[name].shape:
            return f"invalid: {name} has shape {list(found[name].shape)}"
        error = float(np.abs(array - found[name]).max() / np.abs(array).max())
        if not error <= _TOLERANCE:
            return f"invalid: {name} is off by {error:.1e} of its largest number"
    return "valid"
