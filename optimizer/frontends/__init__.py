"""Ways in that are not an ONNX file: Hugging Face folders or ids, and torch module factories.

Importing this package loads neither torch nor transformers; each function does when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["export_hugging_face", "export_torch", "is_model_spec"]

_FACTORY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def is_model_spec(text: str) -> Literal["hf", "torch", "onnx"]:
    """Say which frontend a MODEL argument belongs to, by its spelling alone.

    Args:
        text: ``hf:DIR-or-ID``, ``package.module:factory`` or the path of an ONNX file. A path that
            exists wins over the factory spelling, so that a file named ``a:b`` stays reachable.
    """
    if text.startswith("hf:"):
        return "hf"
    if _FACTORY.fullmatch(text) and not Path(text).exists():
        return "torch"
    return "onnx"


def export_hugging_face(
    source: str,
    out_dir: Path,
    *,
    kv_cache: bool = False,
    opset: int = 23,
    task: str | None = None,
) -> Path:
    """See :func:`optimizer.frontends.hugging_face.export_hugging_face`."""
    from optimizer.frontends import hugging_face

    return hugging_face.export_hugging_face(
        source, out_dir, kv_cache=kv_cache, opset=opset, task=task
    )


def export_torch(
    spec_or_module: Any,
    out_dir: Path,
    *,
    example_inputs: Any = None,
    opset: int = 23,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """See :func:`optimizer.frontends.torch_module.export_torch`."""
    from optimizer.frontends import torch_module

    return torch_module.export_torch(
        spec_or_module,
        out_dir,
        example_inputs=example_inputs,
        opset=opset,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
    )
