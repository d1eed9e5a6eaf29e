"""Times of the CUDA kernels of SparseMatMul against dense products, taking turns.

The dense products are cuBLAS' in float16, and in int8 without what makes codes of x and numbers of
the sums, which the sparse product does.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_weights import INT8, Sparse, random_weight

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (4096, 14336))
ZEROS = (0.5, 0.6, 0.7, 0.8)
DECODE, PREFILL = (1, 4, 8, 16, 64), (512, 2048)
LEAST_INT8 = 32  # rows that torch multiplies int8 by: fewer are padded
CACHE = 400e6  # bytes of dense copies: more than the second-level cache of any GPU
BASE = 256  # columns that are packed; a weight has them several times side by side
ROUNDS = 20
DEVICE = "cuda"

Call = Callable[[], Any]


def graph_of(calls: list[Call]) -> Callable[[], float]:
    """All calls as one CUDA graph; what it returns gives microseconds per call."""
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

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(calls)

    return replay


def in_turns(**contenders: list[Call]) -> dict[str, list[float]]:
    """Microseconds per call of each, round after round; the first two rounds do not count."""
    replays = {name: graph_of(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(ROUNDS + 2):
        for name, replay in replays.items():
            times[name].append(replay())
    return {name: values[2:] for name, values in times.items()}


def read_rate(lib: Any) -> float:
    """GB/s at which memory is read: nothing is written, no cache holds it."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=DEVICE)
    sink = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    size = source.numel() * source.element_size()

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        error = lib.optimize_cuda_read(source.data_ptr(), size, sink.data_ptr(), stream)
        if error:
            raise RuntimeError(error.decode())

    times = in_turns(read=[call] * 4)["read"]
    return size / statistics.median(times) / 1e3


def semi_structured(dense: list[torch.Tensor], x: torch.Tensor) -> list[float] | str:
    """Times of torch's 2:4 product (cuSPARSELt or CUTLASS), or why there are none."""
    try:
        made = [torch.sparse.to_sparse_semi_structured(w.T.contiguous()) for w in dense]
        calls = [functools.partial(torch.nn.functional.linear, x, w) for w in made]
        return in_turns(theirs=calls)["theirs"]
    except Exception as error:  # whatever a library that is missing or old raises
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error)[:120]}"


def row_of(
    layout: str, shape: tuple[int, int], zeros: float | str, tokens: int,
    weights: tuple[list[Sparse], list[torch.Tensor]],
) -> dict[str, Any]:  # fmt: skip
    """One measurement."""
    (k, n), (sparse, dense) = shape, weights
    x = torch.randn(tokens, k, device=DEVICE, dtype=torch.float16)
    y = torch.empty(tokens, n, device=DEVICE, dtype=torch.float16)
    scratch = sparse[0].workspace(tokens)
    contenders = {
        "sparse": [functools.partial(s, x, y, scratch) for s in sparse],
        "cublas": [functools.partial(torch.matmul, x, w, out=y) for w in dense],
    }
    row: dict[str, Any] = {
        "layout": layout, "shape": [k, n], "zeros": zeros, "tokens": tokens,
        "byte_ratio": 2 * k * n / sparse[0].nbytes,
    }  # fmt: skip
    if layout in INT8:
        rows = max(tokens, LEAST_INT8)
        codes = torch.randint(-127, 128, (rows, k), device=DEVICE, dtype=torch.int8)
        turned = [w.to(torch.int8).T.contiguous().T for w in dense]
        contenders["cublas_int8"] = [functools.partial(torch._int_mm, codes, w) for w in turned]  # noqa: SLF001
    times = in_turns(**contenders)
    if layout == "sp16":
        theirs = semi_structured(dense, x)
        if isinstance(theirs, str):
            row["semi_structured"] = theirs
        else:
            times["semi_structured"] = theirs
    for name, values in times.items():
        row[f"{name}_us"] = statistics.median(values)
        row[f"{name}_spread_us"] = [min(values), max(values)]
    row["speedup"] = row["cublas_us"] / row["sparse_us"]
    if layout in INT8:
        row["speedup_int8"] = row["cublas_int8_us"] / row["sparse_us"]
    row["GBps"] = sparse[0].nbytes / row["sparse_us"] / 1e3
    return row


def bench(
    lib: Any, layouts: list[str], results: dict[str, Any], save: Call, deadline: float
) -> None:
    """Rows for every layout, shape, share of zeros and number of tokens, until the deadline."""
    rows = results.setdefault("rows", [])
    results["read_GBps"] = read = read_rate(lib)
    print(f"read: {read:.0f} GB/s", flush=True)
    for shape in SHAPES:
        for layout in layouts:
            shares: tuple[float | str, ...] = ("2:4",) if layout.startswith("sp") else ZEROS
            for zeros in shares:
                if time.monotonic() > deadline:
                    results["stopped"] = "time limit"
                    return
                line = f"{layout} {shape[0]}x{shape[1]} {zeros} zeros:"
                weights = weights_of(lib, layout, shape, zeros)
                for tokens in (*DECODE, *(PREFILL if zeros == "2:4" else ())):
                    row = row_of(layout, shape, zeros, tokens, weights)
                    row["of_read"] = row["GBps"] / read
                    rows.append(row)
                    line += f"  M={tokens} {row['sparse_us']:.1f} us {row['speedup']:.2f}x"
                print(f"{line}  (bytes {row['byte_ratio']:.2f}x)", flush=True)
                save()


def weights_of(
    lib: Any, layout: str, shape: tuple[int, int], zeros: float | str
) -> tuple[list[Sparse], list[torch.Tensor]]:
    """As many copies, sparse and dense in float16, as no cache holds."""
    k, n = shape
    stored = torch.int8 if layout in INT8 else torch.float16
    density = zeros if zeros == "2:4" else 1 - float(zeros)
    base = random_weight((k, BASE), density, stored, torch.Generator().manual_seed(0))
    first = Sparse.of(lib, base, layout, torch.float16, DEVICE, repeats=n // BASE)
    dense = base.to(DEVICE).to(torch.float16).repeat(1, n // BASE)
    number = max(2, round(CACHE / (2 * k * n)))
    return (
        [first, *(first.copy() for _ in range(number - 1))],
        [dense, *(dense.clone() for _ in range(number - 1))],
    )
