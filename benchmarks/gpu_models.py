"""Whole models on a GPU: ONNX Runtime's CUDA provider on what the passes write, taking turns.

    python benchmarks/gpu_models.py --library liboptimize_ops_cuda.so [--models decoder,vit]

Models have random weights: a LLaMA with a KV cache, and ViT-B. Baselines are ONNX Runtime on the
export as it is (float32, with TF32), and on the same in float16, with all its optimizations. What
they compute says nothing about accuracy; that a GPU computes the same as a CPU is what
gpu_families.py checks, on smaller models. Inputs and outputs lie on the GPU. Every form is timed as
a session runs it, and replayed as a CUDA graph, which saves it what launching its kernels costs.
Needs ONNX Runtime for CUDA, and the extras ``torch`` and ``cpu``'s other packages; the library is
built as plugins/README.md says.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import speed
import tokens
from readme import replace_between

from optimizer.api import optimize
from optimizer.benchmark import write_result
from optimizer.environment import collect

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_models.json"
_70 = "sparsify:pattern=unstructured;sparsity=0.7;method=magnitude"
_24 = "sparsify:pattern=2:4;method=magnitude"
_FP16 = "fp16:io=cache"
_RUN = "sparse-matmul:force=true;tokens=1"
_WIDE = "cqil:group=4;first=0;last={last}"


@dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        options: Of its configuration; ``tiny`` replaces some of them to try the script out.
        cases: Rows, tokens of a run, and tokens of the cache before it.
        forms: Passes by label.
    """

    options: Mapping[str, Any]
    tiny: Mapping[str, Any]
    cases: Mapping[str, tuple[int, int, int]]
    forms: Mapping[str, str]


MODELS = {
    "decoder": Model(
        {
            "hidden_size": 1536, "num_attention_heads": 24, "num_key_value_heads": 8,
            "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 2048,
            "max_position_embeddings": 1024,
        },
        {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 192,
        },
        {"decode": (1, 1, 256), "decode, 8 rows": (8, 1, 256), "prefill": (1, 128, 0)},
        {
            "float16": _FP16,
            "cqil": f"{_WIDE},{_FP16}",
            "70 % zeros": f"{_70},{_FP16},{_RUN}",
            "70 % zeros, int8": f"{_70},{_FP16},{_RUN};precision=int8",
            "2:4": f"{_24},{_FP16},{_RUN}",
            "cqil, 2:4": f"{_WIDE},{_24},{_FP16},{_RUN}",
        },
    ),
    "vit": Model(
        {"width": 768, "heads": 12},
        {"width": 192, "heads": 3, "layers": 2},
        {"1 image": (1, 0, 0), "32 images": (32, 0, 0)},
        {
            "float16": "fp16",
            "tome r = 8": "tome:r=8,fp16",
            "tome r = 16": "tome:r=16,fp16",
            "prune-tokens r = 16": "prune-tokens:r=16,fp16",
            "outliertune": "outliertune:force=true,fp16",
        },
    ),
}  # fmt: skip
BEGIN, END = "<!-- gpu: benchmarks/gpu_models.py --table README.md -->", "<!-- end of gpu -->"
ROUNDS, RUNS = 15, 8


def export(name: str, folder: Path, *, tiny: bool) -> Path:
    """The export of a model."""
    model = MODELS[name]
    options = {**model.options, **(model.tiny if tiny else {})}
    if name == "vit":
        return tokens.export(tokens.Shape(**options), folder)
    row = speed.Row("decoder", "LlamaConfig", "LlamaForCausalLM", 1, 1, options, kv_cache=True)
    return speed.export(row, folder, None)[0]


def write(source: Path, passes: str, target: Path, layers: int) -> None:
    """One form."""
    calibration = None
    if "outliertune" in passes:
        on_cpu = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
        calibration = feed_for(on_cpu, (1, 16, 0), seed=1)
    optimize(
        source, passes.format(last=layers - 1), target="ort-cuda", output=target, verify="off",
        calibration=calibration,
    )  # fmt: skip


def session(
    path: Path, provider: str, library: Path | None, *, graph: bool = False
) -> ort.InferenceSession:
    """A session that must run on the provider."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    device = (provider, {"enable_cuda_graph": "1"}) if graph else provider
    made = ort.InferenceSession(str(path), options, providers=[device, "CPUExecutionProvider"])
    if provider not in made.get_providers():
        msg = f"ONNX Runtime {ort.__version__} does not run on {provider} here"
        raise SystemExit(msg)
    return made


def feed_for(
    made: ort.InferenceSession, case: tuple[int, int, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Random images, or tokens behind a random cache."""
    (rows, count, past), rng = case, np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    for value in made.get_inputs():
        dtype = np.float16 if "float16" in value.type else np.float32
        if value.name == "pixel_values":
            feed[value.name] = rng.standard_normal((rows, 3, 224, 224)).astype(dtype)
        elif value.name.startswith("past"):
            shape = (rows, value.shape[1], past, value.shape[3])
            feed[value.name] = rng.standard_normal(shape).astype(dtype)
        elif value.name == "position_ids":
            feed[value.name] = np.tile(np.arange(past, past + count), (rows, 1))
        elif value.name == "attention_mask":
            feed[value.name] = np.ones((rows, past + count), np.int64)
        else:
            feed[value.name] = rng.integers(0, 64, (rows, count))
    return feed


def bound(
    made: ort.InferenceSession,
    feed: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    device: str,
) -> Any:
    """Everything lies on the device: the inputs, and room for outputs such as these."""
    binding = made.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for name, array in outputs.items():
        place = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, device, 0)
        binding.bind_ortvalue_output(name, place)
    return binding


def latency(bindings: Mapping[str, tuple[Any, Any]]) -> dict[str, list[float]]:
    """Microseconds of a run, round after round; the sessions take turns."""
    times: dict[str, list[float]] = {name: [] for name in bindings}
    for turn in range(ROUNDS + 2):
        for name, (made, binding) in bindings.items():
            start = time.perf_counter()
            for _ in range(RUNS):
                made.run_with_iobinding(binding)
            binding.synchronize_outputs()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) / RUNS * 1e6)
    return times


def measure_case(
    paths: Mapping[str, Path], case: tuple[int, int, int], provider: str, library: Path | None
) -> list[dict[str, Any]]:
    """Rows of one case: time of a run, time as a CUDA graph."""
    device = "cuda" if provider.startswith("CUDA") else "cpu"
    rows: dict[str, dict[str, Any]] = {label: {"form": label} for label in paths}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for graph in (False, True) if device == "cuda" else (False,):
        bindings = {}
        for label, path in paths.items():
            sparse = library if "zeros" in label or "2:4" in label else None
            try:
                made = session(path, provider, sparse, graph=graph)
                feed = feed_for(made, case)
                if not graph:
                    names = [value.name for value in made.get_outputs()]
                    outputs[label] = dict(zip(names, made.run(None, feed), strict=True))
                binding = bound(made, feed, outputs[label], device)
                for _ in range(3):  # a graph is captured by the second or third
                    made.run_with_iobinding(binding)
                bindings[label] = made, binding
            except Exception as error:
                rows[label]["no graph" if graph else "failed"] = str(error)[-300:]
        key = "graph_us" if graph else "us"
        for label, values in latency(bindings).items():
            rows[label][key] = statistics.median(values)
            rows[label][f"spread_{key}"] = [min(values), max(values)]
    return list(rows.values())


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases of a model."""
    model = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    source = export(name, folder, tiny=arguments.tiny)
    paths = {label: folder / f"{i}.onnx" for i, label in enumerate(model.forms)}
    layers = int(model.options.get("num_hidden_layers", 0))
    with concurrent.futures.ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {
            label: pool.submit(write, source, passes, paths[label], layers)
            for label, passes in model.forms.items()
        }
        for label, job in jobs.items():
            job.result()
            print(f"{name} {label}: written", flush=True)
    cases = {}
    for label, case in model.cases.items():
        rows = measure_case(
            {"original": source, **paths}, case, arguments.provider, arguments.library
        )
        cases[label] = rows
        base = rows[0]
        for row in rows:
            words = [f"{name}, {label}: {row['form']:20}"]
            words += [
                f"{row[key]:8.0f} us {base[key] / row[key]:5.2f}x"
                for key in ("us", "graph_us")
                if key in row and key in base
            ]
            words += [f"{k}: {row[k][:150]}" for k in ("failed", "no graph") if k in row]
            print("  ".join(words), flush=True)
    return {"options": dict(model.options), "forms": dict(model.forms), "cases": cases}


def table(content: Mapping[str, Any]) -> str:
    """How many times as fast as the export each form is; in brackets, as CUDA graphs."""
    lines = []
    for name, model in content["models"].items():
        cases = model["cases"]
        lines += [
            f"| {name} | {' | '.join(cases)} |",
            f"|---|{'---|' * len(cases)}",
        ]
        forms = [row["form"] for row in next(iter(cases.values()))]
        for number, form in enumerate(forms):
            cells = [_cell(rows[number], rows[0]) for rows in cases.values()]
            lines.append(f"| {form} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"{', '.join(content['gpus'])}, ONNX Runtime {content['onnxruntime']}, {content['date']}."
    )
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Of the first row the milliseconds, of the others how many times as fast."""
    words = []
    for key in ("us", "graph_us"):
        if key in row and key in base:
            ratio = f"{base[key] / row[key]:.2f}x"
            words.append(f"{row[key] / 1000:.2f} ms" if row is base else ratio)
    return f"{words[0]} ({words[1]})" if len(words) > 1 else "".join(words) or "failed"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="liboptimize_ops_cuda.so")
    parser.add_argument("--models", default=",".join(MODELS), help="of: " + ", ".join(MODELS))
    parser.add_argument("--provider", default="CUDAExecutionProvider")
    parser.add_argument("--workers", type=int, default=4, help="that write models")
    parser.add_argument("--tiny", action="store_true", help="small models, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, help="write the table of --out into this file")
    arguments = parser.parse_args()
    if arguments.table:
        content = json.loads(arguments.out.read_text("utf-8"))
        replace_between(arguments.table, BEGIN, END, table(content))
        return
    result: dict[str, Any] = {
        "provider": arguments.provider,
        "onnxruntime": ort.__version__,
        "gpus": [gpu.name for gpu in collect().nvidia.gpus],
        "date": time.strftime("%Y-%m-%d"),
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models.split(","):
            found = measure(name, Path(folder) / name, arguments)
            result["models"][name] = found
            write_result(arguments.out, result)


if __name__ == "__main__":
    main()
