"""Small random models of the supported families, exported once and kept on disk.

Adding a family is one line in ``ZOO``. Each entry says which blocks must be found in its export.
Norm scales, norm shifts and biases are drawn far from their defaults, because a rewrite that drops
or swaps one of them is invisible on a freshly initialised model.

``python tests/zoo.py FOLDER [CELL ...]`` writes models and feeds for looking at by hand.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "zoo"
"""Kept between test runs; an export takes some seconds, the file a few hundred kilobytes."""

VOCAB = 99
_END = 98
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": _END}


@dataclass(frozen=True)
class Blocks:
    """What ``find_blocks`` must report for every layer of an export."""

    ffn: int
    style: str = "pre-norm"
    gated: bool = False
    norm: str = "layer"
    kv_heads: int = 4
    head_dim: int = 16
    heads: int = 4
    hidden: int = 64
    layers: int = 2


@dataclass(frozen=True)
class Entry:
    """One family: transformers configuration, model class, and the blocks it has."""

    name: str
    kind: str
    config: str
    model: str
    blocks: Blocks
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One export of one family."""

    entry: Entry
    opset: int
    kv_cache: bool

    @property
    def id(self) -> str:
        return f"{self.entry.name}-{self.opset}{'-kv' if self.kv_cache else ''}"


def _decoder(name: str, prefix: str, blocks: Blocks, **options: Any) -> Entry:
    common = _TOKENS | {"max_position_embeddings": 64}
    return Entry(name, "decoder", f"{prefix}Config", "", blocks, _sizes(blocks) | common | options)


def _encoder(name: str, prefix: str, head: str, blocks: Blocks, **options: Any) -> Entry:
    common = _TOKENS | {"max_position_embeddings": 66}
    options = _sizes(blocks) | common | options
    return Entry(name, "text", f"{prefix}Config", f"{prefix}{head}", blocks, options)


def _vision(name: str, prefix: str, head: str, blocks: Blocks, **options: Any) -> Entry:
    common = {"image_size": 16, "patch_size": 4, "num_channels": 3}
    options = _sizes(blocks) | common | options
    return Entry(name, "vision", f"{prefix}Config", f"{prefix}{head}", blocks, options)


def _sizes(blocks: Blocks) -> dict[str, Any]:
    return {
        "hidden_size": blocks.hidden,
        "num_hidden_layers": blocks.layers,
        "num_attention_heads": blocks.heads,
        "num_key_value_heads": blocks.kv_heads,
        "intermediate_size": blocks.ffn,
    }


def _post(ffn: int) -> Blocks:
    return Blocks(ffn, style="post-norm")


def _gated(ffn: int, kv_heads: int = 2, head_dim: int = 16) -> Blocks:
    return Blocks(ffn, gated=True, norm="rms", kv_heads=kv_heads, head_dim=head_dim)


_ENTRIES = (
    _decoder("llama", "Llama", _gated(86)),
    _decoder("mistral", "Mistral", _gated(91, head_dim=24), head_dim=24, sliding_window=None),
    _decoder("mistral-sliding", "Mistral", _gated(91, kv_heads=1), sliding_window=4),
    _decoder("qwen2", "Qwen2", _gated(77)),
    _decoder("opt", "OPT", Blocks(131), ffn_dim=131, word_embed_proj_dim=64),
    _decoder("gpt2", "GPT2", Blocks(133), n_inner=133),
    _decoder("gpt-neox", "GPTNeoX", Blocks(119, style="parallel")),
    _decoder("phi", "Phi", Blocks(123, style="parallel", kv_heads=2)),
    _encoder("bert", "Bert", "Model", _post(125)),
    _encoder("roberta", "Roberta", "ForSequenceClassification", _post(117), type_vocab_size=1),
    _encoder("distilbert", "DistilBert", "Model", _post(121), hidden_dim=121),
    _encoder("clip-text", "CLIPText", "ModelWithProjection", Blocks(113), projection_dim=24),
    _vision("clip-vision", "CLIPVision", "ModelWithProjection", Blocks(111), projection_dim=24),
    _vision("vit", "ViT", "ForImageClassification", Blocks(127), num_labels=5),
    _vision("deit", "DeiT", "Model", Blocks(115)),
)
ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def cells(*, full: bool) -> list[Cell]:
    """All exports (opset 18 and 23, decoders also with cache), or the quick half of them.

    The quick selection alternates so that every family, opset, and cache state appears.
    """
    every = [
        Cell(entry, opset, kv_cache)
        for entry in ZOO.values()
        for opset in (18, 23)
        for kv_cache in ((False, True) if entry.kind == "decoder" else (False,))
    ]
    if full:
        return every
    # Decoders: 23 with cache and 18 without, or the other way round; others: one opset each.
    quick = []
    for index, entry in enumerate(ZOO.values()):
        if entry.kind == "decoder":
            flip = index % 2 == 1
            quick += [Cell(entry, 18, flip), Cell(entry, 23, not flip)]
        else:
            quick.append(Cell(entry, (18, 23)[index % 2], False))
    return quick


def make_model(entry: Entry, seed: int = 0) -> Any:
    """The random torch model of an entry, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, entry.config)(**entry.options)
    if entry.model:
        model = getattr(transformers, entry.model)(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in norms and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name or "token" in name:
                parameter.copy_(0.5 * noise)
            else:
                # Variance-preserving, so that attention is far from uniform and every weight shows.
                parameter.copy_(noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
    return model.eval()


def make_feeds(
    entry: Entry,
    kv_cache: bool = False,
    *,
    batch: int = 3,
    sequence: int = 6,
    past: int = 4,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Random inputs of an export; the last row of a text batch is padded at its right end.

    Rows of fewer than three tokens stay unpadded, so that no query is without a key.
    """
    rng = np.random.default_rng(seed)
    if entry.kind == "vision":
        size = entry.options["image_size"]
        return {"pixel_values": rng.standard_normal((batch, 3, size, size), dtype=np.float32)}
    past = past if kv_cache else 0
    ids = rng.integers(3, _END, (batch, sequence))
    mask = np.ones((batch, past + sequence), np.int64)
    ids[:, -1] = _END
    if sequence >= 3 and batch > 1:
        padding = 1 + seed % 2
        mask[-1, -padding:] = 0
        ids[-1, -padding:] = 1
        ids[-1, -padding - 1] = _END
    feeds = {"input_ids": ids, "attention_mask": mask}
    if entry.kind == "decoder":
        feeds["position_ids"] = np.tile(np.arange(past, past + sequence), (batch, 1))
    if entry.name == "bert":
        feeds["token_type_ids"] = rng.integers(0, 2, (batch, sequence))
    if kv_cache:
        blocks = entry.blocks
        shape = (batch, blocks.kv_heads, past, blocks.head_dim)
        for layer in range(blocks.layers):
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{part}"
                feeds[name] = rng.standard_normal(shape, dtype=np.float32)
    return feeds


def torch_outputs(
    entry: Entry, kv_cache: bool, feeds: Mapping[str, np.ndarray], model: Any = None
) -> dict[str, np.ndarray]:
    """What torch itself gives for the feeds of an export, under the export's output names."""
    import torch
    from transformers import DynamicCache

    model = make_model(entry) if model is None else model
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    past = [inputs.pop(name) for name in list(inputs) if name.startswith("past_key_values.")]
    if kv_cache:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        inputs |= {"past_key_values": DynamicCache(ddp_cache_data=pairs), "use_cache": True}
    with torch.no_grad():
        output = model(**inputs)
    names = ("logits", "text_embeds", "image_embeds", "last_hidden_state", "pooler_output")
    found = {n: output[n].numpy() for n in names if getattr(output, n, None) is not None}
    if kv_cache:
        for layer, state in enumerate(output.past_key_values.layers):
            found[f"present.{layer}.key"] = state.keys.numpy()
            found[f"present.{layer}.value"] = state.values.numpy()
    return found


def export(entry: Entry, opset: int, kv_cache: bool, cache_dir: Path = CACHE) -> Path:
    """The ONNX export of an entry, made by the project's own frontend unless it is already there.

    The file name holds a hash of the entry, the library versions, the frontend's sources and this
    file; exports with another hash are removed.
    """
    from optimizer.frontends import hugging_face, onnx_export

    cell = Cell(entry, opset, kv_cache).id
    path = cache_dir / f"{cell}-{_key(entry)}.onnx"
    if path.is_file():
        return path
    for stale in cache_dir.glob(f"{cell}-{'[0-9a-f]' * 16}.onnx"):
        if stale != path:  # another process may have written it just now
            stale.unlink(missing_ok=True)
    model = make_model(entry)
    plan = hugging_face.detect(_with_architecture(model))
    exported = hugging_face.export_loaded(model, plan, kv_cache=kv_cache, opset=opset)
    return onnx_export.write(exported, path)


def _with_architecture(model: Any) -> Any:
    model.config.architectures = [type(model).__name__]
    return model.config


def _key(entry: Entry) -> str:
    digest = hashlib.sha256(json.dumps(asdict(entry), sort_keys=True).encode())
    for package in ("torch", "transformers", "onnx_ir", "onnxscript"):
        digest.update(importlib.metadata.version(package.replace("_", "-")).encode())
    from optimizer import frontends

    for source in sorted(Path(frontends.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def main(folder: str, *wanted: str) -> None:
    """Write the exports named (all without names) with feeds and torch's outputs beside them."""
    target = Path(folder)
    chosen = [cell for cell in cells(full=True) if not wanted or cell.id in wanted]
    for cell in chosen:
        made = export(cell.entry, cell.opset, cell.kv_cache, target / "cache")
        final = target / f"{cell.id}.onnx"
        final.write_bytes(made.read_bytes())
        feeds = make_feeds(cell.entry, cell.kv_cache)
        np.savez(target / f"{cell.id}.npz", **feeds)
        np.savez(
            target / f"{cell.id}.expected.npz",
            **torch_outputs(cell.entry, cell.kv_cache, feeds),
        )
        sys.stdout.write(f"{final}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
