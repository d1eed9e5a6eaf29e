"""CUDA kernels of SparseMatMul: built, checked and timed on this machine's GPU, in one command.

    python benchmarks/gpu.py [--only check|bench] [--time-limit 200] [--out FILE.json]

Needs nvcc, a GPU, and PyTorch with CUDA; nothing of the package has to be installed. Results are
compared with float64, their error with that of cuBLAS in the same precision. Then sparse products
are timed against cuBLAS, taking turns, on as many copies of a weight as no cache holds: layout
mma16 (unstructured) and sp16 (2:4) for few tokens, sp16 for many, and there PyTorch's own 2:4
product (cuSPARSELt or CUTLASS) where it works. The file of results is written after every row.
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
#: As in optimizer/custom_ops/cuda_layout.py: number of the layout, dimensions, permutation.
LAYOUTS = {
    "mma16": (16, (4, 4, 2, 8, 4, 4), (4, 1, 5, 0, 2, 3)),
    "mma8": (17, (4, 2, 2, 2, 8, 4, 4), (1, 2, 5, 6, 0, 3, 4)),
    "sp16": (18, (2, 4, 2, 2, 8, 4, 4), (0, 2, 5, 6, 1, 3, 4)),
}
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
MANY = (128, 512, 2048)
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
    lib.optimize_cuda_workspace.argtypes = [i64, i64, i32, i64]
    lib.optimize_cuda_workspace.restype = i64
    lib.optimize_cuda_run.restype = ctypes.c_char_p
    lib.optimize_cuda_run.argtypes = [
        i64, i64, i32, i32, i32, *[pointer] * 7, i64, pointer, pointer, pointer,
    ]  # fmt: skip
    return lib


class Sparse:
    """A weight [K, N] in a layout on the GPU (optimizer/custom_ops/cuda_layout.py).

    mma8 takes codes, int8, with one scale [N] per column; x and y are float16 then.
    """

    def __init__(
        self, lib: ctypes.CDLL | None, weight: torch.Tensor, layout: str = "mma16",
        scale: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.lib, (self.k, self.n), self.scale = lib, weight.shape, scale
        self.type = TYPES.get(weight.dtype, TYPES[torch.float16])
        self.layout, dims, perm = LAYOUTS[layout]
        rows, columns = -(-self.k // 64), -(-self.n // 64)
        padded = torch.nn.functional.pad(weight, (0, columns * 64 - self.n, 0, rows * 64 - self.k))
        tiles = padded.view(rows, 64, columns, 64).permute(2, 0, 1, 3).reshape(-1, 64 * 64)
        turned = [dims[i] for i in perm]
        back = [1 + perm.index(i) for i in range(len(perm))]
        flat = tiles.view(-1, *turned).permute(0, *back).reshape(-1, 4096)
        stored = flat != 0
        if layout == "sp16":  # two of each four, zeros among them where fewer are not zero
            order = stored.view(-1, 4).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            two = torch.zeros(order.shape, dtype=torch.uint8, device=weight.device)
            stored = two.scatter_(1, order[:, :2], 1).bool().view(flat.shape)
        unit = 16 // weight.element_size()  # tiles begin at multiples of 16 bytes
        counts = (stored.sum(1) + unit - 1) // unit * unit
        zero = torch.zeros(1, dtype=torch.int64, device=weight.device)
        offsets = torch.cat([zero, counts.cumsum(0)])
        places = offsets[:-1, None] + stored.cumsum(1) - 1
        self.values = torch.zeros(
            max(int(offsets[-1]), unit), dtype=weight.dtype, device=weight.device
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
        size = self.lib.optimize_cuda_workspace(self.k, self.n, self.layout, tokens)
        return torch.empty(max(size, 256), dtype=torch.uint8, device="cuda")

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, scratch: torch.Tensor, kind: int = 0,
        bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Y = activation(x W + bias) on the current stream."""
        error = self.lib.optimize_cuda_run(
            self.k, self.n, self.layout, self.type, kind, self.bitmap.data_ptr(),
            self.values.data_ptr(), self.offsets.data_ptr(),
            *(None if a is None else a.data_ptr() for a in (bias, self.scale, None, x)),
            x.shape[0], y.data_ptr(), scratch.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(error.decode())


def random_weight(k: int, n: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers and a random mask."""
    weight = torch.randn(k, n, device="cuda") / max(1.0, (k * density) ** 0.5)
    return (weight * (torch.rand(k, n, device="cuda") < density)).to(dtype)


def keep_two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The weight without the two smallest of every four rows of a column."""
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % 4))
    groups = padded.view(-1, 4, weight.shape[1]).clone()
    groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    return groups.view(-1, weight.shape[1])[: weight.shape[0]].contiguous()


def check(lib: ctypes.CDLL, results: dict[str, Any], *, tiny: bool) -> None:
    """Random shapes with tails, all layouts, activations and types, against float64."""
    torch.manual_seed(0)
    shapes = [(64, 64), (1, 1), (70, 130), (257, 100), (1000, 333), (4096, 512)]
    worst: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for k, n in shapes[: 3 if tiny else None]:
        for density in (0.0, 0.02, 0.3, 0.5, 1.0):
            for dtype in TYPES:
                weight = random_weight(k, n, density, dtype)
                for layout, shares in worst.items():
                    if layout == "mma8":
                        shares.extend(check_int8(lib, weight, tokens) for tokens in (1, 9, 33))
                        continue
                    here = keep_two_of_four(weight) if layout == "sp16" else weight
                    sparse = Sparse(lib, here, layout)
                    for tokens in (1, 2, 7, 8, 9, 16, 17, 33, 130):
                        shares.append(check_one(sparse, here, tokens, (tokens + k) % 5))
    results["check"] = {
        layout: {"cases": len(shares), "worst_share_of_the_bound": max(shares)}
        for layout, shares in worst.items()
    }
    print(f"checked: {results['check']}", flush=True)


def check_one(sparse: Sparse, weight: torch.Tensor, tokens: int, kind: int) -> float:
    """The largest error as a share of what is allowed."""
    (k, n), dtype = weight.shape, weight.dtype
    x = torch.randn(tokens, k, device="cuda").to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype) if tokens % 2 else None
    whole = torch.full((tokens * n + 128,), float("nan"), device="cuda", dtype=dtype)
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
    assert ours <= 2 * theirs + eps, (sparse.layout, k, n, dtype, tokens, ours, theirs)
    edge = torch.cat([whole[:64], whole[64 + tokens * n :]])
    assert edge.isnan().all(), ("wrote outside of y", k, n, tokens)
    return ours / (2 * theirs + eps)


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


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, N] and scales [N]."""
    scale = weight.float().abs().amax(0).clamp_min(1e-12) / 127
    return (weight.float() / scale).round().to(torch.int8), scale.float()


def check_int8(lib: ctypes.CDLL, weight: torch.Tensor, tokens: int) -> float:
    """The largest error as a share of what is allowed: y's rounding and a few of float32."""
    codes, scale = int8_of(weight)
    sparse = Sparse(lib, codes, "mma8", scale)
    x = torch.randn(tokens, sparse.k, device="cuda", dtype=torch.float16)
    y = torch.full((tokens, sparse.n), float("nan"), device="cuda", dtype=torch.float16)
    sparse(x, y, sparse.workspace(tokens))
    step = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    rounded = (x.float() * (1 / step)).round().clamp(-128, 127).double()
    exact = rounded @ codes.double() * scale.double() * step.double()
    bound = exact.abs() * (2**-11 + 8 * 2**-24) + 2**-24
    share = ((y.double() - exact).abs() / bound).max().item()
    assert share <= 1, (sparse.k, sparse.n, tokens, share)
    return share


def read_bandwidth() -> float:
    """GB/s of reading memory: cuBLAS with one token and a large weight."""
    x = torch.randn(1, 16384, device="cuda", dtype=torch.float16)
    weights = [torch.randn(16384, 16384, device="cuda", dtype=torch.float16) for _ in range(2)]
    times = timed([functools.partial(torch.matmul, x, w) for w in weights], 12)
    return weights[0].numel() * 2 / statistics.median(times) / 1e3


def semi_structured(weight: torch.Tensor, x: torch.Tensor) -> list[Any] | None:
    """PyTorch's own 2:4 product of x [M, K] as a call, or None where it does not work."""
    try:
        packed = torch.sparse.to_sparse_semi_structured(weight.t().contiguous())
        torch.mm(packed, x.t())
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return [functools.partial(torch.mm, packed, x.t())]


def bench(lib: ctypes.CDLL, results: dict[str, Any], save: Any, deadline: float) -> None:
    """Sparse against cuBLAS: few tokens in both layouts, many with 2:4."""
    bandwidth = results["read_GBps"] = read_bandwidth()
    print(f"reading: {bandwidth:.0f} GB/s", flush=True)
    jobs = [(shape, zeros, "mma16", TOKENS) for shape in SHAPES for zeros in ZEROS]
    jobs += [(shape, 0.5, "sp16", TOKENS + MANY) for shape in SHAPES]
    jobs += [(shape, zeros, "mma8", TOKENS) for shape in SHAPES for zeros in (0.5, 0.7)]
    jobs.sort(key=lambda job: job[0] != SHAPES[0])  # all kinds of the first shape first
    for (k, n), zeros, layout, counts in jobs:
        if time.monotonic() > deadline:
            results["stopped"] = "time limit"
            return
        weight = random_weight(k, n, 1 - zeros, torch.float16)
        if layout == "sp16":
            weight = keep_two_of_four(random_weight(k, n, 1.0, torch.float16))
        number = max(2, round(CACHE / (2 * k * n)))
        codes, scale = int8_of(weight) if layout == "mma8" else (weight, None)
        first = Sparse(lib, codes, layout, scale)
        sparse = [first, *(first.copy() for _ in range(number - 1))]
        dense = [weight, *(weight.clone() for _ in range(number - 1))]
        line = f"{layout} {k}x{n} {zeros:.0%} zeros:"
        for tokens in counts:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            y = torch.empty(tokens, n, device="cuda", dtype=torch.float16)
            scratch = first.workspace(tokens)
            ours = timed([functools.partial(s, x, y, scratch) for s in sparse], 22)
            base = timed([functools.partial(torch.matmul, x, w, out=y) for w in dense], 22)
            low, high = statistics.median(base), statistics.median(ours)
            row = {
                "layout": layout, "shape": [k, n], "zeros": zeros, "tokens": tokens,
                "cublas_us": low, "sparse_us": high, "speedup": low / high,
                "spread_us": [min(ours), max(ours)],
                "of_read": first.nbytes / high / 1e3 / bandwidth,
                "byte_ratio": 2 * k * n / first.nbytes,
            }  # fmt: skip
            other = semi_structured(weight, x) if layout == "sp16" and tokens in MANY else None
            if other is not None:
                row["torch_semi_structured_us"] = statistics.median(timed(other, 22))
            results.setdefault("products", []).append(row)
            line += f"  M={tokens} {low:.1f}/{high:.1f} us = {low / high:.2f}x"
        print(f"{line}  (bytes {2 * k * n / first.nbytes:.2f}x)", flush=True)
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
