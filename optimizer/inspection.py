"""What is in a model, as data: for ``optimize inspect``."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer import graph
from optimizer.blocks import Block, Experts, Linear, Mlp, find_blocks
from optimizer.fusion.cache import KV_GROUPS_KEY
from optimizer.fusion.legality import GROUP_KEY
from optimizer.half_weights import stored_bytes
from optimizer.model_io import external_files, hash_file, load_model
from optimizer.pass_base import Context
from optimizer.quantized_parts import stored
from passes import get_pass


def describe_model(path: Path, custom_ops: Sequence[Path] = ()) -> dict[str, Any]:
    """Inputs, outputs, operators, sizes and provenance of the file; blocks of its canonical form.

    Raises:
        ModelError: See ``model_io.load_model``.
    """
    model = load_model(path, custom_ops)
    weights: collections.Counter[str] = collections.Counter()
    parameters = 0
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            weights[value.const_value.dtype.name.lower()] += value.const_value.nbytes
            parameters += value.const_value.size
    operators = collections.Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )
    data = [item for item in external_files(model) if item != path.resolve()]
    return {
        "file": str(path),
        "sha256": hash_file(path),
        "external_data": [{"file": item.name, "bytes": item.stat().st_size} for item in data],
        "ir_version": model.ir_version,
        "opsets": dict(sorted(model.graph.opset_imports.items())),
        "producer": f"{model.producer_name or 'unknown'} {model.producer_version or ''}".strip(),
        "inputs": [_value(value) for value in model.graph.inputs],
        "outputs": [_value(value) for value in model.graph.outputs],
        "nodes": sum(1 for _ in model.graph),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "bytes": graph.size_bytes(model),
        "parameters": parameters,
        "bytes_by_type": dict(sorted(weights.items())),
        "provenance": _provenance(model),
        **_structure(model),
    }


def _value(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [str(dim) for dim in value.shape]
    return {
        "name": value.name,
        "type": None if value.dtype is None else value.dtype.name.lower(),
        "shape": shape,
    }


def _provenance(model: ir.Model) -> dict[str, Any] | None:
    recipe = model.metadata_props.get("optimize.recipe")
    if recipe is None:
        return None
    return {"tool": model.producer_version, "recipe": json.loads(recipe)}


def _structure(model: ir.Model) -> dict[str, Any]:
    """Blocks of the canonical form and what stood in the way of it; ``model`` is rewritten."""
    canonicalize = get_pass("canonicalize")()
    report = canonicalize.call(model, Context())
    structure = find_blocks(model)
    return {
        "kv_cache": _facts(model, "optimize.kv_cache"),
        "kv_groups": _facts(model, KV_GROUPS_KEY),
        "blocks": [_block(block) for block in structure.blocks],
        "misses": [{"site": site, "reason": reason} for site, reason in structure.misses],
        "not_raised": [{"site": skip.site, "reason": skip.reason} for skip in report.skipped],
    }


def _facts(model: ir.Model, key: str) -> Any:
    """What a pass has noted in the metadata; None where nothing is."""
    return json.loads(model.metadata_props.get(key, "null"))


def _block(block: Block) -> dict[str, Any]:
    attention, mlp = block.attention, block.mlp
    linears: list[Linear | None] = [attention.q, attention.k, attention.v, attention.o]
    if isinstance(mlp, Mlp):
        linears += [mlp.up, mlp.gate, mlp.down]
    if block.cross is not None:
        linears += [block.cross.q, block.cross.k, block.cross.v, block.cross.o]
    values = [v for layer in linears if layer for v in (stored(layer.weight), layer.bias)]
    if isinstance(mlp, Experts):
        values += dict.fromkeys(v for node in mlp.nodes for v in node.inputs)
    tensors = [tensor for v in values if (tensor := graph.constant(v)) is not None]
    members = attention.node.metadata_props.get(GROUP_KEY)
    return {
        "index": block.index,
        "layers": None if members is None else [int(number) for number in members.split(",")],
        "parameters": sum(tensor.size for tensor in tensors),
        "bytes": sum(stored_bytes(tensor) for tensor in tensors),
        "style": block.style.value,
        "norm": block.attention_norm.kind.value,
        "hidden": block.hidden_size,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rotary": attention.q_rotary is not None,
        "kv_cache": attention.past_key is not None,
        "causal": attention.is_causal,
        "mlp": _mlp_kind(mlp),
        "activation": None if isinstance(mlp, Experts) else mlp.activation,
        "cross_attention": block.cross is not None,
        "extras": list(block.extras),
    }


def _mlp_kind(mlp: Mlp | Experts) -> str:
    if isinstance(mlp, Experts):
        return "experts"
    return "gated" if mlp.gate is not None else "plain"
