"""Small random models of the supported families, and what must be found in each.

Adding a family is one line in ``FAMILIES``. Each entry says which blocks must be found in its
exports. Norm scales, norm shifts and biases are drawn far from their defaults, because a rewrite
that drops or swaps one of them is invisible on a freshly initialised model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOCAB = 99
_END = 98
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": _END}


@dataclass(frozen=True)
class Blocks:
    """What ``find_blocks`` must report for every layer of an export.

    Attributes:
        activation: None stands for SiLU in gated MLPs and GELU in plain ones.
        scale: None stands for ``head_dim ** -0.5``.
        extras: Of every block, in any order.
        refused: Part of the reason that must be given instead of blocks.
        cache_heads: KV heads of the form with cache, where they are others.
    """

    ffn: int
    style: str = "pre-norm"
    gated: bool = False
    norm: str = "layer"
    kv_heads: int = 4
    head_dim: int = 16
    heads: int = 4
    hidden: int = 64
    layers: int = 2
    activation: str | None = None
    rotary: bool = False
    head_norm: bool = False
    cross: bool = False
    experts: bool = False
    scale: float | None = None
    softcap: float = 0.0
    extras: tuple[str, ...] = ()
    refused: str | None = None
    cache_heads: int | None = None


@dataclass(frozen=True)
class Entry:
    """One family.

    Attributes:
        kind: "decoder", "text", "vision", "audio", "encoder" or "seq2seq" (the two halves of an
            encoder-decoder model).
        config: transformers configuration class.
        model: Model class; empty for the causal language model of the configuration.
    """

    name: str
    kind: str
    config: str
    model: str
    blocks: Blocks
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether the family has a form with KV cache."""
        return self.kind in ("decoder", "seq2seq")


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


def _halves(
    name: str, config: str, model: str, blocks: Blocks, **options: Any
) -> tuple[Entry, ...]:
    """Encoder and decoder of one model, which have the same kind of layers."""
    options = _TOKENS | {"decoder_start_token_id": 0} | options
    crossed = Blocks(**{**vars(blocks), "cross": True})
    return (
        Entry(f"{name}-encoder", "encoder", config, model, blocks, options),
        Entry(f"{name}-decoder", "seq2seq", config, model, crossed, options),
    )


def _sizes(blocks: Blocks) -> dict[str, Any]:
    return {
        "hidden_size": blocks.hidden,
        "num_hidden_layers": blocks.layers,
        "num_attention_heads": blocks.heads,
        "num_key_value_heads": blocks.kv_heads,
        "intermediate_size": blocks.ffn,
    }


def _post(ffn: int, **more: Any) -> Blocks:
    return Blocks(ffn, style="post-norm", **more)


def _gated(ffn: int, kv_heads: int = 2, **more: Any) -> Blocks:
    return Blocks(ffn, gated=True, norm="rms", kv_heads=kv_heads, rotary=True, **more)


def _t5(ffn: int, **more: Any) -> Blocks:
    return Blocks(ffn, norm="rms", scale=1.0, **more)


_SANDWICH = ("norm after attention", "norm after MLP")
_LAYER_SCALE = ("layer scale after attention", "layer scale after MLP")
_T5_SIZES = {"d_model": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4}
_BART_SIZES = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_FALCON = {"alibi": False, "num_kv_heads": 4, "bias": False}

_ENTRIES = (
    _decoder("llama", "Llama", _gated(86)),
    _decoder("mistral", "Mistral", _gated(91, head_dim=24), head_dim=24, sliding_window=None),
    _decoder("mistral-sliding", "Mistral", _gated(91, kv_heads=1), sliding_window=4),
    _decoder("qwen2", "Qwen2", _gated(77)),
    _decoder("qwen3", "Qwen3", _gated(79, head_norm=True), head_dim=16),
    _decoder("gemma", "Gemma", _gated(81, activation="gelu-tanh"), head_dim=16),
    _decoder(
        "gemma2", "Gemma2",
        _gated(83, activation="gelu-tanh", scale=20**-0.5, softcap=50.0, extras=_SANDWICH),
        head_dim=16, sliding_window=4, query_pre_attn_scalar=20,
    ),
    _decoder(
        "stablelm", "StableLm",
        Blocks(85, gated=True, rotary=True), partial_rotary_factor=0.5,
    ),
    _decoder("phi3", "Phi3", _gated(87)),
    _decoder(
        "mixtral", "Mixtral", _gated(89, experts=True, extras=("mixture of experts",)),
        num_local_experts=4, num_experts_per_tok=2,
    ),
    _decoder("opt", "OPT", Blocks(131, activation="relu"), ffn_dim=131, word_embed_proj_dim=64),
    _decoder("gpt2", "GPT2", Blocks(133, activation="gelu-tanh"), n_inner=133),
    _decoder(
        "gptj", "GPTJ", Blocks(129, style="parallel", rotary=True, activation="gelu-tanh"),
        n_inner=129, rotary_dim=8, n_embd=64, n_layer=2, n_head=4, n_positions=64,
    ),
    _decoder("gpt-neox", "GPTNeoX", Blocks(119, style="parallel", rotary=True)),
    _decoder(
        "phi", "Phi", Blocks(123, style="parallel", kv_heads=2, rotary=True, activation="gelu-tanh")
    ),
    _decoder(
        "falcon", "Falcon", Blocks(135, style="parallel", kv_heads=1, rotary=True),
        ffn_hidden_size=135, **_FALCON,
    ),
    _decoder(
        "falcon-new", "Falcon",
        Blocks(137, style="parallel", kv_heads=2, rotary=True, cache_heads=4),
        ffn_hidden_size=137, new_decoder_architecture=True, **_FALCON | {"num_kv_heads": 2},
    ),
    _decoder(
        "falcon-alibi", "Falcon", Blocks(139), ffn_hidden_size=139, multi_query=False,
        parallel_attn=False, **_FALCON | {"alibi": True, "bias": True},
    ),
    _decoder("bloom", "Bloom", Blocks(256, activation="gelu-tanh"), n_layer=2, n_head=4),
    _decoder("mpt", "Mpt", Blocks(256), d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
    _encoder("bert", "Bert", "Model", _post(125)),
    _encoder("roberta", "Roberta", "ForSequenceClassification", _post(117), type_vocab_size=1),
    _encoder("distilbert", "DistilBert", "Model", _post(121), hidden_dim=121),
    _encoder(
        "deberta", "DebertaV2", "Model", _post(149, refused="disentangled"),
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
        type_vocab_size=0,
    ),
    *_halves(
        "t5", "T5Config", "T5ForConditionalGeneration", _t5(141, activation="relu"),
        d_ff=141, **_T5_SIZES,
    ),
    *_halves(
        "t5-gated", "T5Config", "T5ForConditionalGeneration",
        _t5(143, gated=True, activation="gelu-tanh"),
        d_ff=143, feed_forward_proj="gated-gelu", **_T5_SIZES,
    ),
    *_halves(
        "bart", "BartConfig", "BartForConditionalGeneration", _post(145),
        encoder_ffn_dim=145, decoder_ffn_dim=145, **_BART_SIZES,
    ),
    *_halves(
        "whisper", "WhisperConfig", "WhisperForConditionalGeneration", Blocks(147),
        encoder_ffn_dim=147, decoder_ffn_dim=147, num_mel_bins=8, max_source_positions=10,
        max_target_positions=64, **_BART_SIZES,
    ),
    _encoder(
        "clip-text", "CLIPText", "ModelWithProjection", Blocks(113, activation="quick-gelu"),
        projection_dim=24,
    ),
    _vision(
        "clip-vision", "CLIPVision", "ModelWithProjection", Blocks(111, activation="quick-gelu"),
        projection_dim=24,
    ),
    _encoder("siglip-text", "SiglipText", "Model", Blocks(109, activation="gelu-tanh")),
    _vision("siglip-vision", "SiglipVision", "Model", Blocks(107, activation="gelu-tanh")),
    _vision("vit", "ViT", "ForImageClassification", Blocks(127), num_labels=5),
    _vision("deit", "DeiT", "Model", Blocks(115)),
    _vision("dinov2", "Dinov2", "Model", Blocks(256, extras=_LAYER_SCALE), mlp_ratio=4),
    # Several windows in both stages; a single one is attention over all tokens, and so a block.
    Entry(
        "swin", "vision", "SwinConfig", "SwinModel", Blocks(0, layers=4, refused="window"),
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4},
    ),
)  # fmt: skip
FAMILIES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def make_model(entry: Entry, seed: int = 0, **options: Any) -> Any:
    """The random torch model of an entry, in eval mode.

    Args:
        entry: The family.
        seed: Of all its numbers.
        options: Of the configuration, over those of the entry.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, entry.config)(**{**entry.options, **options})
    if entry.model:
        model = getattr(transformers, entry.model)(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    _draw(model, torch.Generator().manual_seed(seed + 1))
    return model.eval()


def _draw(model: Any, generator: Any) -> None:
    import torch

    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in norms and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif any(word in name for word in ("embed", "wte", "wpe", "token", "shared", "bias")):
                parameter.copy_(0.5 * noise)
            else:
                # Variance-preserving, so that attention is far from uniform and every weight shows.
                fan = parameter.numel() / parameter.shape[0]
                if parameter.ndim == 3 and "experts" in name:
                    fan = parameter.shape[-1]
                parameter.copy_(noise / fan**0.5)


@dataclass(frozen=True)
class Sizes:
    """Of a feed: rows, new tokens, tokens in the cache, tokens the encoder gave."""

    batch: int = 3
    sequence: int = 6
    past: int = 4
    source: int = 5


def make_feeds(
    entry: Entry,
    kv_cache: bool = False,
    *,
    seed: int = 0,
    **sizes: int,
) -> dict[str, np.ndarray]:
    """Random inputs of an export; the last row of a text batch is padded at its right end.

    Rows of fewer than three tokens stay unpadded, so that no query is without a key.

    Args:
        entry: The family.
        kv_cache: Whether the export has a cache.
        seed: Of the numbers, and of how many tokens are padding.
        sizes: Fields of ``Sizes``.
    """
    size = Sizes(**sizes)
    rng = np.random.default_rng(seed)
    if entry.kind == "vision":
        side = entry.options["image_size"]
        return {"pixel_values": rng.standard_normal((size.batch, 3, side, side), dtype=np.float32)}
    if entry.kind == "encoder" and "num_mel_bins" in entry.options:
        bins, frames = entry.options["num_mel_bins"], 2 * entry.options["max_source_positions"]
        shape = (size.batch, bins, frames)
        return {"input_features": rng.standard_normal(shape, dtype=np.float32)}
    if entry.kind == "seq2seq":
        return _seq2seq_feeds(entry, kv_cache, size, rng)
    past = size.past if kv_cache else 0
    ids = rng.integers(3, _END, (size.batch, size.sequence))
    mask = np.ones((size.batch, past + size.sequence), np.int64)
    ids[:, -1] = _END
    if size.sequence >= 3 and size.batch > 1:
        padding = 1 + seed % 2
        mask[-1, -padding:] = 0
        ids[-1, -padding:] = 1
        ids[-1, -padding - 1] = _END
    feeds = {"input_ids": ids, "attention_mask": mask}
    if entry.kind == "decoder":
        feeds["position_ids"] = np.tile(np.arange(past, past + size.sequence), (size.batch, 1))
    if entry.name == "bert":
        feeds["token_type_ids"] = rng.integers(0, 2, (size.batch, size.sequence))
    if kv_cache:
        feeds |= _cache(entry, ("",), rng, size.batch, past)
    return feeds


def _cache(
    entry: Entry, parts: tuple[str, ...], rng: np.random.Generator, batch: int, length: int
) -> dict[str, np.ndarray]:
    blocks = entry.blocks
    shape = (batch, blocks.cache_heads or blocks.kv_heads, length, blocks.head_dim)
    return {
        f"past_key_values.{layer}.{part}{side}": rng.standard_normal(shape, dtype=np.float32)
        for layer in range(blocks.layers)
        for part in parts
        for side in ("key", "value")
    }


def _seq2seq_feeds(
    entry: Entry, kv_cache: bool, size: Sizes, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Of the decoder half; with a cache, keys and values of the encoder's tokens are in it too."""
    feeds = {"decoder_input_ids": rng.integers(3, _END, (size.batch, size.sequence))}
    mask = np.ones((size.batch, size.source), np.int64)
    if size.batch > 1 and size.source >= 3:
        mask[-1, -1:] = 0
    audio = "num_mel_bins" in entry.options  # its encoder has no padding
    if not audio:
        feeds["encoder_attention_mask"] = mask
    if kv_cache:
        feeds |= _cache(entry, ("decoder.",), rng, size.batch, size.past)
        feeds |= _cache(entry, ("encoder.",), rng, size.batch, size.source)
        return feeds
    hidden = (size.batch, size.source, entry.blocks.hidden)
    feeds["encoder_hidden_states"] = rng.standard_normal(hidden, dtype=np.float32)
    return feeds


def torch_outputs(
    entry: Entry, kv_cache: bool, feeds: Mapping[str, np.ndarray], model: Any = None
) -> dict[str, np.ndarray]:
    """What torch itself gives for the feeds of an export, under the export's output names."""
    import torch
    from transformers import DynamicCache

    model = make_model(entry) if model is None else model
    if getattr(model.config, "num_local_experts", None):
        # The default kernel for groups of tokens wants rows of 16 bytes in memory.
        model.set_experts_implementation("batched_mm")
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
