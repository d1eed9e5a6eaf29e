"""Turns a KV cache that is appended to into one that is filled in place.

Canonical Attention reads the past and returns past and new keys as a longer array: each step copies
the whole cache. ``com.microsoft.GroupQueryAttention`` writes the new keys behind the old ones in
the past's own buffer when the caller binds past and present to the same memory, of any
``max_length``. Where they are not the same memory it copies, and the results are the same.

The operator has its own mask: causal, rows filled up to ``seqlens_k``, and optionally a sliding
window. So the model's mask must be proven to be just that (``mask_proof``). Rows padded on the
right are stored without their padding; a window then counts tokens, where the appended form counts
the padding between prompt and new tokens too.

What a caller must know travels in the model's metadata under ``optimize.kv_cache``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.errors import UnsupportedError
from optimizer.legalize.int8 import CONTRIB
from optimizer.legalize.mask_proof import Roles, Window, find_roles, prove
from optimizer.raising.base import allow
from optimizer.targets import KV_CACHE_KEY

#: Name of the sequence dimension of the buffers.
MAX_LENGTH = "max_length"
#: ONNX Runtime's kernel refuses other head sizes.
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class _Site:
    """One Attention with its cache and the window proven for its mask."""

    node: ir.Node
    past: tuple[ir.Value, ...]
    window: Window


def lower(model: ir.Model) -> int:
    """Rewrite all attention layers of ``model``; returns their number.

    Raises:
        UnsupportedError: One cannot be rewritten: half a model in place is of no use.
    """
    sites, roles = _find(model)
    if not allow("all layers", "kv cache in place"):
        return 0
    lengths = _lengths(model.graph, sites[0].node, roles.padding)
    presents = [_rewrite(model.graph, site, lengths) for site in sites]
    graphs.remove_dead(model)
    _correct_shapes(model.graph, roles)
    graphs.remove_dead(model)
    model.graph.opset_imports[CONTRIB] = 1
    _declare(model, sites, presents)
    return len(sites)


def _refuse(what: str) -> UnsupportedError:
    return UnsupportedError(f"--kv-cache in-place: {what}; use --kv-cache append")


def _find(model: ir.Model) -> tuple[list[_Site], Roles]:
    nodes = [n for n in model.graph if n.op_type == "Attention" and n.domain == ""]
    if not nodes:
        raise _refuse("the model has no attention that was recognised")
    pasts: list[ir.Value] = []
    for node in nodes:
        fault = _fault(node)
        if fault is not None:
            raise _refuse(f"node '{node.name}': {fault}")
        pasts.extend(value for value in node.inputs[4:6] if value is not None)
    if len(set(pasts)) != len(pasts):
        raise _refuse("two attention layers share one cache")
    roles = find_roles(model, pasts)
    if isinstance(roles, str):
        raise _refuse(roles)
    return _prove_all(model, nodes, roles), roles


def _prove_all(model: ir.Model, nodes: Sequence[ir.Node], roles: Roles) -> list[_Site]:
    proven: dict[tuple[ir.Value | None, int], Window | str] = {}
    sites = []
    for node in nodes:
        key = (node.inputs[3], _int(node, "is_causal"))
        if key not in proven:
            proven[key] = prove(model, key[0], roles, causal=bool(key[1]))
        window = proven[key]
        if isinstance(window, str):
            raise _refuse(f"node '{node.name}': {window}")
        pasts = tuple(value for value in node.inputs[4:6] if value is not None)
        sites.append(_Site(node, pasts, window))
    return sites


def _int(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _fault(node: ir.Node) -> str | None:
    """Why this Attention cannot become GroupQueryAttention, apart from its mask."""
    pasts = [value for value in node.inputs[4:6] if value is not None]
    if len(pasts) != 2:
        return "it has no KV cache"
    if len(node.outputs) < 3:
        return "it does not return its keys and values"
    if len(node.outputs) > 3 and node.outputs[3].uses():
        return "its scores are an output"
    if _int(node, "q_num_heads") == 0 or _int(node, "kv_num_heads") == 0:
        return "it is not in the 3-D form"
    for present in node.outputs[1:3]:
        if [user.op_type for user, _ in present.uses()] == ["Cast"]:
            return (
                f"its present '{present.name}' is computed in another type than it is returned in"
            )
        if not present.is_graph_output() or present.uses():
            return f"its present '{present.name}' is not just a model output"
    for past in pasts:
        fault = _past_fault(past, node)
        if fault is not None:
            return f"its past '{past.name}' {fault}"
    return _size_fault(*(_head_size(past) for past in pasts))


def _size_fault(key: int, value: int) -> str | None:
    if key != value:
        return "keys and values have different head sizes"
    if key % _HEAD_MULTIPLE:
        return f"its head size {key} is not a multiple of {_HEAD_MULTIPLE}"
    return None


def _past_fault(past: ir.Value, node: ir.Node) -> str | None:
    if not past.is_graph_input():
        return "is not a model input"
    strange = [use.node.op_type for use in past.uses() if not _harmless(use.node, node)]
    if strange:
        return f"is also read by {strange[0]}"
    if past.shape is None or len(past.shape) != 4:
        return "is not declared as [batch, heads, length, size]"
    if not isinstance(past.shape[1], int) or not isinstance(past.shape[3], int):
        return "has no fixed number or size of heads"
    return None


def _head_size(past: ir.Value) -> int:
    assert past.shape is not None  # noqa: S101 - see _past_fault
    return int(past.shape[3])  # type: ignore[arg-type]


def _harmless(user: ir.Node, attention: ir.Node) -> bool:
    return user is attention or (user.op_type == "Shape" and user.domain == "")


def _lengths(graph: ir.Graph, anchor: ir.Node, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Index of each row's last token [B] and the total length, both int32."""
    int32 = ir.DataType.INT32
    one = graphs.add_initializer(graph, "kv_one", np.array([1], np.int64))

    def put(op: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Value:
        return graphs.insert(graph, anchor, op, inputs, attributes, name=name)

    count = put("ReduceSum", (mask, one), "kv_token_count", keepdims=0)
    if mask.dtype != int32:
        count = put("Cast", (count,), "kv_token_count_int32", to=int32.value)
    last = put("Sub", (count, graphs.add_initializer(graph, "kv_one_int32", np.array(1, np.int32))),
               "kv_last_token")  # fmt: skip
    size = put("Shape", (mask,), "kv_total_shape", start=1, end=2)
    total = put("Cast", (put("Squeeze", (size,), "kv_total"),), "kv_total_int32", to=int32.value)
    return last, total


def _rewrite(graph: ir.Graph, site: _Site, lengths: tuple[ir.Value, ...]) -> tuple[ir.Value, ...]:
    """Replace the node; returns the new present values."""
    node = site.node
    attributes: dict[str, int | float] = {
        "num_heads": _int(node, "q_num_heads"),
        "kv_num_heads": _int(node, "kv_num_heads"),
        "do_rotary": 0,
    }
    for name in ("scale", "softcap"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_float() != 0.0:
            attributes[name] = attribute.as_float()
    if site.window.size:
        attributes["local_window_size"] = site.window.size
    olds = tuple(node.outputs[:3])
    news = graphs.insert(
        graph, node, "GroupQueryAttention", (*node.inputs[:3], *site.past, *lengths), attributes,
        domain=CONTRIB, outputs=3, name=olds[0].name, dtype=tuple(old.dtype for old in olds),
        shape=tuple(old.shape for old in olds),
    )  # fmt: skip
    for old, new in zip(olds, news, strict=True):
        graphs.replace_value(old, new, keep_name=True)
    graph.remove(node, safe=True)
    for value in (*site.past, *news[1:]):
        like = value.shape if value.shape is not None else site.past[0].shape
        assert like is not None  # noqa: S101 - see _past_fault
        value.shape = ir.Shape([*like[:2], MAX_LENGTH, *like[3:]])
    return tuple(news[1:])


def _correct_shapes(graph: ir.Graph, roles: Roles) -> None:
    """Where the length of the past is still asked for, answer with tokens, not with the buffer."""
    for past in roles.pasts:
        for node in [use.node for use in past.uses() if use.node.op_type == "Shape"]:
            start, end = _int(node, "start"), node.attributes.get("end")
            stop = 4 if end is None else end.as_int()
            span = range(4)[start:stop]
            if 2 not in span:
                continue
            parts = [
                _past(graph, node, roles) if axis == 2 else _dim(graph, node, past, axis)
                for axis in span
            ]
            whole = parts[0]
            if len(parts) > 1:
                whole = graphs.insert(graph, node, "Concat", parts, {"axis": 0},
                                      dtype=ir.DataType.INT64, shape=(len(parts),))  # fmt: skip
            graphs.replace_value(node.outputs[0], whole, keep_name=True)


def _dim(graph: ir.Graph, anchor: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    return graphs.insert(
        graph, anchor, "Shape", (value,), {"start": axis, "end": axis + 1},
        name=f"{value.name}_dim{axis}", dtype=ir.DataType.INT64, shape=(1,),
    )  # fmt: skip


def _past(graph: ir.Graph, anchor: ir.Node, roles: Roles) -> ir.Value:
    total, new = _dim(graph, anchor, roles.padding, 1), _dim(graph, anchor, roles.tokens, 1)
    return graphs.insert(
        graph, anchor, "Sub", (total, new), name="kv_past_length",
        dtype=ir.DataType.INT64, shape=(1,),
    )  # fmt: skip


def _declare(
    model: ir.Model, sites: Sequence[_Site], presents: Sequence[tuple[ir.Value, ...]]
) -> None:
    pairs = {
        str(past.name): str(present.name)
        for site, outputs in zip(sites, presents, strict=True)
        for past, present in zip(site.past, outputs, strict=True)
    }
    facts = {
        "form": "in-place",
        "buffers": pairs,
        "layout": f"[batch, kv_heads, {MAX_LENGTH}, head_dim]",
        "padding": "right",
        "chunked_prefill": "batch 1",
        "windows": [site.window.size for site in sites],
    }
    model.metadata_props[KV_CACHE_KEY] = json.dumps(facts)
