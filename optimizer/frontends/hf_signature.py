"""Graph signatures of Hugging Face models: which inputs and outputs, which axes are dynamic.

Names follow the convention of the ecosystem's exporters: ``input_ids``, ``attention_mask``,
``position_ids``, ``past_key_values.N.key/value``, ``logits``, ``present.N.key/value``.
"""

from __future__ import annotations

import inspect
from typing import Any

from optimizer.errors import OptionError, UnsupportedError
from optimizer.frontends.onnx_export import Signature, one_line, quiet

_BATCH, _SEQUENCE, _PAST, _TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
# Sizes of the example inputs. All differ, and none is 1, so that torch neither identifies two of
# them nor specialises on broadcasting.
_B, _S, _P = 2, 3, 5
_PREFIX = "model."  # the wrappers of hf_wrappers hold the model under this name


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _vocabulary(config: Any) -> int:
    return int(getattr(config.get_text_config(), "vocab_size", 2))


def cache_shapes(model: Any) -> list[tuple[int, int, int, int]]:
    """``(KV heads, key width, KV heads, value width)`` per layer, read off a cache that ran.

    Configurations spell these numbers in too many ways to trust them.

    Raises:
        UnsupportedError: the model keeps another kind of state (recurrent, compressed, ...).
    """
    import torch

    try:
        with quiet(), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True).past_key_values
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            shapes = [(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in pairs]
    except (AttributeError, TypeError, IndexError, RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} keeps no key/value cache per layer ({one_line(error)}); "
            "export it without --kv-cache"
        ) from error
    if not shapes:
        raise UnsupportedError(f"{type(model).__name__} returned an empty key/value cache")
    return shapes


def decoder(model: Any, *, kv_cache: bool) -> tuple[Any, Signature]:
    """A causal language model: wrapper module and signature.

    The mask covers past and present: ``attention_mask [batch, total_sequence]``.
    """
    import torch

    from optimizer.frontends.hf_wrappers import CachedDecoder, Decoder

    dynamic = torch.export.Dim.DYNAMIC
    positions = _accepts(model, "position_ids")
    past_length = _P if kv_cache else 0
    total = _S + past_length
    ids = (torch.arange(_B * _S) % _vocabulary(model.config)).reshape(_B, _S)
    mask = torch.ones(_B, total, dtype=torch.long)
    where = torch.arange(past_length, total)[None].repeat(_B, 1)
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: _BATCH, 1: _SEQUENCE},
        "attention_mask": {0: _BATCH, 1: _TOTAL if kv_cache else _SEQUENCE},
    }
    if positions:
        axes["position_ids"] = {0: _BATCH, 1: _SEQUENCE}
    plane = {0: dynamic, 1: dynamic}
    if not kv_cache:
        args: tuple[Any, ...] = (ids, mask, where) if positions else (ids, mask)
        signature = Signature(
            args, tuple(plane for _ in args), list(axes), ["logits"], axes, prefix=_PREFIX
        )
        return Decoder(model, positions=positions), signature
    past, names = [], []
    for layer, (key_heads, key_width, value_heads, value_width) in enumerate(cache_shapes(model)):
        past.append(torch.zeros(_B, key_heads, _P, key_width, dtype=model.dtype))
        past.append(torch.zeros(_B, value_heads, _P, value_width, dtype=model.dtype))
        names += [f"{layer}.key", f"{layer}.value"]
    axes |= {f"past_key_values.{name}": {0: _BATCH, 2: _PAST} for name in names}
    signature = Signature(
        args=(ids, mask, where if positions else None, past),
        dynamic_shapes=(
            plane,
            plane,
            plane if positions else None,
            [{0: dynamic, 2: dynamic} for _ in past],
        ),
        inputs=list(axes),
        outputs=["logits", *(f"present.{name}" for name in names)],
        axes=axes,
        sums={_TOTAL: (_PAST, _SEQUENCE)},
        prefix=_PREFIX,
    )
    return CachedDecoder(model, positions=positions), signature


def text_encoder(model: Any, outputs: list[str]) -> tuple[Any, Signature]:
    """A bidirectional or pooled text model: ids, mask and, where they differ, token types."""
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    ids = (torch.arange(_B * _S) % _vocabulary(model.config)).reshape(_B, _S)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(_B, _S, dtype=torch.long)}
    types = getattr(model.config.get_text_config(), "type_vocab_size", 0)
    if types > 1 and _accepts(model, "token_type_ids"):
        inputs["token_type_ids"] = torch.zeros(_B, _S, dtype=torch.long)
    axes = {name: {0: _BATCH, 1: _SEQUENCE} for name in inputs}
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    positions = rotary and _accepts(model, "position_ids")
    return _named(model, inputs, outputs, axes, {0: dynamic, 1: dynamic}, positions=positions)


def vision(model: Any, outputs: list[str]) -> tuple[Any, Signature]:
    """An image model of fixed image size: ``pixel_values [batch, channels, height, width]``."""
    import torch

    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    pixels = torch.zeros(_B, channels, height, width, dtype=model.dtype)
    dynamic = torch.export.Dim.DYNAMIC
    return _named(
        model, {"pixel_values": pixels}, outputs, {"pixel_values": {0: _BATCH}}, {0: dynamic}
    )


def _named(
    model: Any,
    inputs: dict[str, Any],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
    dynamic: dict[int, Any],
    *,
    positions: bool = False,
) -> tuple[Any, Signature]:
    import torch

    from optimizer.frontends.hf_wrappers import Named

    with quiet(), torch.no_grad():
        made = model.eval()(**inputs)
    present = [name for name in outputs if getattr(made, name, None) is not None]
    if not present:
        raise UnsupportedError(
            f"{type(model).__name__} gives none of the outputs {', '.join(outputs)}"
        )
    # torch.export sees a *tensors parameter as one argument that is a tuple.
    shapes = (tuple(dynamic for _ in inputs),)
    signature = Signature(
        tuple(inputs.values()), shapes, list(inputs), present, axes, prefix=_PREFIX
    )
    return Named(model, list(inputs), present, positions=positions), signature


def build(model: Any, kind: str, outputs: list[str], *, kv_cache: bool) -> tuple[Any, Signature]:
    """Wrapper and signature for a loaded model of a kind found by ``hugging_face.detect``.

    Raises:
        OptionError: a key/value cache was asked of a model that is not a decoder.
        UnsupportedError: the model's cache or outputs have another form.
    """
    if kind == "decoder":
        return decoder(model, kv_cache=kv_cache)
    if kv_cache:
        raise OptionError(
            f"{type(model).__name__} is not a causal language model: it has no key/value cache; "
            "leave the option out"
        )
    return text_encoder(model, outputs) if kind == "text" else vision(model, outputs)
