"""Train the small image-text model that ships, and export its towers, in one command.

    python benchmarks/train_digits_clip.py [--epochs 80] [--out FOLDER]

CLIP: an image tower of six layers with 64 patches and a class token, a text tower of two layers,
0.3 million parameters; under four minutes on two cores. Digits and their parts are those of
train_digits_vit.py, with the captions of digit_captions.py. Needs the extras ``train``, ``torch``
and ``cpu``.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import digit_captions
import digits
import numpy as np
import onnx
import training
from train_digits_vit import parts
from training import SEED

from optimizer.frontends import export_hugging_face

RATE = 2e-3


def build() -> Any:
    """The model, with random weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64,
    }  # fmt: skip
    vision = {
        **sizes, "num_hidden_layers": 6, "image_size": digits.CANVAS,
        "patch_size": digits.PATCH, "num_channels": 1,
    }  # fmt: skip
    words = len(digit_captions.WORDS)
    text = {
        **sizes, "num_hidden_layers": 2, "vocab_size": words, "bos_token_id": 0,
        "eos_token_id": words - 1, "pad_token_id": words - 1,
        "max_position_embeddings": digit_captions.LENGTH,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64))


def loss_of(model: Any, pixels: Any, ids: Any) -> Any:
    """Contrastive, in both directions; of equal captions in a batch, all are right."""
    import torch

    scores = model(pixel_values=pixels, input_ids=ids).logits_per_image
    same = (ids[:, None] == ids[None]).all(dim=-1).float()
    right = same / same.sum(dim=1, keepdim=True)
    cross = torch.nn.functional.cross_entropy
    return (cross(scores, right) + cross(scores.T, right)) / 2


def train(
    model: Any, images: np.ndarray, labels: np.ndarray, bounds: np.ndarray, epochs: int
) -> None:
    """Every epoch places the digits anew."""
    import torch

    def data(epoch: int, order: np.ndarray) -> tuple[Any, ...]:
        pixels = digits.placed(images[order], seed=1000 + epoch)
        texts = digit_captions.captions(pixels, labels[order], bounds)
        return torch.from_numpy(pixels), torch.from_numpy(digit_captions.tokens(texts))

    training.train(model, len(images), epochs, RATE, data, functools.partial(loss_of, model))


def save_embedding(made: Path, path: Path) -> None:
    """A tower without outputs besides its embedding, which are for other uses."""
    model = onnx.load(made)
    kept = [output for output in model.graph.output if output.name.endswith("_embeds")]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--out", type=Path, default=digit_captions.HOME)
    arguments = parser.parse_args()
    images, labels = parts()["train"]
    placed = np.concatenate([digits.placed(images, seed) for seed in range(4)])
    bounds = digit_captions.bounds_of(placed)
    model = build()
    train(model, images, labels, bounds, arguments.epochs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {"bounds": bounds.tolist(), "of": ["slant", "thickness", "row", "column"]}
    (arguments.out / "bounds.json").write_text(json.dumps(facts, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model.save_pretrained(folder / "hf")
        for task, name in (("vision", "image"), ("text", "text")):
            made = export_hugging_face(str(folder / "hf"), folder / task, opset=18, task=task)
            save_embedding(made, arguments.out / f"{name}.onnx")


if __name__ == "__main__":
    main()
