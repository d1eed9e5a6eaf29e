"""What removing image tokens costs in retrieval, on the image-text model that ships.

    python benchmarks/tokens_retrieval.py [--keep 0.75 0.5 0.35] [--copies 5]

digits-clip  image tower of six layers, trained by train_digits_clip.py: recall among the first 1
             and 5, from images to captions and back, on test digits that training has not seen. A
             query searches the 360 test images of one placement, or their captions; figures are
             means over ``--copies`` placements. Methods of one row remove equally many tokens in
             equal layers, so ``multiplications``, the share of the original's that is left in the
             image tower's layers, is equal.
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
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.tokens.search import Costs
from passes import get_pass

RESULTS = Path(__file__).resolve().parent / "results" / "tokens_retrieval.json"

#: Name in the table -> pass and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tome": ("tome", {}),
    "crossget, no guidance": ("crossget", {"guidance": "none"}),
    "crossget": ("crossget", {}),
    "crossget, ensemble": ("crossget", {"ensemble": True}),
    "prune-tokens": ("prune-tokens", {}),
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


def table(keeps: Sequence[float], copies: int) -> list[dict[str, Any]]:
    """One row per method and share of tokens."""
    images, names = digit_captions.load("test", copies)
    text = OrtRunner(canonical(digit_captions.HOME / "text.onnx"))
    texts = text.run(digit_captions.feed(names))["text_embeds"]
    original = canonical(digit_captions.HOME / "image.onnx")
    blocks = find_blocks(original).blocks
    rows: list[dict[str, Any]] = [
        {"method": "original", "keep": 1.0, **recalls(original, images, texts, names, copies)}
    ]
    for keep in keeps:
        for label, (name, options) in METHODS.items():
            model, pass_class = original.clone(), get_pass(name)
            report = pass_class(pass_class.Options(keep=keep, **options)).call(model, Context())
            tower = report.details["towers"][0]
            costs = Costs.of(blocks, tower["tokens"])
            share = costs.total(tower["removed"]) / costs.total([0] * len(blocks))
            found = recalls(model, images, texts, names, copies)
            rows.append(
                {
                    "method": label,
                    "keep": keep,
                    "removed": tower["removed"],
                    "multiplications": round(share, 4),
                    **found,
                }
            )
    return rows


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
        share = row.get("multiplications", 1.0)
        print(f"keep {row['keep']:.2f}  {row['method']:24} {figures}  x{share:.3f}")
    facts = {
        "model": "digits-clip",
        "images": len(digits.load("test")[0]),
        "placements": arguments.copies,
        "rows": rows,
    }
    write_result(arguments.output, facts)


if __name__ == "__main__":
    main()
