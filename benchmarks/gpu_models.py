"""Whole decoders on a GPU: ONNX Runtime's CUDA provider on what the passes write, taking turns.

    python benchmarks/gpu_models.py --library liboptimize_ops_cuda.so [--out FILE.json]

The model is a LLaMA with random weights, exported with a KV cache. Baselines are ONNX Runtime on
the export as it is (float32), and on the same in float16, with all its optimizations. Weights of
sparse forms are pruned by magnitude, which tells nothing about accuracy: what is compared is the
operator with its own body, on the same GPU. Every run is timed with its inputs and outputs on the
GPU. Needs ONNX Runtime for CUDA, and the extras ``torch`` and ``cpu``'s other packages; the library
is built as plugins/README.md says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from speed import Row, export

from optimizer.api import optimize
from optimizer.benchmark import write_result

HOME = Path(__file__).resolve().parent
LLAMA = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
TINY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
_70 = "sparsify:pattern=unstructured;sparsity=0.7;method=magnitude,fp16,sparse-matmul:force=true"
_24 = "sparsify:pattern=2:4;method=magnitude,fp16,sparse-matmul:force=true"
FORMS = {
    "float16": "fp16",
    "70 % zeros": _70,
    "70 % zeros, int8": f"{_70};precision=int8",
    "2:4": _24,
    "2:4, int8": f"{_24};precision=int8",
}
#: Tokens of a run, and of the cache before it.
CASES = {"decode": (1, 256), "prefill": (128, 0)}
ROUNDS, RUNS = 15, 8


def session(path: Path, provider: str, library: Path | None) -> ort.InferenceSession:
    """A session that must run on the provider."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    made = ort.InferenceSession(str(path), options, providers=[provider, "CPUExecutionProvider"])
    if provider not in made.get_providers():
        msg = f"ONNX Runtime {ort.__version__} does not run on {provider} here"
        raise SystemExit(msg)
    return made


def feed_for(made: ort.InferenceSession, tokens: int, past: int) -> dict[str, np.ndarray]:
    """Random tokens behind a random cache."""
    rng = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for value in made.get_inputs():
        dtype = np.float16 if "float16" in value.type else np.float32
        if value.name.startswith("past"):
            shape = (1, value.shape[1], past, value.shape[3])
            feed[value.name] = rng.standard_normal(shape).astype(dtype)
        elif value.name == "position_ids":
            feed[value.name] = np.arange(past, past + tokens)[None]
        elif value.name == "attention_mask":
            feed[value.name] = np.ones((1, past + tokens), np.int64)
        else:
            feed[value.name] = rng.integers(0, 64, (1, tokens))
    return feed


def bound(made: ort.InferenceSession, feed: dict[str, np.ndarray], device: str) -> Any:
    """Everything lies on the device; ONNX Runtime makes the outputs there."""
    binding = made.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for value in made.get_outputs():
        binding.bind_output(value.name, device, 0)
    return binding


def latency(sessions: dict[str, Any], device: str, case: tuple[int, int]) -> dict[str, list[float]]:
    """Microseconds of a run, round after round; the sessions take turns."""
    bindings = {
        name: (made, bound(made, feed_for(made, *case), device)) for name, made in sessions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(ROUNDS + 2):
        for name, (made, binding) in bindings.items():
            start = time.perf_counter()
            for _ in range(RUNS):
                made.run_with_iobinding(binding)
            binding.synchronize_outputs()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) / RUNS * 1e6)
    return times


def error(ours: Any, plain: Any, case: tuple[int, int]) -> float:
    """Relative L2 distance of the first output, the operator's from its body's."""
    feed = feed_for(ours, *case)
    found, wanted = (made.run(None, feed)[0].astype(np.float64) for made in (ours, plain))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="liboptimize_ops_cuda.so")
    parser.add_argument("--provider", default="CUDAExecutionProvider")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try it out")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "gpu_models.json")
    arguments = parser.parse_args()
    device = "cuda" if arguments.provider.startswith("CUDA") else "cpu"
    options = TINY if arguments.tiny else LLAMA
    result: dict[str, Any] = {"model": options, "provider": arguments.provider, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = Row("decoder", "LlamaConfig", "LlamaForCausalLM", 1, 1, options, kv_cache=True)
        source, _ = export(row, folder, None)
        paths = {"original": source}
        for label, passes in FORMS.items():
            paths[label] = folder / f"{len(paths)}.onnx"
            optimize(source, passes, target="ort-cuda", output=paths[label], verify="off")
            print(f"{label}: written", flush=True)
        sparse = {label for label, passes in FORMS.items() if "sparse-matmul" in passes}
        sessions = {
            label: session(path, arguments.provider, arguments.library if label in sparse else None)
            for label, path in paths.items()
        }
        for label in sparse if arguments.library else ():
            plain = session(paths[label], arguments.provider, None)
            found = {case: error(sessions[label], plain, sizes) for case, sizes in CASES.items()}
            result.setdefault("relative L2, operator from body", {})[label] = found
            print(label, found, flush=True)
        for case, sizes in CASES.items():
            times = latency(sessions, device, sizes)
            base = statistics.median(times["float16"])
            for label, values in times.items():
                median = statistics.median(values)
                spread = [min(values), max(values)]
                result["rows"].append(
                    {
                        "case": case,
                        "form": label,
                        "us": median,
                        "spread_us": spread,
                        "vs float16": base / median,
                    }
                )
                print(f"{case} {label}: {median:.0f} us, {base / median:.2f}x float16", flush=True)
            write_result(arguments.out, result)


if __name__ == "__main__":
    main()
