"""Wrappers that give Hugging Face models flat tensor inputs and outputs. Imports torch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache


class Decoder(torch.nn.Module):  # type: ignore[misc]  # torch has no stubs here
    """A causal language model without a cache: token ids, mask and positions to logits."""

    def __init__(self, model: torch.nn.Module, *, positions: bool) -> None:
        super().__init__()
        self.model = model
        self.positions = positions

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[batch, sequence, vocabulary]``."""
        extra = {"position_ids": position_ids} if self.positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra
        )
        return output.logits


class CachedDecoder(torch.nn.Module):  # type: ignore[misc]
    """A causal language model with its cache as a flat list ``[k0, v0, k1, v1, ...]``."""

    def __init__(self, model: torch.nn.Module, *, positions: bool) -> None:
        super().__init__()
        self.model = model
        self.positions = positions

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Logits, then keys and values of past and present per layer."""
        pairs = [(past[i], past[i + 1]) for i in range(0, len(past), 2)]
        extra = {"position_ids": position_ids} if self.positions else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(ddp_cache_data=pairs),
            use_cache=True,
            **extra,
        )
        present: list[torch.Tensor] = []
        for layer in output.past_key_values.layers:
            present += [layer.keys, layer.values]
        return (output.logits, *present)


class Named(torch.nn.Module):  # type: ignore[misc]
    """Any model called with keyword inputs, reduced to some fields of its output."""

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: list[str],
        outputs: list[str],
        *,
        positions: bool = False,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Output fields in their declared order."""
        named = dict(zip(self.inputs, tensors, strict=True))
        if self.positions:
            # Left to itself the model makes positions of batch 1, and rotary embedding is then
            # exported with cosines of batch 1, which ONNX Runtime refuses for larger batches.
            batch, sequence = tensors[0].shape
            named["position_ids"] = torch.arange(sequence)[None].expand(batch, sequence)
        output: Any = self.model(**named)
        return tuple(output[name] for name in self.outputs)
