"""Throws damaged, hostile and random models at the program, and counts what must not happen.

    python benchmarks/fuzz.py [loader|graph ...] [--inputs N] [--seed N] [--minutes M]
                              [--out FILE.json] [--keep FOLDER] [--reproduce ENGINE:NUMBER]

``loader``: files damaged in their protobuf fields or bytes, and files made to hurt. Each is refused
in one sentence, or loaded, rewritten, lowered and written, and computes what the original does.
``graph``: random valid graphs of what the rules read, run on two or three feeds of different sizes;
original and results agree within the bound of ``verify``, and a second run changes nothing.

Every input follows from its number. Inputs run in worker processes with limits of time and memory,
so that whatever native code does is counted and its input kept. A file ``--out`` that exists is
gone on with where it stopped. Needs the extra ``cpu`` and Linux.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

#: Address space of a worker. The largest input is a file of 1 GiB that is mapped, not read.
MEMORY = 6 << 30
#: Seconds for each step of one input; for what the original itself does in ONNX Runtime; to start.
LIMIT, LIMIT_THEIRS, LIMIT_START = 60.0, 20.0, 120.0
#: Inputs per worker process.
BATCH = 1500
_ENGINES = ("graph", "loader")


@dataclass
class Tally:
    """What one engine has found so far.

    Attributes:
        next: Number of the next input.
        outcomes: How often each verdict.
        reasons: The same for refusals, by the beginning of their message.
        findings: Number, kind and detail of everything that must not happen.
        rewrites: Sites that ``canonicalize`` rewrote.
        feeds: Feeds on which numbers were compared.
        seconds: Spent.
    """

    next: int
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    rewrites: int = 0
    feeds: int = 0
    seconds: float = 0.0

    def add(self, number: int, verdict: dict[str, Any]) -> None:
        """Count one verdict."""
        from fuzzing.verdicts import FINE

        kind, detail = verdict["kind"], verdict["detail"]
        self.outcomes[kind] += 1
        self.rewrites += verdict.get("applied", 0)
        self.feeds += verdict.get("feeds", 0)
        self.next = number + 1
        if kind not in (*FINE, "strict", "theirs"):
            self.findings.append({"number": number, "kind": kind, "detail": detail[:500]})
        elif kind == "strict":
            self.reasons[_generic(detail)] += 1


def _generic(message: str) -> str:
    """A message without names, folders and numbers, to be counted."""
    import re

    text = re.sub(r"\S*/root/models/in", "FOLDER", re.sub(r"'[^']*'", "'_'", message))
    return re.sub(r"\d+", "N", text)[:120]


def work(engine: str, first: int, count: int, root: Path, report: int) -> None:
    """The worker: judges inputs one after the other and writes a line before and after each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from fuzzing.drill import drill
    from fuzzing.engines import ENGINES
    from fuzzing.sandbox import Sandbox

    sandbox = Sandbox(root)
    with os.fdopen(report, "w") as file:

        def say(content: dict[str, Any]) -> None:
            file.write(json.dumps(content) + "\n")
            file.flush()

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number in range(first, first + count):
            say({"number": number, "phase": "ours: make"})
            verdict = {**ENGINES, "drill": drill}[engine](
                number, sandbox, lambda phase, n=number: say({"number": n, "phase": phase})
            )
            say({"number": number, **verdict.__dict__})


def run(engine: str, tally: Tally, last: int, until: float, keep: Path | None) -> None:
    """Let workers judge inputs up to ``last``, or until the time is over."""
    while tally.next < last and time.time() < until:
        count = min(BATCH, last - tally.next)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            _batch(engine, tally, count, Path(folder), until, keep)


def _batch(
    engine: str, tally: Tally, count: int, folder: Path, until: float, keep: Path | None
) -> None:
    reader, writer = os.pipe()
    words = [sys.executable, __file__, "--worker", engine, str(tally.next), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [*words, str(folder / "root"), str(writer)],
            pass_fds=(writer,),
            stdout=errors,
            stderr=errors,
            env=environment,
        )
    os.close(writer)
    state: dict[str, Any] = {"number": tally.next, "phase": "ours: start"}
    buffer = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            limit = {"theirs": LIMIT_THEIRS, "ours: start": LIMIT_START}.get(state["phase"], LIMIT)
            ready, _, _ = select.select([pipe], [], [], limit)
            data = pipe.read(1 << 16) if ready else b""
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                content = json.loads(line)
                if "kind" in content:
                    tally.add(content["number"], content)
                    state = {"number": content["number"] + 1, "phase": "ours: next"}
                else:
                    state = content
            if time.time() > until:
                process.kill()
                process.wait()
                return
    hung = not ready
    if hung:
        process.kill()
    code = process.wait()
    if code == 0 and not hung:
        return
    _blame(engine, tally, state, folder, keep, "hang" if hung else _ending(code))


def _blame(
    engine: str, tally: Tally, state: dict[str, Any], folder: Path, keep: Path | None, how: str
) -> None:
    """A worker that did not come back: whose fault, and keep its input."""
    ours = state["phase"] != "theirs"
    text = (folder / "stderr").read_text("utf-8", "replace").strip().splitlines()
    detail = f"{state['phase']}: {how}: {text[-1][:200] if text else ''}"
    kind = ("hang" if how == "hang" else "died") if ours else "theirs"
    tally.add(state["number"], {"kind": kind, "detail": detail})
    source = folder / "root" / "models" / "in"
    if keep is not None and ours and source.is_dir():
        target = keep / f"{engine}-{state['number']}"
        target.mkdir(parents=True, exist_ok=True)
        for item in source.iterdir():
            if item.is_file() and not item.is_symlink() and item.stat().st_size < 1 << 24:
                (target / item.name).write_bytes(item.read_bytes())


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def result(tallies: dict[str, Tally], seed: int) -> dict[str, Any]:
    """What is published."""
    from optimizer.machine import describe_machine

    findings = [f for tally in tallies.values() for f in tally.findings]
    kinds = collections.Counter(f["kind"] for f in findings)
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seed": seed,
        "inputs": sum(tally.next - seed for tally in tallies.values()),
        "crashes": kinds["crash"] + kinds["died"] + kinds["memory"],
        "hangs": kinds["hang"],
        "mismatches": kinds["mismatch"] + kinds["loaded otherwise"],
        "other findings": {k: n for k, n in kinds.items() if k not in _COUNTED},
        "engines": {name: {**tally.__dict__} for name, tally in tallies.items()},
        "machine": describe_machine(),
    }


_COUNTED = ("crash", "died", "memory", "hang", "mismatch", "loaded otherwise")


def _restore(path: Path | None, engines: list[str], seed: int) -> dict[str, Tally]:
    tallies = {name: Tally(seed) for name in engines}
    if path is None or not path.exists():
        return tallies
    held = json.loads(path.read_text("utf-8"))["engines"]
    for name, content in held.items():
        counters = {key: collections.Counter(content[key]) for key in ("outcomes", "reasons")}
        tallies[name] = Tally(**{**content, **counters})
    return tallies


def main() -> None:
    """Run the campaign and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", help=f"{' or '.join(_ENGINES)}; default: both")
    parser.add_argument("--inputs", type=int, default=10_000, help="per engine")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="where inputs of crashes and hangs go")
    parser.add_argument("--reproduce", metavar="ENGINE:NUMBER")
    options = parser.parse_args()
    if options.reproduce:
        engine, _, number = options.reproduce.partition(":")
        tally = Tally(int(number))
        run(engine, tally, int(number) + 1, time.time() + 600, options.keep)
        print(json.dumps(tally.__dict__, indent=1))
        return
    engines = options.engines or list(_ENGINES)
    tallies = _restore(options.out, engines, options.seed)
    until = time.time() + 60 * options.minutes
    last = options.seed + options.inputs
    for engine in engines:
        tally = tallies[engine]
        while tally.next < last and time.time() < until:
            started = time.time()
            run(engine, tally, min(tally.next + BATCH, last), until, options.keep)
            tally.seconds = round(tally.seconds + time.time() - started, 1)
            print(
                f"{engine}: {tally.next - options.seed} inputs, {dict(tally.outcomes)}", flush=True
            )
            if options.out:
                text = json.dumps(result(tallies, options.seed), indent=1) + "\n"
                options.out.write_text(text, "utf-8")
    if any(tally.findings for tally in tallies.values()):
        for name, tally in tallies.items():
            for finding in tally.findings:
                print(f"{name}:{finding['number']} {finding['kind']}: {finding['detail'][:200]}")
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
