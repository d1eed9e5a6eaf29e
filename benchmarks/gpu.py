"""All that only a GPU can tell, in one command: kernels, operators, families and whole models.

    python benchmarks/gpu.py [--only check|bench|models] [--time-limit 200] [--out FILE.json]
                             [--calibrate CLASS]
    python benchmarks/gpu.py --emulate --only check    # on the CPU, without CUDA

CUDA kernels of SparseMatMul need nvcc, a GPU, PyTorch with CUDA and numpy, nothing else. First
each layout must give back a known weight exactly (a probe of fragments and metadata). Then results
are compared with float64: their error may be twice that of the plain product in the same precision,
and a rounding. Layouts that pass are timed against cuBLAS (and torch's semi-structured product,
where there is one), taking turns, on as many copies of a weight as no cache holds. The file of
results is written after every row. Then, where ONNX Runtime has its CUDA provider and cmake is
there, small models of every family are compared with the CPU (gpu_families.py), and whole models
timed (gpu_models.py); both need the extra ``test`` beside it. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cuda_library
import torch
from gpu_bench import bench
from gpu_weights import INT8, NAMES, Sparse, random_weight

HOME = Path(__file__).resolve().parent
FIGURES = HOME.parent / "optimizer" / "sparse_figures.json"
LAYOUTS = ("mma16", "mma8", "sp16", "sp8")
ACTIVATIONS = {
    0: lambda v: v,
    1: torch.relu,
    2: torch.nn.functional.gelu,
    3: lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    4: torch.nn.functional.silu,
}
SHAPES = ((64, 64), (1, 1), (70, 130), (257, 100), (1000, 333), (4096, 512))
TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 65, 200)
FLOOR = 1e-12
ONE_MORE_US = 2.0  # a kernel that adds up the splits


def build(folder: Path) -> Any:
    """The kernels for the GPU that is present."""
    major, minor = torch.cuda.get_device_capability()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-Werror", "all-warnings"]
    flags += ["-Xcompiler", "-fPIC"]
    link = [nvcc, "-shared", "-cudart", "static"]
    return cuda_library.load(cuda_library.compile_all([nvcc, *flags], folder, link))


def densities(layout: str) -> tuple[float | str, ...]:
    """Those that are checked."""
    return ("2:4",) if layout.startswith("sp") else (0.0, 0.02, 0.3, 0.5, 1.0)


def weight_for(
    layout: str, shape: tuple[int, int], density: float | str, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """Random numbers of the type that the layout stores."""
    generator = torch.Generator().manual_seed(seed)
    return random_weight(shape, density, torch.int8 if layout in INT8 else dtype, generator)


def probe(lib: Any, device: str) -> dict[str, str]:
    """Whether x = 1 gives back every weight: that lanes, fragments and metadata are understood.

    A layout of which this is not true is neither checked further nor timed.
    """
    verdicts = {}
    for layout in LAYOUTS:
        density = densities(layout)[-1]
        weight = weight_for(layout, (128, 192), density, torch.float16, 1)
        sparse = Sparse.of(lib, weight, layout, torch.float16, device)
        if layout in INT8:
            # x of 1 has the code 127, of step 1 / 127; then W comes back as it is, times 1
            sparse.arrays["scale"].fill_(1)
        wrong = []
        for x in torch.eye(128, device=device, dtype=torch.float16).split((16, 112)):
            y = torch.full((len(x), 192), float("nan"), device=device, dtype=torch.float16)
            sparse(x, y, sparse.workspace(len(x)))
            expected = weight[:16] if len(x) == 16 else weight[16:]
            bad = (y.cpu() != expected.to(torch.float16)).nonzero()
            wrong += [f"{len(bad)} of {y.numel()}, first {bad[0].tolist()}"] if len(bad) else []
        verdicts[layout] = "; ".join(wrong) or "right"
        print(f"probe {layout}: {verdicts[layout]}", flush=True)
    return verdicts


def exact_and_naive(
    sparse: Sparse, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y in float64, and as the same precision gives it without any trick."""
    act = ACTIVATIONS[kind]
    added = 0 if bias is None else bias.double()
    if sparse.layout in INT8:
        steps = x.float().abs().amax(1, keepdim=True).clamp_min(FLOOR) / 127
        codes = (x.float() * (1 / steps)).round().clamp(-128, 127)
        sums, scale = codes.double() @ weight.double(), sparse.arrays["scale"]
        exact = act(sums * steps.double() * scale.double() + added)
        naive = sums.float() * steps * scale + (0 if bias is None else bias.float())
        return exact, act(naive).to(x.dtype)
    exact = act(x.double() @ weight.double() + added)
    naive = (x @ weight) if bias is None else (x @ weight) + bias
    return exact, act(naive.float())


def check_one(sparse: Sparse, weight: torch.Tensor, tokens: int, number: int, device: str) -> float:
    """The error as a share of what is allowed.

    Raises:
        AssertionError: It is beyond, or something was written outside of y.
    """
    (k, n), dtype = sparse.shape, sparse.dtype
    x = torch.randn(tokens, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype) if number % 2 else None
    kind, edge = number % 5, 64
    whole = torch.full((tokens * n + 2 * edge,), float("nan"), device=device, dtype=dtype)
    y = whole[edge : edge + tokens * n].view(tokens, n)
    sparse(x, y, sparse.workspace(tokens), kind, bias)
    if device == "cuda":
        torch.cuda.synchronize()
    exact, naive = exact_and_naive(sparse, weight, x, bias, kind)
    ours = (y.double() - exact).abs().max().item()
    theirs = (naive.double() - exact).abs().max().item()
    # one rounding to the type of y is allowed to either
    allowed = 2 * theirs + torch.finfo(dtype).eps * max(exact.abs().max().item(), 1e-3)
    case = f"{sparse.layout} {NAMES[dtype]} [{k}, {n}], {tokens} tokens, activation {kind}"
    assert ours <= allowed, f"{case}: error {ours}, allowed {allowed}"  # NaN fails too
    outside = torch.cat([whole[:edge], whole[edge + tokens * n :]])
    assert outside.isnan().all(), f"{case}: wrote outside of y"
    return ours / allowed


def check(lib: Any, device: str, layouts: list[str], *, tiny: bool) -> dict[str, Any]:
    """Random shapes with tails, all activations and types; {layout: cases, worst share}."""
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for layout in layouts:
        count, worst = 0, 0.0
        try:
            for shape in SHAPES[: 4 if tiny else None]:
                for density in densities(layout)[-3 if tiny else 0 :]:
                    for dtype in NAMES:
                        weight = weight_for(layout, shape, density, dtype, count)
                        sparse = Sparse.of(lib, weight, layout, dtype, device)
                        on_device = weight.to(device)
                        for tokens in TOKENS[:: 3 if tiny else 1]:
                            share = check_one(sparse, on_device, tokens, count, device)
                            worst, count = max(worst, share), count + 1
            results[layout] = {"cases": count, "worst_share_of_the_bound": worst}
        except AssertionError as error:
            results[layout] = {"cases": count, "failed": str(error)}
        print(f"check {layout}: {results[layout]}", flush=True)
    return results


def sanitize() -> Any:
    """The small checks again under compute-sanitizer, where it works."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    command = [tool, "--error-exitcode", "9", sys.executable, __file__, "--only", "check", "--tiny"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "took more than 120 s"
    return {"rc": run.returncode, "tail": (run.stdout + run.stderr)[-300:]}


def calibrate(rows: list[dict[str, Any]], name: str) -> None:
    """Write the cost model's figures: [K, N, tokens, density, vs float16, vs int8].

    Against int8 only int8 is measured; the other kinds are not judged by it. What runs the model
    has no ``arrivals``, unlike what is timed here, and needs one more kernel for few tokens.
    """
    data = json.loads(FIGURES.read_text("utf-8"))
    data["classes"][name] = {
        layout: [
            [*row["shape"], row["tokens"],
             0.5 if row["zeros"] == "2:4" else round(1 - row["zeros"], 4),
             *(round(row[dense] / (row["sparse_us"] + ONE_MORE_US), 2)
               for dense in ("cublas_us", "cublas_int8_us" if layout in INT8 else "cublas_us"))]
            for row in rows if row["layout"] == layout
        ]
        for layout in LAYOUTS
    }  # fmt: skip
    FIGURES.write_text(json.dumps(data) + "\n", "utf-8")


def models() -> dict[str, Any]:
    """Families and whole models in ONNX Runtime's CUDA provider; exit codes, or why not."""
    try:
        import onnxruntime
    except ImportError:
        return {"skipped": "ONNX Runtime is not installed"}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return {"skipped": f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider"}
    if shutil.which("cmake") is None:
        return {"skipped": "cmake is not installed"}
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        configure = ["cmake", "-S", str(HOME.parent / "plugins"), "-B", folder]
        configure += ["-DOPTIMIZE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"]
        subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release"], check=True)
        subprocess.run(
            ["cmake", "--build", folder, "--target", "optimize_ops_cuda", "-j"], check=True
        )
        (library,) = Path(folder).rglob("liboptimize_ops_cuda.so")
        small = Path(folder) / "families"
        commands = {
            "written": ["gpu_families.py", "--write", str(small), "--workers", "8"],
            "families": ["gpu_families.py", str(small), "--library", str(library)],
            "models": ["gpu_models.py", "--library", str(library)],
        }
        return {
            name: subprocess.run(
                [sys.executable, str(HOME / script), *words], check=False
            ).returncode
            for name, (script, *words) in commands.items()
        }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("check", "bench", "models"))
    parser.add_argument("--tiny", action="store_true", help="few checks, nothing written")
    parser.add_argument("--emulate", action="store_true", help="checks on the CPU, nothing written")
    parser.add_argument("--time-limit", type=float, default=200, help="seconds")
    parser.add_argument("--calibrate", metavar="CLASS", help="write the cost model of this GPU, as")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "gpu.json")
    arguments = parser.parse_args()
    if arguments.emulate and arguments.only != "check":
        parser.error("--emulate says nothing about speed: give --only check")
    deadline = time.monotonic() + arguments.time_limit
    device = "cpu" if arguments.emulate else "cuda"
    if arguments.only == "models":
        found = models()
        print(found, flush=True)
        return int(any(found.values()))
    results: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if not arguments.emulate:
        results |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}

    def save() -> None:
        if not arguments.tiny and not arguments.emulate:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")

    with tempfile.TemporaryDirectory() as folder:
        if arguments.emulate:
            made = cuda_library.build_emulated(Path(folder), cuda_library.cxx() or "c++")
            lib = cuda_library.load(made)
        else:
            lib = build(Path(folder))
        print(results, flush=True)
        results["probe"] = probe(lib, device)
        right = [layout for layout, verdict in results["probe"].items() if verdict == "right"]
        failed = len(right) < len(LAYOUTS)
        if arguments.only != "bench":
            results["check"] = check(lib, device, right, tiny=arguments.tiny)
            right = [layout for layout in right if "failed" not in results["check"][layout]]
            failed |= len(right) < len(LAYOUTS)
            save()
        if arguments.only != "check":
            bench(lib, right, results, save, deadline)
            results["sanitizer"] = sanitize()
            print("compute-sanitizer:", results["sanitizer"], flush=True)
            save()
            if arguments.calibrate:
                calibrate(results["rows"], arguments.calibrate)
            if arguments.only is None and not arguments.tiny:
                results["models"] = models()
                save()
                failed |= any(results["models"].values()) and "skipped" not in results["models"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
