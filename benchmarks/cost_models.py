"""The models of ``cost.py``, exported by torch's dynamo exporter without its own optimizations.

    python benchmarks/cost_models.py {base|large} FOLDER

Random weights, opset 18, static [1, 128]. ``base`` is BERT-base (110 million weights, 438 MB), with
its weights beside the file and inside it; ``large`` has 14 layers of width 2048 (769 million, 3.07
GB), which fit no protobuf message. A process of its own, because torch keeps what it needed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SHAPE = (1, 128)


@dataclass(frozen=True)
class Model:
    """What is exported.

    Attributes:
        layers: Number of layers, and so of attentions.
        heads: Number of heads of each.
        hidden: Width.
        forms: Where the weights are: "external", "inline".
    """

    layers: int
    heads: int
    hidden: int
    forms: tuple[str, ...]


MODELS = {
    "base": Model(12, 12, 768, ("external", "inline")),
    "large": Model(14, 32, 2048, ("external",)),
}


def paths(name: str, folder: Path) -> dict[str, Path]:
    """File of each form of a model. Each has a folder of its own."""
    return {form: folder / f"{name}-{form}" / f"bert-{name}.onnx" for form in MODELS[name].forms}


def ensure(name: str, folder: Path) -> dict[str, Path]:
    """Export a model by another process, unless it is there.

    Raises:
        subprocess.CalledProcessError: The export failed; torch says why.
    """
    files = paths(name, folder)
    if not all(path.exists() for path in files.values()):
        subprocess.run([sys.executable, __file__, name, str(folder)], check=True)
    return files


def export(name: str, folder: Path) -> None:
    """Write every form of a model."""
    import torch
    from transformers import BertConfig, BertModel

    chosen = MODELS[name]
    config = BertConfig(
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        hidden_size=chosen.hidden,
        intermediate_size=4 * chosen.hidden,
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 1000, SHAPE)
    program = torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        dynamo=True,
        optimize=False,
        opset_version=18,
        input_names=["input_ids", "attention_mask"],
        verbose=False,
    )
    for form, path in paths(name, folder).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path, external_data=form == "external")


def main() -> None:
    """Export one model."""
    parser = argparse.ArgumentParser(description="Export a model of cost.py.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    export(arguments.name, arguments.folder)


if __name__ == "__main__":
    main()
