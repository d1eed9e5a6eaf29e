"""The two engines: damaged and hostile files for the loader, random graphs for the rules."""

from __future__ import annotations

import contextlib
import io
import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzzing.files import Hostile
from fuzzing.generate import make_case
from fuzzing.hostile import hostile
from fuzzing.mutations import damaged
from fuzzing.oracle import Judge, feeds_of
from fuzzing.sandbox import Sandbox
from fuzzing.verdicts import FindingError, Verdict

from optimizer import cli
from optimizer.runners.ort import OrtRunner

#: One in so many inputs of the loader also goes through the whole command.
_COMMAND_EVERY = 6
#: More resident memory than this for one of these tiny models is a finding.
MEMORY = 1 << 30
_ELEMENTS = 100_000


def graph(number: int, sandbox: Sandbox, begin: Callable[[str], None]) -> Verdict:
    """A random valid graph, rewritten and compared."""
    case = make_case(random.Random(number))
    path = sandbox.place(case.model.SerializeToString(), {})
    return judged(sandbox, path, begin, feeds_of(case.feeds), shapes=True)


def loader(number: int, sandbox: Sandbox, begin: Callable[[str], None]) -> Verdict:
    """A damaged or hostile file: refused in one sentence, or rewritten and compared."""
    made = make_input(number)
    path = sandbox.place(made.model, made.files)
    r = random.Random(number)
    verdict = judged(sandbox, path, begin, lambda runner: made_up(runner, r))
    if verdict.fine and number % _COMMAND_EVERY == 0:
        begin("ours: command")
        with sandbox.watch() as seen:
            problem = _command(path, sandbox.out / "command.onnx", verdict)
        if problem is None and (seen or sandbox.leftovers()):
            problem = Verdict("trespass", str([*seen, *sandbox.leftovers()]))
        verdict = problem or verdict
    return verdict


ENGINES = {"loader": loader, "graph": graph}


def make_input(number: int) -> Hostile:
    """The input of this number."""
    r = random.Random(number)
    if r.randrange(100) < 35:
        return hostile(r)
    seed = damaged(r)
    return Hostile(seed.name, seed.model, seed.files)


def judged(
    sandbox: Sandbox,
    path: Path,
    begin: Callable[[str], None],
    feeds: Callable[[OrtRunner], list[dict[str, np.ndarray]]],
    *,
    shapes: bool = False,
) -> Verdict:
    """The verdict on one model, and whether anything outside of its folder was touched."""
    before = {item.name: item.stat().st_mtime_ns for item in path.parent.iterdir() if item.exists()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    phases: list[str] = []

    def note(phase: str) -> None:
        phases.append(phase)
        begin(phase)
        if phase == "theirs":
            sandbox.pause()
        else:
            sandbox.resume()

    with sandbox.watch() as seen:
        judge = Judge(path, sandbox.out / "model.opt.onnx", note, shapes=shapes)
        try:
            verdict = judge.run(feeds)
        except MemoryError as error:
            ours = phases[-1].startswith("ours")
            verdict = Verdict("memory" if ours else "no feed", f"{phases[-1]}: {error}")
    after = {item.name: item.stat().st_mtime_ns for item in path.parent.iterdir() if item.exists()}
    if not verdict.fine:
        return verdict
    if seen or before != after or sandbox.leftovers():
        return Verdict("trespass", str([*seen, *sandbox.leftovers()]))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if grown > MEMORY and "theirs" not in phases:
        return Verdict("memory", f"{grown >> 20} MiB more than before")
    return verdict


def made_up(runner: OrtRunner, r: random.Random) -> list[dict[str, np.ndarray]]:
    """Feeds for whatever a session asks for; none where that would be large."""
    rng = np.random.default_rng(r.randrange(2**32))
    feeds = []
    for number in range(2):
        named: dict[str, int] = {}
        feed = {}
        for spec in runner.inputs:
            shape = [
                d if isinstance(d, int) else named.setdefault(d or "", r.randrange(1, 4))
                for d in spec.shape
            ]
            if any(d < 0 for d in shape) or np.prod(shape, dtype=float) > _ELEMENTS:
                return feeds
            feed[spec.name] = _array(rng, tuple(shape), spec.dtype, small=number == 0)
            if "mask" in spec.name:  # a query without any key gives what nobody defines
                feed[spec.name] = np.ones_like(feed[spec.name])
        feeds.append(feed)
    return feeds


def _array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, *, small: bool
) -> np.ndarray:
    if dtype.kind in "iu":
        return (rng.integers(0, 3, shape) if small else np.zeros(shape)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype.kind == "f":
        return np.asarray(rng.uniform(-2, 2, shape)).astype(dtype)
    return np.full(shape, "text", dtype=object)


def _command(path: Path, output: Path, verdict: Verdict) -> Verdict | None:
    """What is wrong with how ``optimize`` and ``optimize inspect`` take the file, or None."""
    try:
        code, text = _run([str(path), "-o", str(output)])
        _check_run(code, text, output, refused=verdict.kind == "refused")
        code, text = _run(["inspect", str(path)])
        _check_code(code, "inspect", text)
    except FindingError as found:
        return Verdict(found.kind, found.detail)
    return None


def _run(words: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run_command(words)
    for text in (out.getvalue(), err.getvalue()):
        if not all(c.isprintable() or c == "\n" for c in text):
            raise FindingError("message", f"{words[0]}: control characters: {text[:300]!r}")
    return code, err.getvalue()


def _check_code(code: int, what: str, text: str) -> None:
    if code == 1 and "out of memory" in text:  # the model itself needs more than a worker has
        return
    if code not in (0, 2, 6):
        raise FindingError("command", f"{what}: exit {code}: {text[:300]}")
    if code and len(text.strip().splitlines()) > 4:
        raise FindingError("message", f"{what}: too long: {text[:500]!r}")


def _check_run(code: int, text: str, output: Path, *, refused: bool) -> None:
    _check_code(code, "optimize", text)
    if (code == 0) != output.exists():
        raise FindingError("command", f"exit {code}, output exists: {output.exists()}")
    if refused and code == 0:
        raise FindingError("command", f"exit 0 although refused: {text[:300]}")
