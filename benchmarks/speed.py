"""Latency and error of int8 models on one CPU thread, against ONNX Runtime, in one command.

    python benchmarks/speed.py [--rows prefill,decode,bert,minilm,sparse-..] [--out FILE.json]

Each row exports a transformer with random weights, lets this project and ONNX Runtime's own tools
quantize it, and times all of them taking turns in one process. The baseline is ONNX Runtime in
fp32 on the export as it is, with all its optimizations. Errors are those of the outputs against
the baseline on inputs that were not used for calibration.

Shapes: LLaMA with hidden 768, 12 heads, FFN 2048, 8 layers, vocabulary 2048; a small LLaMA with
hidden 512, 8 heads, FFN 1376, 12 layers; BERT-base; MiniLM-L6; DeiT-S on images of 224 x 224 (197
tokens). The rows ``sparse-..`` prune 70 % of the weights by magnitude and multiply in int8: since
the weights are random, their errors tell nothing (benchmarks/sparse_accuracy.py does).
Needs the extras ``torch`` and ``cpu``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
from footprint import file_bytes

from optimizer.api import optimize
from optimizer.benchmark import BenchmarkResult, Setup, benchmark, write_result
from optimizer.errors import OptimizerError
from optimizer.feeds import Sizes
from optimizer.metrics import DriftMeter
from optimizer.runners.ort import OrtRunner

HOME = Path(__file__).resolve().parent
SEQUENCE = 128
PAST = 256
#: Prompts to calibrate on: enough to see every one of 2048 token ids, which is what decides the
#: range of the first layer of a model with random weights.
CALIBRATION = 64
HELD_OUT = 8
BASELINE = "ORT fp32"
OURS = "ours"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        title: What a reader calls it.
        config: transformers configuration class and its options.
        model: transformers model class.
        kv_cache: Export with cache, and decode one token.
        passes: What our models are made with.
        required, goal: Times as fast as the baseline.
    """

    title: str
    config: str
    model: str
    required: float
    goal: float
    options: Mapping[str, Any] = field(default_factory=dict)
    kv_cache: bool = False
    passes: str = "outliertune"

    def sizes(self) -> Sizes:
        """Lengths of the axes that are timed."""
        return Sizes(1, 1, PAST) if self.kv_cache else Sizes(1, SEQUENCE, 0)


_LLAMA = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
_MINILM = {
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
}
_SMALL = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1376,
    "num_hidden_layers": 12,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
_DEIT = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
}
_SPARSE = (
    "sparsify:pattern=unstructured;sparsity=0.7;method=magnitude;heads=true,"
    "sparse-matmul:precision=int8"
)
ROWS = {
    "prefill": Row(
        "LLaMA 768x8, S = 128", "LlamaConfig", "LlamaForCausalLM", 3.3, 3.8, _LLAMA
    ),
    "decode": Row(
        "LLaMA 768x8, S = 1, past 256", "LlamaConfig", "LlamaForCausalLM", 2.5, 2.9, _LLAMA,
        kv_cache=True,
    ),
    "bert": Row("BERT-base, S = 128", "BertConfig", "BertModel", 3.3, 3.3),
    "minilm": Row("MiniLM-L6, S = 128", "BertConfig", "BertModel", 3.0, 3.0, _MINILM),
    "sparse-prefill": Row(
        "LLaMA 768x8, S = 128, 70 % zeros", "LlamaConfig", "LlamaForCausalLM", 4.3, 5.0, _LLAMA,
        passes=_SPARSE,
    ),
    "sparse-decode": Row(
        "LLaMA 768x8, S = 1, past 256, 70 % zeros", "LlamaConfig", "LlamaForCausalLM", 3.9, 4.5,
        _LLAMA, kv_cache=True, passes=_SPARSE,
    ),
    "sparse-cqil": Row(
        "LLaMA 512x12, S = 1, past 256, cqil p = 4, 70 % zeros", "LlamaConfig",
        "LlamaForCausalLM", 5.0, 6.0, _SMALL, kv_cache=True,
        passes="cqil:group=4;first=0;last=11," + _SPARSE,
    ),
    "sparse-deit": Row(
        "DeiT-S, 197 tokens, 70 % zeros", "ViTConfig", "ViTForImageClassification", 2.5, 3.1,
        _DEIT, passes=_SPARSE,
    ),
}  # fmt: skip


def export(row: Row, folder: Path, layers: int | None) -> tuple[Path, int]:
    """The export of a row's model, and its vocabulary."""
    import torch
    import transformers

    from optimizer.frontends import hugging_face, onnx_export

    torch.manual_seed(0)
    options = dict(row.options)
    if layers:
        options["num_hidden_layers"] = layers
    config = getattr(transformers, row.config)(**options)
    model = getattr(transformers, row.model)(config).eval()
    model.config.architectures = [row.model]
    plan = hugging_face.detect(model.config)
    exported = hugging_face.export_loaded(model, plan, kv_cache=row.kv_cache)
    vocabulary = int(getattr(config, "vocab_size", 2))
    return onnx_export.write(exported, folder / "original.onnx"), vocabulary


def feeds(path: Path, vocabulary: int, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Random prompts of the timed length, with an empty cache."""
    rng = np.random.default_rng(seed)
    specs = OrtRunner(path, optimize=False).inputs
    return [{spec.name: _array(spec, vocabulary, rng) for spec in specs} for _ in range(count)]


def _array(spec: Any, vocabulary: int, rng: np.random.Generator) -> np.ndarray:
    if spec.name.startswith("past"):
        return np.zeros((1, spec.shape[1], 0, spec.shape[3]), spec.dtype)
    if spec.name == "pixel_values":
        return rng.standard_normal((1, 3, 224, 224), dtype=np.float32)
    if spec.name == "input_ids":
        return rng.integers(0, vocabulary, (1, SEQUENCE))
    if spec.name == "position_ids":
        return np.arange(SEQUENCE)[None]
    return np.full((1, SEQUENCE), int(spec.name == "attention_mask"), np.int64)


def ours(
    row: Row, source: Path, data: list[dict[str, np.ndarray]], folder: Path, passes: str
) -> dict[str, Path]:
    """Our models by label."""
    forms = ("in-place", "append") if row.kv_cache else ("append",)
    result = {}
    for form in forms:
        label = f"{OURS}, cache {form}" if row.kv_cache else OURS
        path = folder / f"ours-{form}.onnx"
        optimize(
            source, passes, output=path, calibration=data, verify="off", kv_cache=form, force=True
        )
        result[label] = path
    return result


def errors(
    reference: list[np.ndarray], path: Path, data: list[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Relative L2 and cosine of the first output against the baseline's."""
    runner, meter = OrtRunner(path), DriftMeter()
    for expected, feed in zip(reference, data, strict=True):
        meter.update(expected, runner.run(_fitted(feed, runner))[runner.output_names[0]])
    drift = meter.result()
    return {"relative_l2": drift.relative_l2, "cosine": drift.cosine}


def _fitted(feed: dict[str, np.ndarray], runner: OrtRunner) -> dict[str, np.ndarray]:
    """A feed with an empty cache for a model whose cache has other shapes (cqil joins layers)."""
    rng = np.random.default_rng(0)
    return {
        spec.name: _array(spec, 2, rng) if spec.name.startswith("past") else feed[spec.name]
        for spec in runner.inputs
    }


def measure(key: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one row."""
    row = ROWS[key]
    folder.mkdir(parents=True, exist_ok=True)
    source, vocabulary = export(row, folder, arguments.layers)
    calibration = feeds(source, vocabulary, CALIBRATION, seed=1)
    held_out = feeds(source, vocabulary, HELD_OUT, seed=2)
    models, failures = {BASELINE: source}, {}
    passes = arguments.passes or row.passes
    models.update(ours(row, source, calibration, folder, passes))
    for number, name in enumerate(peers.PEERS):
        target = folder / f"peer-{number}.onnx"
        reason = peers.make(name, source, calibration, target)
        if reason is None:
            models[name] = target
        else:
            failures[name] = reason
    gc.collect()
    baseline = OrtRunner(source)
    reference = [baseline.run(feed)[baseline.output_names[0]] for feed in held_out]
    del baseline
    found = {}
    for name, path in list(models.items()):
        try:
            found[name] = errors(reference, path, held_out)
        except OptimizerError as error:
            failures[name] = str(error)
            del models[name]
    result = benchmark(
        list(models.values()),
        Setup(row.sizes(), threads=arguments.threads, vocabulary=vocabulary),
        labels=list(models),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    show(row, result, found, failures)
    sizes = {name: file_bytes(path) for name, path in models.items()}
    return {
        "title": row.title,
        "passes": passes,
        "required": row.required,
        "goal": row.goal,
        "speedup": max(t.speedup for t in result.timings if t.label.startswith(OURS)),
        "errors": found,
        "bytes": sizes,
        "failures": failures,
        **result.as_dict(),
    }


def show(
    row: Row, result: BenchmarkResult, found: Mapping[str, Any], failures: Mapping[str, str]
) -> None:
    """One row as text."""
    print(f"\n{row.title}: required {row.required}x, goal {row.goal}x, {result.threads} thread(s)")
    for timing in result.timings:
        error = found[timing.label]
        low, high = timing.interval
        print(
            f"  {timing.label:30} {timing.median_ms:8.2f} ms  {timing.speedup:5.2f}x "
            f"[{low:.2f}, {high:.2f}]  relative L2 {error['relative_l2']:.2e}  "
            f"cosine {error['cosine']:.6f}"
        )
    for name, reason in failures.items():
        print(f"  {name:30} failed: {reason}")
    sys.stdout.flush()


def main() -> None:
    """Measure the rows asked for and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="of: " + ", ".join(ROWS))
    parser.add_argument("--passes", help="what our models are made with, instead of the row's")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "speed.json")
    parser.add_argument("--work", type=Path, help="keep the models here")
    arguments = parser.parse_args()
    unknown = [key for key in arguments.rows.split(",") if key not in ROWS]
    if unknown:
        parser.error(f"there is no row '{unknown[0]}'; rows: {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        rows = {key: measure(key, arguments, folder / key) for key in arguments.rows.split(",")}
    if arguments.out.is_file():  # rows not measured now stay
        rows = {**json.loads(arguments.out.read_text())["rows"], **rows}
    write_result(arguments.out, {"rows": rows})
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
