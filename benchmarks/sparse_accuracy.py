"""Error of pruned models against dense ones: patterns, methods, and shares of layers.

    python benchmarks/sparse_accuracy.py [--models stories12l,stories260K,minilm]
        [--tokens FILE.npz] [--stories260K DIR] [--minilm DIR] [--banking77 FILE.csv]

Models, data and figures are those of ``outliertune_accuracy.py``: perplexity and KL divergence of
language models, cosine and accuracy of sentence embeddings. Every scheme is calibrated on the same
samples, and measured on others. Models without a folder given are left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from outliertune_accuracy import HOME, Case, cases, show

from optimizer.api import optimize
from optimizer.benchmark import write_result
from optimizer.job import Result
from optimizer.machine import describe_machine

METHODS = ("magnitude", "wanda", "sparsegpt")
HALF: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}
SEVENTY: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.7}
PATTERNS: dict[str, dict[str, Any]] = {
    "50 %": HALF,
    "70 %": SEVENTY,
    "4:8": {"pattern": "4:8"},
    "2:4": {"pattern": "2:4"},
}
Steps = list[tuple[str, dict[str, Any]]]


def schemes() -> dict[str, Steps]:
    """All recipes by name."""
    found: dict[str, Steps] = {}
    for pattern, options in PATTERNS.items():
        for method in METHODS:
            found[f"{pattern} {method}"] = [("sparsify", {**options, "method": method})]
    for pattern, options in (("50 %", HALF), ("70 %", SEVENTY)):
        for method in METHODS:
            variant = {**options, "method": method, "compare": "output"}
            found[f"{pattern} {method}, per output"] = [("sparsify", variant)]
        for method in ("wanda", "sparsegpt"):
            variant = {**options, "method": method, "allocation": "damage"}
            found[f"{pattern} {method}, by damage"] = [("sparsify", variant)]
    for pattern in ("50 %", "2:4"):
        for method in ("wanda", "sparsegpt"):
            variant = {**PATTERNS[pattern], "method": method, "sequential": True}
            found[f"{pattern} {method}, sequential"] = [("sparsify", variant)]
    found["int8"] = [("outliertune", {})]
    found["50 % sparsegpt, int8"] = [("sparsify", HALF), ("outliertune", {})]
    found["2:4 sparsegpt, int8"] = [("sparsify", {}), ("outliertune", {})]
    return found


def sparsity(result: Result) -> float | None:
    """Share of exact zeros in the layers pruned; None where none were."""
    found = [stage.details for stage in result.report.rows if stage.name == "sparsify"]
    return found[0]["sparsity"] if found else None


def run(case: Case, folder: Path, only: str) -> dict[str, dict[str, Any]]:
    """Make and measure every model of one case."""
    found: dict[str, dict[str, Any]] = {"dense": case.measure(case.source, case.reference)}
    show("dense", found["dense"])
    path = folder / "sparse.onnx"
    for name, steps in schemes().items():
        if not name.startswith(only):
            continue
        start = time.perf_counter()
        result = optimize(
            case.source,
            steps,
            output=path,
            calibration=case.calibration,
            verify="off",
            force=True,
        )
        seconds = time.perf_counter() - start
        figures: dict[str, Any] = case.measure(path, case.reference)
        figures["seconds"] = round(seconds, 1)
        figures["sparsity"] = sparsity(result)
        found[name] = figures
        show(name, figures)
    return found


def main() -> None:
    """Measure the models asked for and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="stories12l,stories260K,minilm")
    parser.add_argument("--tokens", type=Path, help="token ids; default: what stories12l wrote")
    parser.add_argument("--rows", type=int, default=60, help="rows of token ids to measure on")
    parser.add_argument("--stories260K", type=Path, help="Hugging Face folder")
    parser.add_argument("--minilm", type=Path, help="Hugging Face folder")
    parser.add_argument("--banking77", type=Path, help="CSV with columns text and category")
    parser.add_argument("--tests", type=int, default=600, help="sentences to measure on")
    parser.add_argument("--only", default="", help="schemes that begin with this")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "sparse_accuracy.json")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, case in cases(arguments, folder):
            print(f"{name}:")
            found[name] = run(case, folder, arguments.only)
    write_result(
        arguments.out,
        {"models": found},
        text="self-sampled" if arguments.tokens is None else arguments.tokens.name,
        rows=arguments.rows,
        machine=describe_machine(),
    )
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
