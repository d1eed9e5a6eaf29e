"""Error of int8 models against fp32: this project's schemes and ONNX Runtime's own tools.

    python benchmarks/outliertune_accuracy.py [--models stories12l,stories260K,minilm]
        [--tokens FILE.npz] [--stories260K DIR] [--minilm DIR] [--banking77 FILE.csv]

Models:
    stories12l   ships with the project. Text: rows that the model wrote itself, or ``--tokens``,
                 with arrays calibration_input_ids, eval_input_ids [rows, length] and eval_valid
                 (``eval_valid[n, t]``: predicting token t + 1 counts).
    stories260K  a LLaMA of 5 layers with the same tokenizer (``--stories260K``), on the same text.
    minilm       sentence-transformers' all-MiniLM-L6-v2 (``--minilm``, a Hugging Face folder), on
                 Banking77 (``--banking77``, columns text and category): mean-pooled embeddings
                 against fp32, and accuracy of the nearest class centroid.

Models without a folder given are left out. Every scheme is calibrated on the same samples, and
measured on others, in the form that ONNX Runtime executes. Needs the extras ``torch`` and ``cpu``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peers

from optimizer.api import optimize
from optimizer.benchmark import write_result
from optimizer.calibration import targets_in
from optimizer.frontends import export_hugging_face
from optimizer.metrics import DriftMeter
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples

HOME = Path(__file__).resolve().parent
SHIPPED = HOME / "models" / "stories12l"
EVERYWHERE = ("after_norm", "after_attention", "in_mlp", "elsewhere")
Feed = dict[str, np.ndarray]


def _plain(activation: str, **options: Any) -> dict[str, Any]:
    """A scheme of the literature: weights to nearest, symmetric activations."""
    base = {"shift": False, "asymmetric": False, "compensate": False, "margin": False}
    return {**base, **dict.fromkeys(EVERYWHERE, activation), **options}


#: Our pass with the options that make it each scheme; all W8A8 but the last rows.
SCHEMES: dict[str, dict[str, Any]] = {
    "per-tensor static": _plain("static", alpha="off"),
    "per-token dynamic": _plain("per-token", alpha="off"),
    "SmoothQuant 0.5, per-token": _plain("per-token", alpha=0.5),
    "SmoothQuant 0.5, static": _plain("static", alpha=0.5),
    "OutlierTune as published": _plain("per-token", alpha=1.0, shift=True, after_norm="static"),
    "ours W8A8": {},
    "ours W8A8, weights to nearest": {"compensate": False},
    "per-token dynamic W6A6": _plain("per-token", alpha="off", bits=6),
    "SmoothQuant 0.5, per-token W6A6": _plain("per-token", alpha=0.5, bits=6),
    "ours W6A6": {"bits": 6},
}
PEERS = ("ORT quantize_dynamic, folded", "ORT static QDQ, folded")


@dataclass(frozen=True)
class Case:
    """One model with its data.

    Attributes:
        source: The fp32 export.
        calibration: Feeds.
        measure: Figures of one model, from (path, fp32 results).
        reference: What ``measure`` compares with.
    """

    source: Path
    calibration: list[Feed]
    measure: Callable[[Path, Any], dict[str, float]]
    reference: Any


# Language models.


def language_model(source: Path, text: Mapping[str, np.ndarray], rows: int) -> Case:
    """Perplexity and KL divergence on rows of token ids."""
    inputs = OrtRunner(source, optimize=False).inputs
    calibration = load_samples({"input_ids": text["calibration_input_ids"]}, inputs)
    held_out = load_samples(
        {"input_ids": text["eval_input_ids"][:rows], "valid": text["eval_valid"][:rows]}, inputs
    )
    runner = OrtRunner(source)
    reference = [runner.run(batch.feed)["logits"] for batch in held_out.iterate(4)]

    def measure(path: Path, expected: list[np.ndarray]) -> dict[str, float]:
        candidate, meter = OrtRunner(path), DriftMeter()
        for logits, batch in zip(expected, held_out.iterate(4), strict=True):
            found = candidate.run(batch.feed)["logits"]
            valid = batch.extras["valid"].astype(bool)
            meter.update(logits, found, valid, targets_in(batch, logits.shape[:-1]))
        drift = meter.result()
        before, after = drift.perplexity_reference or np.nan, drift.perplexity or np.nan
        return {
            "perplexity": after,
            "perplexity_change_percent": 100 * (after / before - 1),
            "kl": drift.kl or 0.0,
            "relative_l2": drift.relative_l2,
            "top1": drift.top1 or 0.0,
        }

    feeds = [dict(batch.feed) for batch in calibration.iterate(1)]
    return Case(source, feeds, measure, reference)


def own_text() -> dict[str, np.ndarray]:
    """The rows that ship with stories12l."""
    calibration = np.load(SHIPPED / "stories12l.calibration.npz")
    held_out = np.load(SHIPPED / "stories12l.eval.npz")
    return {
        "calibration_input_ids": calibration["input_ids"],
        "eval_input_ids": held_out["input_ids"],
        "eval_valid": held_out["valid"],
    }


# Sentence embeddings.


def encoder(source: Path, folder: Path, table: Path, tests: int) -> Case:
    """Cosine to fp32, and accuracy of the nearest centroid of 20 sentences per class."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with table.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    order = np.random.default_rng(0).permutation(len(rows))
    texts = [rows[i][0] for i in order]
    labels = np.array([rows[i][1] for i in order])
    classes, numbers = np.unique(labels, return_inverse=True)
    rest = np.arange(tests + 100, len(rows))
    train = np.concatenate([rest[numbers[rest] == c][:20] for c in range(len(classes))])
    names = OrtRunner(source, optimize=False).input_names

    def batches(index: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, Feed]]:
        by_length = sorted(index, key=lambda i: len(texts[i]))
        for start in range(0, len(by_length), size):
            part = by_length[start : start + size]
            coded = tokenizer([texts[i] for i in part], padding=True, return_tensors="np")
            yield np.array(part), {n: coded[n].astype(np.int64) for n in names if n in coded}

    def embed(path: Path, index: np.ndarray) -> np.ndarray:
        runner = OrtRunner(path)
        result: dict[int, np.ndarray] = {}
        for part, feed in batches(index, 32):
            hidden = runner.run(feed)[runner.output_names[0]]
            mask = feed["attention_mask"][..., None]
            mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
            result.update(
                zip(part, mean / np.linalg.norm(mean, axis=1, keepdims=True), strict=True)
            )
        return np.array([result[i] for i in index])

    def accuracy(found: np.ndarray, centres: np.ndarray) -> float:
        return float(((found @ centres.T).argmax(axis=1) == numbers[:tests]).mean())

    def centroids(found: np.ndarray) -> np.ndarray:
        means = np.array([found[numbers[train] == c].mean(axis=0) for c in range(len(classes))])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def measure(path: Path, expected: tuple[np.ndarray, float]) -> dict[str, float]:
        found = embed(path, np.arange(tests))
        cosine = (found * expected[0]).sum(axis=1)
        reached = accuracy(found, centroids(embed(path, train)))
        return {
            "cosine": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
            "accuracy": reached,
            "accuracy_loss_points": 100 * (expected[1] - reached),
        }

    held_out = embed(source, np.arange(tests))
    reference = held_out, accuracy(held_out, centroids(embed(source, train)))
    calibration = [feed for _, feed in batches(np.arange(tests, tests + 100), 1)]
    return Case(source, calibration, measure, reference)


# All together.


def run(case: Case, folder: Path, only: str) -> dict[str, dict[str, Any]]:
    """Make and measure every int8 model of one case."""
    found: dict[str, dict[str, Any]] = {"fp32": case.measure(case.source, case.reference)}
    show("fp32", found["fp32"])
    for name, options in SCHEMES.items():
        if name.startswith(only):
            path = folder / "ours.onnx"
            step = [("outliertune", options)]
            optimize(
                case.source,
                step,
                output=path,
                calibration=case.calibration,
                verify="off",
                force=True,
            )
            found[name] = case.measure(path, case.reference)
            show(name, found[name])
    single = folder / "single.onnx"  # the peers do not follow weights in other files
    onnx.save(onnx.load(case.source), single)
    for name in PEERS:
        if name.startswith(only):
            path = folder / "peer.onnx"
            reason = peers.make(name, single, case.calibration, path)
            found[name] = {"failed": reason} if reason else case.measure(path, case.reference)
            show(name, found[name])
    return found


def show(name: str, figures: Mapping[str, Any]) -> None:
    """One row as text."""
    cells = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k}: {v}" for k, v in figures.items())
    print(f"  {name:34} " + "  ".join(cells))
    sys.stdout.flush()


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Case]]:
    """The models asked for whose files were given."""
    text = own_text() if arguments.tokens is None else dict(np.load(arguments.tokens))
    for name in arguments.models.split(","):
        if name == "stories12l":
            yield name, language_model(SHIPPED / "stories12l.onnx", text, arguments.rows)
        elif name == "stories260K" and arguments.stories260K is not None:
            source = export_hugging_face(str(arguments.stories260K), folder / name)
            yield name, language_model(source, text, arguments.rows)
        elif name == "minilm" and arguments.minilm is not None and arguments.banking77 is not None:
            source = export_hugging_face(str(arguments.minilm), folder / name)
            yield name, encoder(source, arguments.minilm, arguments.banking77, arguments.tests)
        else:
            print(f"{name}: left out, its files were not given")


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
    parser.add_argument("--out", type=Path, default=HOME / "results" / "outliertune_accuracy.json")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, case in cases(arguments, folder):
            print(f"{name}:")
            found[name] = run(case, folder, arguments.only)
    text = "self-sampled" if arguments.tokens is None else arguments.tokens.name
    write_result(arguments.out, {"models": found}, text=text, rows=arguments.rows)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
