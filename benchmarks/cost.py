"""What a clean-up costs, ours beside those of others: time, peak memory, and what comes out.

    python benchmarks/cost.py [--models base,large] [--rounds 3] [--work FOLDER] [--out FILE.json]

For each model (``cost_models.py``: BERT-base with 438 MB, a BERT with 3.07 GB) our clean-up and
every peer (``cost_peers.py``) take turns on the same files: once each, then all again. Every run is
a process of its own, the whole command from start to exit, and writes a new file with its weights
beside it; time is wall time (processor time is noted beside it), memory the largest resident set,
pages of mapped files included. What a tool writes the first time is loaded in ONNX Runtime and
compared with the original on one input.
Our own verified runs, and those with weights inside of the file, are measured beside.

Needs the extras ``torch`` and ``cpu``; the peers are what is installed of

    pip install onnxscript onnxsim onnxoptimizer onnxslim colorama polygraphy onnx-graphsurgeon

"large" needs 16 GB of memory for the peers (``--memory``: what grows beyond is ended) and 12 GB of
disk. Results of models that are not measured this time stay in the file.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import cost_models
from cost_peers import PEERS
from cost_runs import Tool, inspect, run_once

from optimizer.benchmark import write_result
from optimizer.machine import describe_machine

HOME = Path(__file__).resolve().parent
OURS, VERIFIED = "optimize --verify off", "optimize, verified"
#: What verification of the model that does not fit half of it is given.
MAX_MEMORY = {"large": "2GB"}


def ours(name: str, source: Path, target: Path, options: list[str]) -> Tool:
    """Our own command."""
    command = [sys.executable, "-m", "optimizer", str(source), "-o", str(target), *options]
    return Tool(name, command, target, alone=False)


def tools(model: str, form: str, source: Path, folder: Path) -> tuple[list[Tool], list[str]]:
    """What takes turns on one file, and the names of the peers that are not installed."""
    limit = MAX_MEMORY.get(model)
    verified = f"{VERIFIED}, --max-memory {limit}" if limit else VERIFIED
    options = ["--max-memory", limit] if limit else []
    own = [
        ours(OURS, source, folder / "off" / "out.onnx", ["--verify", "off"]),
        ours(verified, source, folder / "verified" / "out.onnx", options),
    ]
    if form != "external":
        return own, []
    chosen = cost_models.MODELS[model]
    found = []
    for number, peer in enumerate(PEERS):
        target = folder / f"peer{number}" / "out.onnx"
        if peer.version() is not None:
            command = peer.command(source, target, chosen)
            found.append(Tool(f"{peer.name} {peer.version()}", command, target))
    return [*own, *found], [peer.name for peer in PEERS if peer.version() is None]


def row(tool: Tool) -> dict[str, Any]:
    """What a tool needed and made."""
    seconds = [run.seconds for run in tool.runs]
    return {
        "tool": tool.name,
        "seconds_median": round(statistics.median(seconds), 2),
        "seconds": [round(s, 2) for s in seconds],
        "cpu_seconds": [round(run.cpu, 2) for run in tool.runs],
        "peak_bytes": max(run.peak for run in tool.runs),
        **tool.result,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = []
    for item in rows:
        if "seconds" not in item:
            lines.append(f"  {item['tool']:40s} {item['verdict']}")
            continue
        time, peak = item["seconds_median"], item["peak_bytes"] / 1e9
        made = [f"{item.get(key, '-'):>5}" for key in ("nodes", "attentions")]
        size = f"{item['bytes'] / 1e6:6.0f} MB" if "bytes" in item else "        -"
        lines.append(
            f"  {item['tool']:40s} {time:7.2f} s {peak:6.2f} GB {' '.join(made)} {size}"
            f"  {item['verdict']}"
        )
    return "\n".join(lines)


def compare(model: str, form: str, source: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All tools on one file, in turns."""
    busy = os.getloadavg()[1]  # what other programs take from the times
    facts, expected, problem = inspect(source)
    if problem:
        sys.exit(f"{source}: {problem}")
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="run-") as folder:
        chosen, missing = tools(model, form, source, Path(folder))
        for number in range(arguments.rounds):
            for tool in chosen:
                run_once(tool, arguments.memory * 10**9, expected)
                last = tool.runs[-1]
                said = f"{last.seconds:.2f} s, {last.peak / 1e9:.2f} GB {last.problem}"
                print(f"round {number + 1} {tool.name}: {said}", file=sys.stderr, flush=True)
    rows = [row(tool) for tool in chosen]
    rows += [{"tool": name, "verdict": "not installed"} for name in missing]
    return {
        "model": f"{model}, weights {'beside the file' if form == 'external' else 'inside'}",
        "bytes": sum(item.stat().st_size for item in source.parent.iterdir()),
        "nodes": facts["nodes"],
        "layers": cost_models.MODELS[model].layers,
        "rounds": arguments.rounds,
        "load_average_before": round(busy, 1),
        "rows": rows,
    }


def main() -> None:
    """Run all configurations, print their tables, and put them in place of older ones."""
    parser = argparse.ArgumentParser(description="Time and memory of clean-ups side by side.")
    parser.add_argument("--models", default=",".join(cost_models.MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=16, metavar="GB")
    parser.add_argument("--work", type=Path, help="keep the exports here")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "cost.json")
    arguments = parser.parse_args()
    for package in ("optimizer", "passes"):  # as pip does with all that it installs
        compileall.compile_dir(HOME.parent / package, quiet=1)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results = found.get("models", [])
    with tempfile.TemporaryDirectory(prefix="cost-") as temporary:
        arguments.work = (arguments.work or Path(temporary)).resolve()
        arguments.work.mkdir(parents=True, exist_ok=True)
        for model in arguments.models.split(","):
            for form, source in cost_models.ensure(model, arguments.work).items():
                result = compare(model, form, source, arguments)
                result["machine"] = describe_machine()
                print(f"{result['model']}: {result['bytes'] / 1e6:.0f} MB, {result['nodes']} nodes")
                print(table(result["rows"]), flush=True)
                results = [old for old in results if old["model"] != result["model"]] + [result]
                write_result(arguments.out, {"models": results}, memory_limit_gb=arguments.memory)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
