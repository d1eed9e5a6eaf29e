"""Train the small vision transformer that ships, and export it, in one command.

    python benchmarks/train_digits_vit.py [--epochs 200] [--out FOLDER]

Eight layers, 64 patches and a class token, 0.4 million parameters; a few minutes on two cores. Of
the 1797 digits a fifth is for testing and a tenth held out for choosing schedules; neither is seen
in training. Needs scikit-learn, and the extras ``torch`` and ``cpu``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import digits
import numpy as np
import training
from training import SEED

from optimizer.frontends import export_hugging_face

RATE = 1.5e-3
TEST, HELD_OUT = 360, 180


def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images [n, 8, 8] from 0 to 16 and labels, by part."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(SEED).permutation(len(found.images))
    cuts = {"test": order[:TEST], "held-out": order[TEST : TEST + HELD_OUT]}
    cuts["train"] = order[TEST + HELD_OUT :]
    return {
        name: (found.images[rows].astype(np.uint8), found.target[rows].astype(np.uint8))
        for name, rows in cuts.items()
    }


def build() -> Any:
    """The model, with random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(SEED)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64, num_hidden_layers=8, num_attention_heads=4, intermediate_size=256,
            image_size=digits.CANVAS, patch_size=digits.PATCH, num_channels=1, num_labels=10,
        )
    )  # fmt: skip


def train(model: Any, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """Every epoch places the digits anew."""
    import torch

    def data(epoch: int, order: np.ndarray) -> tuple[Any, ...]:
        pixels = torch.from_numpy(digits.placed(images[order], seed=1000 + epoch))
        return pixels, torch.from_numpy(labels[order].astype(np.int64))

    def loss_of(x: Any, y: Any) -> Any:
        logits = model(pixel_values=x).logits
        return torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.05)

    training.train(model, len(images), epochs, RATE, data, loss_of)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=digits.HOME)
    arguments = parser.parse_args()
    found = parts()
    model = build()
    train(model, *found["train"], arguments.epochs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = {
        f"{name}_{kind}": array
        for name in ("test", "held-out")
        for kind, array in zip(("images", "labels"), found[name], strict=True)
    }
    np.savez_compressed(arguments.out / "digits.npz", **kept)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model.save_pretrained(folder / "hf")
        made = export_hugging_face(str(folder / "hf"), folder / "onnx", opset=18)
        shutil.copyfile(made, arguments.out / "digits-vit.onnx")


if __name__ == "__main__":
    main()
