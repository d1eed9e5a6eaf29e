"""What merging tokens gives in speed on this machine, in one command.

    python benchmarks/tokens.py [--models deit-s vit-b] [--r 8 13 16] [--threads 1] [--int8]

Models have the published shapes and random weights: time does not depend on the numbers. They are
exported by the project's own frontend, and every figure is against ONNX Runtime on that export,
with turns of all variants interleaved. ``limit`` is what the products saved would give if all time
were spent in products and none on choosing tokens; ``canonical`` is this project without merging.

--int8  outliertune on top, calibrated on random images, and 70 % zeros with sparse-matmul in int8:
speed only.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.api import optimize
from optimizer.benchmark import Setup, benchmark, write_result
from optimizer.frontends import export_hugging_face
from optimizer.tokens.matching import Sides
from optimizer.tokens.schedule import clipped

RESULTS = Path(__file__).resolve().parent / "results" / "tokens.json"


@dataclass(frozen=True)
class Shape:
    """A vision transformer of 224 x 224 images in patches of 16 x 16.

    Attributes:
        width: D.
        heads: H.
        layers: L.
    """

    width: int
    heads: int
    layers: int = 12
    tokens: int = 197

    def products(self, r: int) -> float:
        """Multiplications of all products of the layers when each removes ``r`` tokens."""
        removed, _ = clipped([r] * self.layers, self.tokens, lambda n: Sides(n, (0,)).limit)
        count = self.tokens
        total = float((count - 1) * 16 * 16 * 3 * self.width + self.width * CLASSES)
        for taken in removed:
            total += count * 4 * self.width**2 + 2 * count**2 * self.width
            count -= taken
            total += count * 8 * self.width**2
        return total

    def limit(self, r: int) -> float:
        """How many times fewer multiplications there are with ``r`` tokens less per layer."""
        return self.products(0) / self.products(r)


CLASSES = 1000
SHAPES = {"deit-s": Shape(384, 6), "vit-b": Shape(768, 12), "deit-ti": Shape(192, 3)}


def export(shape: Shape, folder: Path) -> Path:
    """A random model of ``shape`` as ONNX file."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=shape.width, num_attention_heads=shape.heads, num_labels=CLASSES,
        intermediate_size=4 * shape.width, num_hidden_layers=shape.layers,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "model")
    return export_hugging_face(str(folder / "model"), folder / "onnx", opset=18)


#: What comes on top.
KINDS: dict[str, list[str]] = {
    "": [],
    " int8": ["outliertune"],
    " sparse int8": [
        "sparsify:pattern=unstructured;sparsity=0.7;method=magnitude",
        "sparse-matmul:precision=int8",
    ],
}


def variants(original: Path, folder: Path, rs: Sequence[int], *, int8: bool) -> dict[str, Path]:
    """Files by label, the original first."""
    files = {"original": original}
    images = np.random.default_rng(1).normal(0, 1, (8, 3, 224, 224)).astype(np.float32)
    for r in (0, *rs):
        merging = [f"tome:r={r}"] if r else []
        for kind, more in KINDS.items() if int8 else (("", []),):
            label = ("canonical" if not r else f"r={r}") + kind
            target = folder / f"{label}.onnx"
            optimize(
                original, [*merging, *more], output=target, verify="off", force=True,
                calibration={"pixel_values": images} if kind == " int8" else None,
            )  # fmt: skip
            files[label] = target
    return files


def measure(
    name: str, rs: Sequence[int], threads: int, rounds: int, *, int8: bool
) -> dict[str, Any]:
    """Timings of one model, with limits."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        files = variants(export(shape, folder), folder, rs, int8=int8)
        setup = Setup(threads=threads)
        made = benchmark(
            list(files.values()), setup, labels=list(files), rounds=rounds, seconds=240
        )
    found = made.as_dict()
    canonical = next(t for t in found["timings"] if t["label"] == "canonical")
    for timing in found["timings"]:
        if timing["label"].startswith("r="):
            r = int(timing["label"].split()[0][2:])
            timing["limit"] = round(shape.limit(r), 3)
            timing["share_of_limit"] = round(timing["speedup"] / shape.limit(r), 3)
            timing["against_canonical"] = round(timing["speedup"] / canonical["speedup"], 3)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """One line per variant."""
    print(f"{name}, {found['threads']} thread(s), {found['rounds']} rounds")
    for timing in found["timings"]:
        limit = f"  limit {timing['limit']:.2f}" if "limit" in timing else ""
        low, high = timing["interval"]
        print(
            f"  {timing['label']:16} {timing['median_ms']:8.2f} ms  {timing['speedup']:.3f}x "
            f"({low:.3f}..{high:.3f}){limit}"
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["deit-s", "vit-b"])
    parser.add_argument("--r", nargs="+", type=int, default=[8, 13, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    models = {}
    for name in arguments.models:
        models[name] = measure(
            name, arguments.r, arguments.threads, arguments.rounds, int8=arguments.int8
        )
        show(name, models[name])
    write_result(arguments.output, {"models": models})


if __name__ == "__main__":
    main()
