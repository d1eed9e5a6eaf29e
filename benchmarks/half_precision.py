"""Error of half-precision models against fp32: this project's passes and ONNX Runtime's converter.

    python benchmarks/half_precision.py [--minilm DIR --banking77 FILE.csv] [--large FACTOR]

Models:
    stories12l   ships with the project, with its calibration and evaluation data.
    minilm       sentence-transformers' all-MiniLM-L6-v2 (``--minilm``, a Hugging Face folder) on
                 Banking77 (``--banking77``, a column text).
    spelled out  stories12l with its norms in elementary operators, as many exporters write them,
                 and its layers' results scaled up so that the largest activation is ``--large``.

Every value of a half-precision model is rounded as the model says, whatever the processor has
kernels for. Needs the extra ``cpu``, and ``torch`` for MiniLM.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from optimizer.api import optimize
from optimizer.benchmark import write_result
from optimizer.calibration import Calibration, input_specs
from optimizer.frontends import export_hugging_face
from optimizer.legalize.decompose import Pen, rms_normalization
from optimizer.metrics import Drift
from optimizer.model_io import load_model, save_model
from optimizer.report import library_versions
from optimizer.samples import load_samples

HOME = Path(__file__).resolve().parent
SHIPPED = HOME / "models" / "stories12l"
SCHEMES: dict[str, tuple[list[str], bool]] = {
    "fp16": (["fp16"], True),
    "fp16 without data": (["fp16"], False),
    "bf16": (["bf16"], True),
    "outliertune": (["outliertune"], True),
    "outliertune, fp16": (["outliertune", "fp16"], True),
}
PEER = "ORT convert_float_to_float16"
TARGET = "tensorrt-11"
_LENGTH = 48


@dataclass(frozen=True)
class Case:
    """One fp32 model with its data."""

    source: Path
    calibration: Path
    evaluation: Path


def stories() -> Case:
    """The shipped model."""
    source = SHIPPED / "stories12l.onnx"
    return Case(source, *(source.with_suffix(f".{kind}.npz") for kind in ("calibration", "eval")))


def minilm(model: Path, table: Path, folder: Path) -> Case:
    """A sentence encoder on short questions."""
    from transformers import AutoTokenizer

    with table.open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:320]
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = tokenizer(
        texts, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="np"
    )
    files = [folder / f"minilm.{kind}.npz" for kind in ("calibration", "eval")]
    for path, rows in zip(files, (slice(64), slice(64, None)), strict=True):
        np.savez(path, **{name: np.asarray(a[rows], np.int64) for name, a in words.items()})
    return Case(export_hugging_face(str(model), folder / "minilm"), *files)


def spelled_out(case: Case, folder: Path, large: float) -> Case:
    """Large activations in the residual stream, of which exported norms take the squares."""
    result = optimize(case.source, [], target=TARGET, verify="off", write=False)
    model = result.model
    data = Calibration(load_samples(str(case.calibration), input_specs(model), limit=8))
    stream = [n.outputs[0] for n in model.graph if n.op_type == "Add"]
    arrays = data.runner(model, stream).run(next(data.samples.iterate(8)).feed)
    factor = large / max(float(np.abs(arrays[str(v.name)]).max()) for v in stream)
    for name, value in list(model.graph.initializers.items()):
        if any(part in name for part in ("o_proj", "down_proj")):
            array = value.const_value.numpy() * np.float32(factor)
            value.const_value = ir.tensor(array, name=name)
    for node in [n for n in model.graph if n.op_type == "RMSNormalization"]:
        rms_normalization(Pen(model.graph, node, {}))
    path = folder / "spelled_out.onnx"
    save_model(model, path)
    return Case(path, case.calibration, case.evaluation)


def ours(case: Case, name: str) -> dict[str, Any]:
    """Figures of one scheme of ours."""
    passes, data = SCHEMES[name]
    result = optimize(
        case.source,
        passes,
        target=TARGET,
        calibration=case.calibration if data else None,
        evaluation=case.evaluation,
        samples=64,
        write=False,
    )
    row = next(row for row in reversed(result.report.rows) if row.name in passes)
    nodes = row.details.get("nodes", {})
    assert result.report.drift is not None
    return {**figures(result.report.drift), **nodes, "bytes": result.report.after.bytes}


def peer(case: Case, folder: Path) -> dict[str, Any]:
    """Figures of ONNX Runtime's converter on the same file."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = folder / "peer.onnx"
    try:
        onnx.save(convert_float_to_float16(onnx.load(case.source), keep_io_types=True), path)
        reference, candidate = load_model(case.source), load_model(path)
        samples = load_samples(str(case.evaluation), input_specs(reference), limit=64)
        data = Calibration(samples)
        with np.errstate(all="ignore"):
            return figures(data.drift(data.reference(reference), candidate))
    except Exception as error:  # whatever it raises is its result
        return {"failed": " ".join(str(error).split())[:200]}


def figures(drift: Drift) -> dict[str, Any]:
    """What of a drift is worth a row."""
    found = {key: drift.as_dict().get(key) for key in ("relative_l2", "cosine", "top1", "kl")}
    ratio = drift.perplexity_ratio
    change = None if ratio is None else 100 * (ratio - 1)
    return {k: v for k, v in {**found, "perplexity_percent": change}.items() if v is not None}


def show(name: str, found: Mapping[str, Any]) -> None:
    """One row as text."""
    cells = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k}: {v}" for k, v in found.items())
    print(f"  {name:30} " + "  ".join(cells))
    sys.stdout.flush()


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Case]]:
    """The models whose files were given."""
    yield "stories12l", stories()
    yield "spelled out", spelled_out(stories(), folder, arguments.large)
    if arguments.minilm is not None and arguments.banking77 is not None:
        yield "minilm", minilm(arguments.minilm, arguments.banking77, folder)


def main() -> None:
    """Measure all models and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="Hugging Face folder")
    parser.add_argument("--banking77", type=Path, help="CSV with a column text")
    parser.add_argument("--large", type=float, default=500.0, help="largest activation")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "half_precision.json")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, case in cases(arguments, folder):
            print(f"{name}:")
            found[name] = {scheme: ours(case, scheme) for scheme in SCHEMES}
            found[name][PEER] = peer(case, folder)
            for scheme, figures_ in found[name].items():
                show(scheme, figures_)
    versions = library_versions()
    write_result(arguments.out, {"models": found}, large=arguments.large, versions=versions)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
