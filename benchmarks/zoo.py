"""Judges every family x exporter: are its blocks found, and does the result compute the same?

    python benchmarks/zoo.py [--families NAMES] [--ways NAMES] [--out FILE.json] [--table README.md]

A cell is one family of ``tests/families.py`` made into a file by one way of ``tests/exporters.py``
(an exporter and an opset, perhaps a tool after it), with and without KV cache. Each file is raised
by ``canonicalize``, lowered again for ONNX Runtime, and judged by ``tests/judge.py``:

    right          every layer is a block with the right parts, and the outputs are the original's
    refused        the outputs are the original's, and each layer that is no block has a reason
    wrong          anything else; a crash and a hang too
    not exported   the exporter or tool makes no valid file, so there is nothing to judge

``--table`` writes the support table of a results file into the README, and judges nothing. Cells
run in processes of their own kind, files are kept in ``.pytest_cache/zoo``. Needs the extra
``test``, and ``onnxruntime-genai`` for the way ``genai``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exporters import WAYS, Cell  # noqa: E402
from families import FAMILIES  # noqa: E402
from readme import replace_between  # noqa: E402

from optimizer.benchmark import write_result  # noqa: E402
from optimizer.machine import describe_machine  # noqa: E402

#: Seconds for one cell: to export, to raise, and to run in float64.
LIMIT = 600.0
OUTCOMES = ("right", "refused", "wrong", "not exported")
#: Columns of the table.
GROUPS: dict[str, tuple[str, ...]] = {
    "dynamo, opset 18 to 24": (*(f"dynamo-{n}" for n in range(18, 25)), "dynamo-raw"),
    "TorchScript, opset 13 to 20": (
        *(f"torchscript-{n}" for n in range(13, 21)), "torchscript-eager",
    ),
    "float16, bfloat16": tuple(way for way in WAYS if way.endswith(("fp16", "bf16"))),
    "onnxscript, onnxsim, onnxslim": (
        "onnxscript", "onnxsim", "onnxsim-dynamo", "onnxslim", "onnxslim-dynamo",
    ),
    "fused by ONNX Runtime": (
        "ort-extended", "ort-all", "ort-transformers", "ort-fusions", "genai",
    ),
    "int8 by ONNX Runtime": ("ort-dynamic-int8", "ort-static-int8", "qdq-symmetric"),
}  # fmt: skip
BEGIN, END = "<!-- support table: benchmarks/zoo.py --table README.md -->", "<!-- end of table -->"


def cells(families: Sequence[str], ways: Sequence[str]) -> list[Cell]:
    """The chosen cells, one way after the other."""
    return [
        Cell(FAMILIES[name], way, cached)
        for way in ways
        for name in families
        for cached in ((False, True) if FAMILIES[name].cached else (False,))
    ]


def serve() -> None:
    """Judge the cells named on standard input, one JSON line for each."""
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # exporters write to both, from native code too
    from judge import judge

    for line in sys.stdin:
        family, way, cached = json.loads(line)
        verdict = judge(Cell(FAMILIES[family], way, cached))
        answer = [verdict.outcome.value, without_folders(verdict.detail)]
        print(json.dumps(answer), file=answers, flush=True)


def without_folders(text: str) -> str:
    """``text`` with the names of files alone, wherever they lie on this machine."""
    return re.sub(r"(?<![\w.:])/(?:[^\s/'\"]+/)+", "", text)


class Worker:
    """A process that judges cells, started again when one takes it down."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def judge(self, cell: Cell) -> tuple[str, str]:
        """Outcome and detail of one cell."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve"], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            question = [cell.entry.name, cell.way, cell.kv_cache]
            print(json.dumps(question), file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], LIMIT)
        answer = process.stdout.readline() if ready else ""
        if answer:
            outcome, detail = json.loads(answer)
            return outcome, detail
        self.stop()
        return "wrong", "the process crashed" if ready else f"no answer in {LIMIT:.0f} s"

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def judge_all(chosen: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, str, str]]:
    """Judge in parallel; answers come in the order in which they are ready."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[Cell, str, str]] = queue.SimpleQueue()
    for cell in chosen:
        waiting.put(cell)

    def work() -> None:
        worker = Worker()
        with contextlib.suppress(queue.Empty):
            for count in range(1, len(chosen) + 1):
                cell = waiting.get_nowait()
                answers.put((cell, *worker.judge(cell)))
                if count % 100 == 0:
                    worker.stop()  # what exporters keep in memory goes with it
        worker.stop()

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    for _ in chosen:
        yield answers.get()


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of cells by outcome, and the share of right ones among those that were judged."""
    counts = collections.Counter(row["outcome"] for row in rows)
    judged = len(rows) - counts["not exported"]
    ways = {way: collections.Counter() for way in dict.fromkeys(row["way"] for row in rows)}
    for row in rows:
        ways[row["way"]][row["outcome"]] += 1
    return {
        "cells": {outcome: counts[outcome] for outcome in OUTCOMES},
        "judged": judged,
        "right_share": round(counts["right"] / judged, 4) if judged else None,
        "ways": {way: dict(found) for way, found in ways.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The support table in Markdown: right of judged cells by family and group of ways."""
    lines = [
        "| family | " + " | ".join(GROUPS) + " |",
        "|---|" + "---|" * len(GROUPS),
    ]
    for family in [name for name in FAMILIES if any(r["family"] == name for r in rows)]:
        texts = []
        for ways in GROUPS.values():
            found = [r for r in rows if r["family"] == family and r["way"] in ways]
            judged = [r for r in found if r["outcome"] != "not exported"]
            right = sum(r["outcome"] == "right" for r in judged)
            refused = judged and all(r["outcome"] == "refused" for r in judged)
            texts.append("-" if not judged else "refused" if refused else f"{right}/{len(judged)}")
        lines.append(f"| {family} | " + " | ".join(texts) + " |")
    total = summary(rows)
    counts = total["cells"]
    lines += [
        "",
        f"{counts['right']} right, {counts['refused']} refused with a reason, {counts['wrong']} "
        f"wrong; {counts['not exported']} more that exporter or tool cannot make. "
        f"{100 * total['right_share']:.1f} % of the judged cells are right.",
        "",
        "| reason to refuse | where |",
        "|---|---|",
    ]
    return "\n".join([*lines, *_reasons(rows)])


def _reasons(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    places: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        if row["outcome"] == "refused":
            ways = places.setdefault(row["detail"].partition(";")[0], {})
            ways.setdefault(row["family"], {})[row["way"]] = None
    for reason, families in sorted(places.items(), key=lambda item: -len(item[1])):
        named = []
        for family, ways in families.items():
            everywhere = len(ways) > len(WAYS) // 2
            named.append(family if everywhere else f"{family} ({', '.join(ways)})")
        yield f"| {reason} | {'; '.join(named)} |"


def write_table(results: Path, readme: Path) -> None:
    """Put the table of a results file between the marks in a Markdown file."""
    rows = json.loads(results.read_text("utf-8"))["rows"]
    replace_between(readme, BEGIN, END, table(rows))


def _names(text: str | None, known: Sequence[str]) -> list[str]:
    chosen = list(known) if text is None else text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return chosen


def main() -> None:
    """Judge what the command line chooses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", help="separated by commas; default: all")
    parser.add_argument("--ways", help="separated by commas; default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.json")
    parser.add_argument("--table", type=Path, help="write the table of --out into this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.table:
        write_table(options.out, options.table)
        return
    chosen = cells(_names(options.families, list(FAMILIES)), _names(options.ways, list(WAYS)))
    started, rows = time.monotonic(), []
    for cell, outcome, detail in judge_all(chosen, options.workers):
        row = {"family": cell.entry.name, "way": cell.way, "kv_cache": cell.kv_cache}
        rows.append({**row, "outcome": outcome, "detail": detail})
        if outcome != "right":
            print(f"{cell.id:40} {outcome:12} {detail[:150]}", flush=True)
    order = {cell.id: index for index, cell in enumerate(chosen)}
    rows.sort(key=lambda r: order[Cell(FAMILIES[r["family"]], r["way"], r["kv_cache"]).id])
    result = {"machine": describe_machine(), "rows": rows, **summary(rows)}
    write_result(options.out, {**result, "seconds": round(time.monotonic() - started)})
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
