"""BLIP and LLaVA with random weights, in one graph each, as torch's exporter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def blip(target: Path) -> None:
    """Image and text, which attends to the image: whether they match [batch, 2]."""
    import torch
    from transformers import BlipConfig, BlipForImageTextRetrieval

    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3,
    }  # fmt: skip
    config = BlipConfig(
        text_config=text, vision_config=VISION, projection_dim=16, image_text_hidden_size=16
    )
    model = BlipForImageTextRetrieval(config).eval()
    for parameter in model.parameters():  # the configuration starts the image tower at 1e-10
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    torch.nn.init.zeros_(model.vision_model.embeddings.position_embedding)

    class Match(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, pixel_values: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values
            ).itm_score

    ids = torch.ones(2, 5, dtype=torch.long)
    names = ["input_ids", "attention_mask", "pixel_values"]
    axes = {name: {0: "batch", 1: "text"} for name in names[:2]} | {"pixel_values": {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(
            Match(), (ids, ids, torch.zeros(2, 3, 32, 32)), str(target), dynamo=False,
            opset_version=17, input_names=names, output_names=["match"], dynamic_axes=axes,
        )  # fmt: skip


def llava(target: Path) -> None:
    """An image in front of a text, for a language model: scores [batch, 16 + text, vocabulary]."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=63
    )
    model = Llava(config).eval()

    class Joined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, pixel_values: Any) -> Any:
            inner = self.model.model
            seen = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2]
            image = inner.multi_modal_projector(seen[:, 1:])
            words = inner.language_model.embed_tokens(input_ids)
            joined = torch.cat([image, words], dim=1)
            found = inner.language_model(inputs_embeds=joined, use_cache=False)
            return self.model.lm_head(found.last_hidden_state)

    batch, words = (torch.export.Dim(name, max=32) for name in ("batch", "text"))
    feed = torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 3, 32, 32)
    program = torch.onnx.export(
        Joined(), feed, dynamo=True, input_names=["input_ids", "pixel_values"],
        output_names=["logits"], dynamic_shapes=({0: batch, 1: words}, {0: batch}), verbose=False,
    )  # fmt: skip
    program.save(target, external_data=False)


def feed_of(names: list[str], text: int = 5) -> dict[str, np.ndarray]:
    """Random images and texts for the inputs of these names; the second text is shorter."""
    rng = np.random.default_rng(3)
    valid = np.ones((2, text), np.int64)
    valid[1, -2:] = 0
    feed = {
        "input_ids": rng.integers(4, 60, (2, text)),
        "attention_mask": valid,
        "pixel_values": rng.normal(0, 1, (2, 3, 32, 32)).astype(np.float32),
    }
    return {name: feed[name] for name in names}
