"""Which engines TensorRT for RTX builds of every family, without a GPU; and the size of each.

    python benchmarks/engines.py --workers 2            # all cells; goes on where it stopped
    python benchmarks/engines.py --table README.md      # writes the table of the results

A cell is a family, with or without KV cache, and a pass set. *built*: an engine. *refused*: this
program says why it does not build (no data, a family it does not know). *failed*: TensorRT does not
take what this program wrote, whatever its reason. The same export, untouched, is built too, for
comparison. The seconds in the results are comparable only where the machine did nothing else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import exporters  # noqa: E402
import families  # noqa: E402
import numpy as np  # noqa: E402
from readme import replace_between  # noqa: E402
from rewriters import Cell, NotExported  # noqa: E402

from optimizer.benchmark import write_result  # noqa: E402
from optimizer.engine_job import EngineOptions, build_file, build_model  # noqa: E402
from optimizer.errors import EngineError, OptimizerError  # noqa: E402

#: "untouched" is the comparison: the exporter's file as it is.
PASS_SETS = {
    "untouched": None,
    "fp32": "",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "outliertune",
    "int8, fp16": "outliertune,fp16",
}
BEGIN = "<!-- engines: benchmarks/engines.py --table README.md -->"
END = "<!-- end of engines -->"
CAPABILITY = 89


def build(name: str, cached: bool, pass_set: str) -> dict[str, Any]:  # noqa: FBT001
    """Build one cell."""
    entry = families.FAMILIES[name]
    row: dict[str, Any] = {"family": name, "kv_cache": cached, "passes": pass_set}
    try:
        path = exporters.export(Cell(entry, "dynamo-23", cached))
    except NotExported as error:
        return {**row, "outcome": "not exported", "detail": str(error)[:200]}
    passes = PASS_SETS[pass_set]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = EngineOptions(Path(folder) / "x.engine", capabilities=(CAPABILITY,))
        try:
            if passes is None:
                made = build_file(path, "tensorrt-rtx", options)
            else:
                data = Path(folder) / "data.npz"
                # Samples are stacked along the first axis; one of a batch is one sample.
                np.savez(data, **families.make_feeds(entry, cached, seed=1))
                made = build_model(
                    str(path), passes, "tensorrt-rtx", options, calibration=str(data), verify="off"
                )
        except EngineError as error:
            return {**row, "outcome": "failed", "detail": str(error)[:300]}
        except OptimizerError as error:
            return {**row, "outcome": "refused", "detail": str(error)[:300]}
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"[:300]
            return {**row, "outcome": "failed", "detail": detail}
        seconds = round(time.perf_counter() - began, 2)
        size = made.manifest["engine"]["bytes"]
        kinds = made.manifest["precisions"]
    return {**row, "outcome": "built", "bytes": size, "seconds": seconds, "layers": kinds}


def wanted(names: Sequence[str]) -> list[tuple[str, bool, str]]:
    """All cells, one pass set after the other."""
    return [
        (name, cached, pass_set)
        for pass_set in PASS_SETS
        for name in names
        for cached in ((False, True) if families.FAMILIES[name].cached else (False,))
    ]


def key(row: dict[str, Any]) -> tuple[str, bool, str]:
    """What identifies a row."""
    return row["family"], row["kv_cache"], row["passes"]


def table(content: dict[str, Any]) -> str:
    """One line for each pass set, and the reasons of what was not built."""
    rows = content["rows"]
    plain = {key(row)[:2]: row for row in rows if row["passes"] == "untouched"}
    lines = [
        "| pass set | built | refused | failed | engine size |",
        "|---|---|---|---|---|",
    ]
    for pass_set in PASS_SETS:
        own = [row for row in rows if row["passes"] == pass_set]
        count = Counter(row["outcome"] for row in own)
        pairs = [
            (row, plain[key(row)[:2]])
            for row in own
            if row["outcome"] == "built" and plain.get(key(row)[:2], {}).get("outcome") == "built"
        ]
        ratios = [a["bytes"] / b["bytes"] for a, b in pairs]
        size = f"{statistics.median(ratios):.2f}" if ratios else "-"
        numbers = " | ".join(str(count[kind]) for kind in ("built", "refused", "failed"))
        lines.append(f"| {pass_set} | {numbers} | {size} |")
    missing = len(wanted(list(families.FAMILIES))) - len(rows)
    other = sum(row["outcome"] == "not exported" for row in rows)
    lines += [
        "",
        "Size: median ratio to the engine of the untouched export, where both were built. These "
        "models are very small, with random weights: the ratios say little about large ones. "
        f"{other} cells have no export; {missing} were not run.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", help="separated by commas; default: all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--again", help="outcomes to try again, separated by commas")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json"
    )
    parser.add_argument("--table", type=Path, help="write the table of --out into this file")
    words = parser.parse_args()
    if words.table is not None:
        content = json.loads(words.out.read_text("utf-8"))
        replace_between(words.table, BEGIN, END, table(content))
        return
    names = words.families.split(",") if words.families else list(families.FAMILIES)
    rows = json.loads(words.out.read_text("utf-8"))["rows"] if words.out.exists() else []
    again = words.again.split(",") if words.again else []
    done = {key(row): row for row in rows if row["outcome"] not in again}
    todo = [cell for cell in wanted(names) if cell not in done]
    with concurrent.futures.ProcessPoolExecutor(words.workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(build, *c) for c in todo]):
            row = future.result()
            done[key(row)] = row
            print(*key(row), row["outcome"], row.get("detail", ""), flush=True)
            ordered = [done[k] for k in sorted(done)]
            write_result(words.out, {"rows": ordered}, capability=CAPABILITY)


if __name__ == "__main__":
    main()
