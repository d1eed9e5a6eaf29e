"""Prints the results of ``cost.py`` as the tables of the README.

python benchmarks/cost_table.py [benchmarks/results/cost.json]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent


def cells(row: dict[str, Any]) -> str:
    """Time, processor time, memory, nodes, attentions and verdict of one row."""
    if "seconds" not in row:
        return f"| | | | | {row['verdict']} "
    cpu = sorted(row["cpu_seconds"])[len(row["cpu_seconds"]) // 2]
    numbers = f"{row['seconds_median']:.1f} s | {cpu:.1f} s | {row['peak_bytes'] / 1e9:.2f} GB"
    made = f"{row['nodes']}, {row['attentions']}" if "nodes" in row else ""
    return f"| {numbers} | {made} | {short(row['verdict'])} "


def short(verdict: str) -> str:
    """The kind of verdict, and no more of a message than a cell holds."""
    kind, _, text = verdict.partition(": ")
    text = re.sub(r"[|`]", "", text)
    return f"{kind}: {text[:60]}" if text else kind


def table(result: dict[str, Any]) -> str:
    """One model as Markdown."""
    title = f"{result['model']}: {result['bytes'] / 1e6:.0f} MB, {result['nodes']} nodes, "
    title += f"{result['layers']} layers; rounds: {result['rounds']}, load of the machine before: "
    lines = [f"{title}{result['load_average_before']}", ""]
    lines += [
        "| tool | time | CPU | memory | nodes, attentions | result |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {row['tool']} {cells(row)}|" for row in result["rows"]]
    return "\n".join(lines)


def main() -> None:
    """Print all tables."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HOME / "results" / "cost.json"
    print("\n\n".join(table(result) for result in json.loads(path.read_text())["models"]))


if __name__ == "__main__":
    main()
