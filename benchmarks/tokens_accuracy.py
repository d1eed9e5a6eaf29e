"""What removing tokens costs in accuracy, on models that ship, in one command.

    python benchmarks/tokens_accuracy.py [--keep 0.75 0.5 0.35] [--copies 3]

digits-vit   eight layers, trained by train_digits_vit.py: accuracy on test digits that neither
             training nor the search has seen, each placed ``--copies`` times. ``multiplications``
             is the share of the original's that is left. Searched schedules are as cheap as the
             constant one of the same row, and chosen on held-out digits without their labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits
import numpy as np
import onnx_ir as ir

from optimizer.benchmark import write_result
from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.model_io import load_model
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from optimizer.tokens.search import Costs
from passes import get_pass

RESULTS = Path(__file__).resolve().parent / "results" / "tokens_accuracy.json"
BATCH = 100

#: Name in the table -> pass and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tome": ("tome", {}),
    "tome, not proportional": ("tome", {"proportional": False}),
    "tome, searched": ("tome", {"search": True}),
    "crossget, no guidance": ("crossget", {"guidance": "none"}),
    "crossget": ("crossget", {}),
    "crossget, ensemble": ("crossget", {"ensemble": True}),
    "crossget, searched": ("crossget", {"guidance": "none", "search": True}),
    "prune-tokens": ("prune-tokens", {}),
    "prune-tokens, proportional": ("prune-tokens", {"proportional": True}),
    "prune-tokens, searched": ("prune-tokens", {"search": True}),
}


def canonical(path: Path) -> ir.Model:
    """The model in the dialect that passes work on."""
    model = load_model(path)
    canonicalize = get_pass("canonicalize")
    canonicalize(canonicalize.Options()).call(model, Context())
    return model


def accuracy(model: ir.Model, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest score is that of their label."""
    runner, right = OrtRunner(model), 0
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        scores = runner.run({"pixel_values": images[rows]})["logits"]
        right += int((scores.argmax(axis=-1) == labels[rows]).sum())
    return right / len(images)


def table(original: ir.Model, keeps: Sequence[float], copies: int) -> list[dict[str, Any]]:
    """One row per method and share of tokens."""
    images, labels = digits.load("test", copies)
    held_out, _ = digits.load("held-out")
    data = Calibration(load_samples({"pixel_values": held_out}, input_specs(original)))
    blocks = find_blocks(original).blocks
    rows: list[dict[str, Any]] = [
        {"method": "original", "keep": 1.0, "accuracy": accuracy(original, images, labels)}
    ]
    for keep in keeps:
        for label, (name, options) in METHODS.items():
            model, pass_class = original.clone(), get_pass(name)
            chosen = pass_class.Options(keep=keep, **options)
            report = pass_class(chosen).call(model, Context(calibration=data))
            tower = report.details["towers"][0]
            costs = Costs.of(blocks, tower["tokens"])
            share = costs.total(tower["removed"]) / costs.total([0] * len(blocks))
            rows.append(
                {
                    "method": label,
                    "keep": keep,
                    "removed": tower["removed"],
                    "multiplications": round(share, 4),
                    "accuracy": accuracy(model, images, labels),
                }
            )
            print(
                f"keep {keep:.2f}  {label:28} {100 * rows[-1]['accuracy']:6.2f} %  "
                f"{share:.3f} of the multiplications  {tower['removed']}", flush=True,
            )  # fmt: skip
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = canonical(digits.HOME / "digits-vit.onnx")
    rows = table(model, arguments.keep, arguments.copies)
    print(f"original {100 * rows[0]['accuracy']:.2f} %")
    facts = {"model": "digits-vit", "images": 360 * arguments.copies, "rows": rows}
    write_result(arguments.output, facts)


if __name__ == "__main__":
    main()
