"""What removing tokens costs in accuracy, on models that ship, in one command.

    python benchmarks/tokens_accuracy.py [--keep 0.75 0.5 0.35] [--copies 3] [--assets FOLDER]

digits-vit   eight layers, trained by train_digits_vit.py: accuracy on test digits that neither
             training nor the search has seen, each placed ``--copies`` times.
mnist-vit    two layers, made by others: the last 1800 of 2000 test images of MNIST; it takes one
             image at a time, and its maps of attention are outputs.
plates-cct   four layers, made by others, a compact convolutional transformer that reads number
             plates and pools all tokens by attention: plates read without any mistake, the last
             240 of 300 rendered ones.

``multiplications`` is the share of the original's that is left in the layers. Searched schedules
are as cheap as the constant one of the same row, and chosen on other images without their labels.
The models made by others lie in the folder of assets, and are left out where there is none.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
ASSETS = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
BATCH = 100
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_"

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


@dataclass(frozen=True)
class Task:
    """A trained model and images whose answers are known.

    Attributes:
        model: Canonical.
        names: Of the input, and of the output.
        images, labels: [n, ...] to judge by.
        others: Images that a search may look at.
        right: (output, labels) -> bool [n].
        batch: How many images the model takes.
    """

    model: ir.Model
    names: tuple[str, str]
    images: np.ndarray
    labels: np.ndarray
    others: np.ndarray
    right: Callable[[np.ndarray, np.ndarray], np.ndarray]
    batch: int = BATCH


def largest(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the largest score is that of the label."""
    return np.asarray(scores.argmax(axis=-1) == labels)


def spelled(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the characters of the largest scores are those of the label, without the padding."""
    found = ["".join(_ALPHABET[i] for i in row).rstrip("_") for row in scores.argmax(axis=-1)]
    return np.array(found) == labels


def digits_vit(copies: int) -> Task:
    """The model that ships."""
    images, labels = digits.load("test", copies)
    held_out, _ = digits.load("held-out")
    model = canonical(digits.HOME / "digits-vit.onnx")
    return Task(model, ("pixel_values", "logits"), images, labels, held_out, largest)


def mnist_vit(assets: Path) -> Task:
    """``vit-canvas`` and images of MNIST, with the mean and deviation it was trained with."""
    found = np.load(assets / "images/mnist_test_first2000.npz")
    images = ((found["x"][:, None] / 255 - 0.1307) / 0.3081).astype(np.float32)
    model = canonical(assets / "vit/vit-canvas/microvit_run_3.onnx")
    names = ("input", "scores")
    return Task(model, names, images[200:], found["y"][200:], images[:200], largest, 1)


def plates_cct(assets: Path) -> Task:
    """``cct_xs_v1_global`` and rendered plates; needs Pillow."""
    from PIL import Image

    folder = assets / "images/rendered_plates"
    with next(folder.glob("*.csv")).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    opened = [Image.open(folder / row["file"]).convert("RGB").resize((128, 64)) for row in rows]
    images, labels = np.stack([np.asarray(i) for i in opened]), np.array([r["text"] for r in rows])
    model = canonical(assets / "vit/cct_xs_lpr/cct_xs_v1_global.onnx")
    names = ("input", "Identity:0")
    return Task(model, names, images[60:], labels[60:], images[:60], spelled)


def accuracy(task: Task, model: ir.Model) -> float:
    """Share of images that ``model`` is right about."""
    runner, right = OrtRunner(model), 0
    name, output = task.names
    for start in range(0, len(task.images), task.batch):
        rows = slice(start, start + task.batch)
        found = runner.run({name: task.images[rows]})[output]
        right += int(task.right(found, task.labels[rows]).sum())
    return right / len(task.images)


def reduced(
    task: Task, label: str, keep: float, data: Calibration | None = None
) -> tuple[ir.Model, dict[str, Any]]:
    """The model with fewer tokens, and its row but for the accuracy."""
    name, options = METHODS[label]
    model, pass_class = task.model.clone(), get_pass(name)
    report = pass_class(pass_class.Options(keep=keep, **options)).call(
        model, Context(calibration=data)
    )
    tower = report.details["towers"][0]
    costs = Costs.of(find_blocks(task.model).blocks, tower["tokens"])
    share = costs.total(tower["removed"]) / costs.total([0] * len(tower["removed"]))
    row = {"method": label, "keep": keep, "removed": tower["removed"]}
    return model, row | {"multiplications": round(share, 4)}


def table(task: Task, keeps: Sequence[float]) -> list[dict[str, Any]]:
    """One row per method and share of tokens."""
    samples = load_samples({task.names[0]: task.others}, input_specs(task.model))
    data = Calibration(samples, batch=task.batch if task.batch == 1 else None)
    before = accuracy(task, task.model)
    rows: list[dict[str, Any]] = [{"method": "original", "keep": 1.0, "accuracy": before}]
    print(f"original {100 * before:.2f} %")
    for keep in keeps:
        for label in METHODS:
            model, row = reduced(task, label, keep, data)
            rows.append(row | {"accuracy": accuracy(task, model)})
            print(
                f"keep {keep:.2f}  {label:28} {100 * rows[-1]['accuracy']:6.2f} %  "
                f"{row['multiplications']:.3f} of the multiplications  {row['removed']}",
                flush=True,
            )
    return rows


_COLUMNS = (
    "tome", "tome, searched", "crossget, no guidance", "crossget", "crossget, searched",
    "prune-tokens", "prune-tokens, searched",
)  # fmt: skip


def markdown(models: dict[str, dict[str, Any]]) -> str:
    """Accuracy in % by model and share of tokens, and a row for each original."""
    lines = [
        "| model | tokens less at the end | `tome` | searched | `crossget` without guidance | with "
        "| searched | `prune-tokens` | searched |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        rows = {(row["method"], row["keep"]): row["accuracy"] for row in found["rows"]}
        images = f"{found['images']} images"
        lines.append(
            f"| {name}, {images} | 0 % | {100 * rows['original', 1.0]:.2f} " + "| " * 6 + "|"
        )
        for keep in sorted({keep for _, keep in rows} - {1.0}, reverse=True):
            cells = " | ".join(f"{100 * rows[label, keep]:.2f}" for label in _COLUMNS)
            lines.append(f"| | {100 * (1 - keep):.0f} % | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--models", nargs="+", help="only these; others keep their results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tasks = {"digits-vit": lambda: digits_vit(arguments.copies)}
    if arguments.assets.is_dir():
        tasks["mnist-vit"] = lambda: mnist_vit(arguments.assets)
        tasks["plates-cct"] = lambda: plates_cct(arguments.assets)
    models = {}
    if arguments.models and arguments.output.exists():
        models = json.loads(arguments.output.read_text("utf-8")).get("models", {})
    for name in arguments.models or tasks:
        task = tasks[name]()
        rows = table(task, arguments.keep)
        models[name] = {"images": len(task.images), "searched_on": len(task.others), "rows": rows}
        models = {known: models[known] for known in tasks if known in models}
        write_result(arguments.output, {"copies": arguments.copies, "models": models})
    print(markdown(models))


if __name__ == "__main__":
    main()
