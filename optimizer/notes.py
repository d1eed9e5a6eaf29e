"""What this program leaves in a model's metadata for later runs, and whether it can be read again.

Another program, or a hand, may have written the same keys. What is not as this program writes it
counts as not there.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import onnx_ir as ir
from pydantic import BaseModel, TypeAdapter, ValidationError


class _Group(BaseModel):
    """Layers that share a KV cache (``fusion.cache``)."""

    layers: list[int]
    heads: list[tuple[int, int]]
    past: list[str]
    present: list[str]


class _Cache(BaseModel):
    """A KV cache in another form than the appended one (``legalize.kv_in_place``)."""

    form: Literal["in-place"]
    buffers: dict[str, str]


#: Keys of the model whose value is JSON, and what it holds.
_JSON: dict[str, TypeAdapter[Any]] = {
    "optimize.recipe": TypeAdapter(dict[str, Any]),
    "optimize.kv_groups": TypeAdapter(dict[str, _Group]),
    "optimize.kv_cache": TypeAdapter(_Cache),
}
#: Keys whose value is a number, or several.
_NUMBERS = {
    "optimize.bos_token_id": re.compile(r"\d{1,9}"),
    "optimize.group": re.compile(r"\d{1,6}(,\d{1,6})*"),
}


def drop_unreadable(model: ir.Model) -> None:
    """Remove notes of ours that are not as this program writes them."""
    for properties in (model.metadata_props, *(n.metadata_props for n in model.graph.all_nodes())):
        for key in [key for key, text in properties.items() if not _is_readable(key, text)]:
            del properties[key]


def _is_readable(key: str, text: str) -> bool:
    if key in _NUMBERS:
        return _NUMBERS[key].fullmatch(text) is not None
    if key not in _JSON:
        return True
    try:
        _JSON[key].validate_json(text)
    except ValidationError:
        return False
    return True
