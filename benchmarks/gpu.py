"""CUDA kernels of SparseMatMul: built, checked and timed on this machine's GPU, in one command.

    python benchmarks/gpu.py [--only check|bench] [--time-limit 200] [--out FILE.json]

Needs nvcc, a GPU, and PyTorch with CUDA; nothing of the package has to be installed. Results are
compared with float64, their error with that of cuBLAS in the same precision; then sparse products
of few tokens are timed against cuBLAS, taking turns, on as many copies of a weight as no cache
holds. The file of results is written after every row.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parent
SOURCES = HOME.parent / "plugins" / "sparse_matmul" / "cuda"
LANES = (8, 4, 4, 4, 2, 2, 2)
PERM = (2, 4, 1, 6, 3, 5, 0)
MMA16 = 16
TYPES = {torch.float16: 0, torch.bfloat16: 1}
ACTIVATIONS = {
    0: lambda v: v,
    1: torch.relu,
    2: torch.nn.functional.gelu,
    3: lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    4: torch.nn.functional.silu,
}
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (4096, 14336))
ZEROS = (0.5, 0.6, 0.7, 0.8)
TOKENS = (1, 4, 8, 16)
CACHE = 400e6  # bytes of dense copies: more than the second-level cache of any GPU


def build(folder: Path) -> ctypes.CDLL:
    """The kernels for the GPU that is present."""
    major, minor = torch.cuda.get_device_capability()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    library = folder / "liboptimize_ops_cuda.so"
    command = [
        nvcc, "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-Werror", "all-warnings",
        "-Xcompiler", "-fPIC", "-shared", "-cudart", "static", "-o", str(library),
        *map(str, sorted(SOURCES.glob("*.cu"))),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    lib = ctypes.CDLL(str(library))
    i64, i32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    lib.optimize_cuda_workspace.argtypes, lib.optimize_cuda_workspace.restype = [i64] * 3, i64
    lib.optimize_cuda_run.restype = ctypes.c_char_p
    lib.optimize_cuda_run.argtypes = [
        i64, i64, i32, i32, i32, *[pointer] * 5, i64, pointer, pointer, pointer,
    ]  # fmt: skip
    return lib


class Sparse:
    """A weight [K, N] in the layout mma16 on the GPU (optimizer/custom_ops/cuda_layout.py)."""

    def __init__(self, lib: ctypes.CDLL, weight: torch.Tensor) -> None:
        self.lib, (self.k, self.n), self.type = lib, weight.shape, TYPES[weight.dtype]
        rows, columns = -(-self.k // 64), -(-self.n // 64)
        padded = torch.nn.functional.pad(weight, (0, columns * 64 - self.n, 0, rows * 64 - self.k))
        tiles = padded.view(rows, 64, columns, 64).permute(2, 0, 1, 3).reshape(-1, 64 * 64)
        turned = [LANES[i] for i in PERM]
        back = [1 + PERM.index(i) for i in range(len(PERM))]
        flat = tiles.view(-1, *turned).permute(0, *back).reshape(-1, 4096)
        stored = flat != 0
        counts = (stored.sum(1) + 7) // 8 * 8
        zero = torch.zeros(1, dtype=torch.int64, device=weight.device)
        offsets = torch.cat([zero, counts.cumsum(0)])
        places = offsets[:-1, None] + stored.cumsum(1) - 1
        self.values = torch.zeros(
            max(int(offsets[-1]), 8), dtype=weight.dtype, device=weight.device
        )
        self.values[places[stored]] = flat[stored]
        powers = 2 ** torch.arange(8, device=weight.device)
        self.bitmap = (stored.view(-1, 512, 8) * powers).sum(2).to(torch.uint8)
        self.offsets = offsets.to(torch.int32)

    def copy(self) -> Sparse:
        """The same in other memory."""
        made = object.__new__(Sparse)
        made.__dict__.update(self.__dict__)
        for name in ("values", "bitmap", "offsets"):
            setattr(made, name, getattr(self, name).clone())
        return made

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.bitmap, self.offsets))

    def workspace(self, tokens: int) -> torch.Tensor:
        """Scratch for a call."""
        size = self.lib.optimize_cuda_workspace(self.k, self.n, tokens)
        return torch.empty(max(size, 256), dtype=torch.uint8, device="cuda")

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, scratch: torch.Tensor, kind: int = 0,
        bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Y = activation(x W + bias) on the current stream."""
        error = self.lib.optimize_cuda_run(
            self.k, self.n, MMA16, self.type, kind, self.bitmap.data_ptr(), self.values.data_ptr(),
            self.offsets.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr(),
            x.shape[0], y.data_ptr(), scratch.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(error.decode())


def random_weight(k: int, n: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers and a random mask."""
    weight = torch.randn(k, n, device="cuda") / max(1.0, (k * density) ** 0.5)
    return (weight * (torch.rand(k, n, device="cuda") < density)).to(dtype)


def check(lib: ctypes.CDLL, results: dict[str, Any], *, tiny: bool) -> None:
    """Random shapes with tails, all activations and types, against float64."""
    torch.manual_seed(0)
    shapes = [(64, 64), (1, 1), (70, 130), (257, 100), (1000, 333), (4096, 512)]
    count, worst = 0, 0.0
    for k, n in shapes[: 3 if tiny else None]:
        for density in (0.0, 0.02, 0.3, 0.5, 1.0):
            for dtype in TYPES:
                weight = random_weight(k, n, density, dtype)
                sparse = Sparse(lib, weight)
                for tokens in (1, 2, 7, 8, 9, 16, 17, 33):
                    x = torch.randn(tokens, k, device="cuda").to(dtype)
                    bias = torch.randn(n, device="cuda").to(dtype) if tokens % 2 else None
                    kind = (tokens + k) % 5
                    whole = torch.full(
                        (tokens * n + 128,), float("nan"), device="cuda", dtype=dtype
                    )
                    y = whole[64 : 64 + tokens * n].view(tokens, n)
                    sparse(x, y, sparse.workspace(tokens), kind, bias)
                    torch.cuda.synchronize()
                    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
                    naive = (x @ weight) if bias is None else (x @ weight) + bias
                    exact, naive = ACTIVATIONS[kind](exact), ACTIVATIONS[kind](naive.float())
                    ours = (y.double() - exact).abs().max().item()
                    theirs = (naive.double() - exact).abs().max().item()
                    # one rounding to the type of y is allowed to either
                    eps = torch.finfo(dtype).eps * max(exact.abs().max().item(), 1e-3)
                    assert ours <= 2 * theirs + eps, (k, n, density, dtype, tokens, ours, theirs)
                    edge = torch.cat([whole[:64], whole[64 + tokens * n :]])
                    assert edge.isnan().all(), ("wrote outside of y", k, n, tokens)
                    worst = max(worst, ours / (2 * theirs + eps))
                    count += 1
    results["check"] = {"cases": count, "worst_share_of_the_bound": worst}
    print(
        f"checked {count} products; the worst error is {worst:.2f} of what is allowed", flush=True
    )


def timed(calls: list[Any], repeats: int) -> list[float]:
    """Microseconds per call, from a CUDA graph of all calls."""
    torch.cuda.synchronize()  # what is read was made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times[2:]


def bench(lib: ctypes.CDLL, results: dict[str, Any], save: Any, deadline: float) -> None:
    """Few tokens: sparse against cuBLAS."""
    rows = results.setdefault("decode", [])
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copies = timed([lambda a=source, b=target: b.copy_(a)] * 4, 12)
    bandwidth = 2 * source.numel() / statistics.median(copies) / 1e3
    results["copy_GBps"] = bandwidth
    del source, target
    print(f"copy: {bandwidth:.0f} GB/s", flush=True)
    for k, n in SHAPES:
        number = max(2, round(CACHE / (2 * k * n)))
        for zeros in ZEROS:
            if time.monotonic() > deadline:
                results["stopped"] = "time limit"
                return
            weight = random_weight(k, n, 1 - zeros, torch.float16)
            first = Sparse(lib, weight)
            sparse = [first, *(first.copy() for _ in range(number - 1))]
            dense = [weight, *(weight.clone() for _ in range(number - 1))]
            line = f"{k}x{n} {zeros:.0%} zeros:"
            for tokens in TOKENS:
                x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
                y = torch.empty(tokens, n, device="cuda", dtype=torch.float16)
                scratch = first.workspace(tokens)
                ours = timed([functools.partial(s, x, y, scratch) for s in sparse], 22)
                base = timed([functools.partial(torch.matmul, x, w, out=y) for w in dense], 22)
                low, high = statistics.median(base), statistics.median(ours)
                rate = first.nbytes / high / 1e3
                rows.append(
                    {"shape": [k, n], "zeros": zeros, "tokens": tokens, "cublas_us": low,
                     "sparse_us": high, "speedup": low / high, "spread_us": [min(ours), max(ours)],
                     "GBps": rate, "of_copy": rate / bandwidth,
                     "limit": 2 * k * n / first.nbytes}
                )  # fmt: skip
                line += f"  M={tokens} {low:.1f}/{high:.1f} us = {low / high:.2f}x"
            print(f"{line}  (bytes {2 * k * n / first.nbytes:.2f}x, {rate:.0f} GB/s)", flush=True)
            save()


def sanitize(results: dict[str, Any]) -> None:
    """The small checks again under compute-sanitizer, where it works."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        results["sanitizer"] = "not installed"
        return
    command = [tool, "--error-exitcode", "9", sys.executable, __file__, "--only", "check", "--tiny"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        tail = (run.stdout + run.stderr)[-300:]
        results["sanitizer"] = {"rc": run.returncode, "tail": tail}
    except subprocess.TimeoutExpired:
        results["sanitizer"] = "took more than 90 s"
    print("compute-sanitizer:", results["sanitizer"], flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("check", "bench"))
    parser.add_argument("--tiny", action="store_true", help="few checks, nothing written")
    parser.add_argument("--time-limit", type=float, default=200, help="seconds")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "gpu.json")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.time_limit
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip

    def save() -> None:
        if not arguments.tiny:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")

    with tempfile.TemporaryDirectory() as folder:
        lib = build(Path(folder))
        print(results, flush=True)
        if arguments.only != "bench":
            check(lib, results, tiny=arguments.tiny)
            save()
        if arguments.only != "check":
            bench(lib, results, save, deadline)
            save()
            sanitize(results)
            save()


if __name__ == "__main__":
    main()
