"""Weights in the layouts of the CUDA kernels as torch tensors, and calls of the kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import cuda_library
import numpy as np
import torch
from cuda_library import cuda_layout

NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
INT8 = ("mma8", "sp8")


def random_weight(
    shape: tuple[int, int], density: float | str, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Random numbers [K, N] on the CPU; density "2:4" keeps two of every four along K."""
    k, n = shape
    weight = torch.randn(k, n, generator=generator)
    if dtype == torch.int8:
        weight = (weight * 40).round().clamp(-127, 127)
        weight[weight == 0] = 1
    else:
        weight /= max(1.0, k**0.5)
    if density == "2:4":
        order = torch.rand(-(-k // 4), 4, n, generator=generator).argsort(dim=1)
        kept = (order < 2).reshape(-1, n)[:k]
    else:
        kept = torch.rand(k, n, generator=generator) < density
    return torch.where(kept, weight, 0.0).to(dtype)


@dataclass
class Sparse:
    """A weight [K, N] on the device, ready to be called.

    Attributes:
        lib: The library.
        shape: K, N.
        layout: Its name.
        dtype: Of x, y and bias.
        arrays: What ``cuda_library.Weight`` points to.
        most_values: Of a tile.
    """

    lib: Any
    shape: tuple[int, int]
    layout: str
    dtype: torch.dtype
    arrays: dict[str, torch.Tensor]
    most_values: int

    @classmethod
    def of(
        cls, lib: Any, weight: torch.Tensor, layout: str, dtype: torch.dtype, device: str,
        repeats: int = 1,
    ) -> Sparse:  # fmt: skip
        """Packs ``weight`` [K, N] (on the CPU), ``repeats`` times side by side (N % 64 == 0)."""
        k, n = weight.shape
        bits = weight if layout in INT8 else (weight + 0).view(torch.int16)  # -0 to 0
        packed = cuda_layout.pack_cuda(bits.numpy(), layout)
        step = int(packed.offsets[-1])
        offsets = [packed.offsets[:-1] + np.int32(i * step) for i in range(repeats)]
        offsets.append(np.array([repeats * step], np.int32))
        arrays = {
            "bitmap": torch.from_numpy(packed.bitmap).repeat(repeats, 1),
            "values": torch.from_numpy(packed.values[: max(step, 8)]).repeat(repeats),
            "offsets": torch.from_numpy(np.concatenate(offsets)),
            "arrivals": torch.zeros(-(-n * repeats // 64), dtype=torch.int32),
        }
        if layout in INT8:
            arrays["scale"] = torch.full((n * repeats,), 1 / 40 / max(1.0, k**0.5))
        placed = {name: array.to(device) for name, array in arrays.items()}
        most = cuda_layout.most_values(packed)
        return cls(lib, (k, n * repeats), layout, dtype, placed, most)

    def copy(self) -> Sparse:
        """The same in other memory."""
        arrays = {name: array.clone() for name, array in self.arrays.items()}
        return Sparse(self.lib, self.shape, self.layout, self.dtype, arrays, self.most_values)

    @property
    def nbytes(self) -> int:
        """Bytes that a product of few tokens reads of the weight."""
        read = ("bitmap", "values", "scale")
        return sum(a.numel() * a.element_size() for n, a in self.arrays.items() if n in read)

    def structure(self, activation: int = 0, bias: torch.Tensor | None = None) -> Any:
        """What the library is given."""
        arrays = dict(self.arrays)
        if bias is not None:
            arrays["bias"] = bias
        return cuda_library.weight(
            self.shape, self.layout, NAMES[self.dtype], activation,
            {name: array.data_ptr() for name, array in arrays.items()}, self.most_values,
        )  # fmt: skip

    def workspace(self, tokens: int) -> torch.Tensor:
        """Scratch for a call, filled with NaN."""
        size = self.lib.optimize_cuda_workspace(ctypes.byref(self.structure()), tokens)
        device = self.arrays["values"].device
        return torch.full((max(size, 256),), 0xFF, dtype=torch.uint8, device=device)

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, scratch: torch.Tensor, activation: int = 0,
        bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Y = activation(x W + bias) on the current stream.

        Raises:
            RuntimeError: What the library says.
        """
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        error = self.lib.optimize_cuda_run(
            ctypes.byref(self.structure(activation, bias)), x.data_ptr(), x.shape[0], y.data_ptr(),
            scratch.data_ptr(), stream,
        )  # fmt: skip
        if error:
            msg = f"{self.layout} {self.shape}, {x.shape[0]} tokens: {error.decode()}"
            raise RuntimeError(msg)
