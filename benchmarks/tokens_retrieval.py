"""What removing image tokens costs in retrieval, on the image-text model that ships.

    python benchmarks/tokens_retrieval.py [--keep 0.75 0.5 0.35] [--copies 5]

digits-clip  image tower of six layers, trained by train_digits_clip.py: recall among the first 1
             and 5, from images to captions and back, on test digits that training has not seen. A
             query searches the 360 test images of one placement, or their captions; figures are
             means over ``--copies`` placements. Methods with one ``keep`` remove equally many
             tokens in the same layers, so ``multiplications``, the share of the original's that
             is left in the image tower's layers, is equal. ``in_all`` adds the products that
             choose tokens, which weigh much in a model as narrow as this one; the last row of each
             ``keep`` is tome with the fewest tokens less that make it no dearer than crossget.
             Searched schedules are chosen on held-out digits without their captions, and their
             layers cost no more than those of the same ``keep``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digit_captions
import digits
import numpy as np
import onnx_ir as ir
from tokens_accuracy import canonical

from optimizer.benchmark import write_result
from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from optimizer.structure import Block
from optimizer.tokens.matching import Sides
from optimizer.tokens.schedule import keeping
from optimizer.tokens.search import Costs
from passes import get_pass

RESULTS = Path(__file__).resolve().parent / "results" / "tokens_retrieval.json"

TOKENS = 1 + (digits.CANVAS // digits.PATCH) ** 2

#: Name in the table -> pass and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tome": ("tome", {}),
    "crossget, no guidance": ("crossget", {"guidance": "none"}),
    "crossget": ("crossget", {}),
    "crossget, ensemble": ("crossget", {"ensemble": True}),
    "prune-tokens": ("prune-tokens", {}),
    "tome, searched": ("tome", {"search": True}),
    "crossget, searched": ("crossget", {"search": True}),
    "prune-tokens, searched": ("prune-tokens", {"search": True}),
}


def recalls(
    tower: ir.Model, images: np.ndarray, texts: np.ndarray, names: list[str], copies: int
) -> dict[str, float]:
    """Mean recalls over placements, with the image embeddings of ``tower``.

    Args:
        tower: The image tower.
        images: [copies * n, 1, 32, 32], one placement of all digits after the other.
        texts: Embeddings [copies * n, D] of the captions.
        names: The captions.
        copies: Placements.
    """
    runner, each = OrtRunner(tower), len(images) // copies
    found = []
    for start in range(0, len(images), each):
        rows = slice(start, start + each)
        embedded = runner.run({"pixel_values": images[rows]})["image_embeds"]
        found.append(digit_captions.recalls(embedded, texts[rows], names[rows]))
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def choosing(name: str, blocks: Sequence[Block], count: int, removed: Sequence[int]) -> int:
    """Multiplications of the products by which ``name`` chooses tokens; the class token stays.

    Args:
        name: The pass. Guidance of crossget, under a twentieth of its matching, is always counted.
        blocks: The layers.
        count: Tokens that enter the first.
        removed: Tokens less, by layer.
    """
    result = 0
    for block, r in zip(blocks, removed, strict=True):
        head, width = block.attention.head_dim, block.attention.heads * block.attention.head_dim
        sides, free = Sides(count, (0,)), count - 1
        if r and name == "tome":
            result += len(sides.sources) * len(sides.destinations) * head
        elif r and name == "crossget":
            result += (free * free + r * (free - r) + count) * width
        elif r:
            result += count * width
        count -= r
    return result


def in_all(name: str, blocks: Sequence[Block], count: int, removed: Sequence[int]) -> float:
    """Share of the original's multiplications, with those that choose tokens."""
    costs = Costs.of(blocks, count)
    chosen = choosing(name, blocks, count, removed)
    return (costs.total(removed) + chosen) / costs.total([0] * len(blocks))


def as_dear(blocks: Sequence[Block], count: int, limit: float) -> tuple[int, ...]:
    """Tokens that tome removes by layer, the fewest that cost no more than ``limit`` in all."""
    tries = (keeping(1 - n / (count - 1), count - 1, len(blocks)) for n in range(count))
    return tuple(next(r for r in tries if in_all("tome", blocks, count, r) <= limit))


def table(keeps: Sequence[float], copies: int) -> list[dict[str, Any]]:
    """One row per method and share of tokens."""
    images, names = digit_captions.load("test", copies)
    text = OrtRunner(canonical(digit_captions.HOME / "text.onnx"))
    texts = text.run(digit_captions.feed(names))["text_embeds"]
    original = canonical(digit_captions.HOME / "image.onnx")
    blocks = find_blocks(original).blocks
    held_out, _ = digit_captions.load("held-out")
    data = Calibration(load_samples({"pixel_values": held_out}, input_specs(original)))
    rows: list[dict[str, Any]] = [
        {"method": "original", "keep": 1.0, **recalls(original, images, texts, names, copies)}
    ]

    def measure(label: str, keep: float, name: str, options: dict[str, Any]) -> dict[str, Any]:
        model, pass_class = original.clone(), get_pass(name)
        report = pass_class(pass_class.Options(**options)).call(model, Context(calibration=data))
        tower = report.details["towers"][0]
        removed, costs = tower["removed"], Costs.of(blocks, tower["tokens"])
        rows.append(
            {
                "method": label,
                "keep": keep,
                "removed": removed,
                "multiplications": costs.total(removed) / costs.total([0] * len(blocks)),
                "in_all": in_all(name, blocks, tower["tokens"], removed),
                **recalls(model, images, texts, names, copies),
            }
        )
        return rows[-1]

    for keep in keeps:
        for label, (name, options) in METHODS.items():
            measure(label, keep, name, {"keep": keep, **options})
        dear = next(r for r in rows if (r["method"], r["keep"]) == ("crossget", keep))
        fewest = as_dear(blocks, TOKENS, dear["in_all"])
        measure("tome, as dear as crossget", keep, "tome", {"r": fewest})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Recall among the first, and first five, from images to captions and back, in %."""
    lines = [
        "| tokens less | method | multiplications: layers, with choosing | image to caption: 1, 5 "
        "| caption to image: 1, 5 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{100 * row.get(key, 1.0):.1f}" for key in ("multiplications", "in_all")]
        found = [
            ", ".join(f"{100 * row[f'{way}_{k}']:.1f}" for k in (1, 5))
            for way in ("image_to_text", "text_to_image")
        ]
        less, method = f"{100 * (1 - row['keep']):.0f} %", row["method"]
        lines.append(f"| {less} | {method} | {', '.join(shares)} % | {' | '.join(found)} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = table(arguments.keep, arguments.copies)
    for row in rows:
        figures = "  ".join(f"{100 * v:6.2f}" for k, v in row.items() if "_to_" in k)
        share, every = row.get("multiplications", 1.0), row.get("in_all", 1.0)
        print(f"keep {row['keep']:.2f}  {row['method']:26} {figures}  x{share:.3f} x{every:.3f}")
    facts = {
        "model": "digits-clip",
        "images": len(digits.load("test")[0]),
        "placements": arguments.copies,
        "rows": rows,
    }
    write_result(arguments.output, facts)


if __name__ == "__main__":
    main()
