"""Prints the results of ``cost.py``, or puts them into the README.

python benchmarks/cost_table.py [--results benchmarks/results/cost.json] [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme import replace_between

HOME = Path(__file__).resolve().parent
BEGIN, END = "<!-- costs: benchmarks/cost_table.py --readme README.md -->", "<!-- end of costs -->"


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


def summary(models: Sequence[Mapping[str, Any]]) -> str:
    """All models with their weights beside the file in one table, those within in one line."""
    beside = [m for m in models if "beside" in m["model"]]
    names: dict[str, None] = {}
    for model in beside:
        names |= dict.fromkeys(map(_name, model["rows"]))
    heads = [f"{m['bytes'] / 1e6:.0f} MB, {m['nodes']} nodes, {m['layers']} layers" for m in beside]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in names:
        rows = [next((r for r in m["rows"] if _name(r) == name), None) for m in beside]
        texts = ["" if row is None else _figures(row) for row in rows]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    for model in models:
        if model not in beside:
            figures = "; ".join(f"{_name(row)} {_figures(row)}" for row in model["rows"])
            lines += ["", f"With weights inside of the file ({heads[0]}): {figures}."]
    loads = ", ".join(str(m["load_average_before"]) for m in models)
    rounds = ", ".join(str(m["rounds"]) for m in models)
    return "\n".join([*lines, "", f"Rounds: {rounds}; load average before: {loads}."])


def _name(row: Mapping[str, Any]) -> str:
    tool = str(row["tool"])
    if not tool.startswith("optimize"):
        return tool
    return "**ours, verified**" if "verified" in tool else "**ours, `--verify off`**"


def _figures(row: Mapping[str, Any]) -> str:
    if "seconds" not in row:
        return short(row["verdict"])
    limit = re.search(r"--max-memory \w+", row["tool"])
    text = f"{row['seconds_median']:.1f} s, {row['peak_bytes'] / 1e9:.2f} GB"
    text += f" (`{limit[0]}`)" if limit else ""
    if row["verdict"] != "valid":
        return f"{text}: **{short(row['verdict'])}**"
    return f"{text}, {row['nodes']} nodes, {row['attentions']} attentions"


def main() -> None:
    """Print all tables, or write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=HOME / "results" / "cost.json")
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    models = json.loads(options.results.read_text("utf-8"))["models"]
    if options.readme:
        replace_between(options.readme, BEGIN, END, summary(models))
    else:
        print("\n\n".join(table(model) for model in models))


if __name__ == "__main__":
    main()
