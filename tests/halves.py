"""The two halves of encoder-decoder models as modules with flat inputs. Imports torch."""

from __future__ import annotations

from typing import Any

import torch
from families import Entry
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from optimizer.frontends.onnx_export import Signature

_B, _S, _P, _T = 2, 3, 5, 7  # all different, none of them 1
_PREFIX = "model."
_DYNAMIC = torch.export.Dim.DYNAMIC


class Encoder(torch.nn.Module):
    """The encoder: its inputs to ``last_hidden_state``."""

    def __init__(self, model: Any, inputs: list[str]) -> None:
        super().__init__()
        self.model = model.get_encoder()
        self.inputs = inputs

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.inputs, tensors, strict=True))).last_hidden_state


class Decoder(torch.nn.Module):
    """The decoder with the head, reading what the encoder gave."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, decoder_input_ids: torch.Tensor, mask: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        extra = {} if mask is None else {"attention_mask": mask}
        return self.model(
            encoder_outputs=BaseModelOutput(hidden),
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
            **extra,
        ).logits


class CachedDecoder(torch.nn.Module):
    """The decoder with two caches: of its own tokens, and of the encoder's, which is complete."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        own: list[torch.Tensor],
        encoded: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = EncoderDecoderCache(
            DynamicCache(ddp_cache_data=_pairs(own)), DynamicCache(ddp_cache_data=_pairs(encoded))
        )
        batch, length = encoded[0].shape[0], encoded[0].shape[2]
        hidden = torch.zeros(batch, length, self.model.config.d_model, dtype=encoded[0].dtype)
        output = self.model(
            encoder_outputs=BaseModelOutput(hidden),
            decoder_input_ids=decoder_input_ids,
            past_key_values=cache,
            use_cache=True,
            **({} if mask is None else {"attention_mask": mask}),
        )
        present = output.past_key_values.self_attention_cache.layers
        return (output.logits, *(side for layer in present for side in (layer.keys, layer.values)))


def _pairs(flat: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def build(entry: Entry, model: Any, kv_cache: bool) -> tuple[Any, Signature]:
    """Wrapper and signature of one half."""
    dtype = next(model.parameters()).dtype
    if entry.kind == "encoder":
        return _encoder(entry, model, dtype)
    audio = "num_mel_bins" in entry.options
    ids = torch.arange(_B * _S).reshape(_B, _S) + 3
    mask = None if audio else torch.ones(_B, _T, dtype=torch.long)
    plane = {0: _DYNAMIC, 1: _DYNAMIC}
    axes = {"decoder_input_ids": {0: "batch", 1: "sequence"}}
    if not audio:
        axes["encoder_attention_mask"] = {0: "batch", 1: "source"}
    if not kv_cache:
        axes["encoder_hidden_states"] = {0: "batch", 1: "source"}
        hidden = torch.zeros(_B, _T, entry.blocks.hidden, dtype=dtype)
        return Decoder(model), Signature(
            (ids, mask, hidden), (plane, None if audio else plane, plane), list(axes), ["logits"],
            axes, prefix=_PREFIX,
        )  # fmt: skip
    blocks = entry.blocks
    names = [f"{n}.decoder.{side}" for n in range(blocks.layers) for side in ("key", "value")]
    encoded = [name.replace("decoder", "encoder") for name in names]
    axes |= {f"past_key_values.{name}": {0: "batch", 2: "past_sequence"} for name in names}
    axes |= {f"past_key_values.{name}": {0: "batch", 2: "source"} for name in encoded}
    own = [torch.zeros(_B, blocks.kv_heads, _P, blocks.head_dim, dtype=dtype) for _ in names]
    other = [torch.zeros(_B, blocks.kv_heads, _T, blocks.head_dim, dtype=dtype) for _ in encoded]
    cache = [{0: _DYNAMIC, 2: _DYNAMIC} for _ in names]
    return CachedDecoder(model), Signature(
        (ids, mask, own, other), (plane, None if audio else plane, cache, list(cache)), list(axes),
        ["logits", *(f"present.{name}" for name in names)], axes, prefix=_PREFIX,
    )  # fmt: skip


def _encoder(entry: Entry, model: Any, dtype: torch.dtype) -> tuple[Any, Signature]:
    if "num_mel_bins" in entry.options:
        frames = 2 * entry.options["max_source_positions"]
        inputs = {
            "input_features": torch.zeros(_B, entry.options["num_mel_bins"], frames, dtype=dtype)
        }
        axes = {"input_features": {0: "batch"}}
        shapes = {0: _DYNAMIC}
    else:
        ids = torch.arange(_B * _S).reshape(_B, _S) + 3
        inputs = {"input_ids": ids, "attention_mask": torch.ones(_B, _S, dtype=torch.long)}
        axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
        shapes = {0: _DYNAMIC, 1: _DYNAMIC}
    return Encoder(model, list(inputs)), Signature(
        tuple(inputs.values()), (tuple(shapes for _ in inputs),), list(inputs),
        ["last_hidden_state"], axes, prefix=_PREFIX,
    )  # fmt: skip
