"""Attentions that TensorRT for RTX 1.7 runs, and such that it does not build as they are."""

from __future__ import annotations

import onnx_ir as ir
from rule_case import graph

FLAT = "float16[B,S,32] q, float16[B,S,32] k, float16[B,S,32] v"
TWO = "<q_num_heads = 2, kv_num_heads = 2, scale = 0.3>"
#: Nodes, inputs and outputs of a graph, and how many attentions TensorRT for RTX gets spelled out.
CASES = {
    "16 bits": (f"y = Attention{TWO}(q, k, v)", FLAT, "float16[B,S,32] y", 0),
    "16 bits, causal": (
        "y = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(q, k, v)",
        FLAT, "float16[B,S,32] y", 0,
    ),
    "16 bits, causal and masked": (
        "y = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(q, k, v, m)",
        f"{FLAT}, float16[B,1,S,S] m", "float16[B,S,32] y", 1,
    ),
    "heads of 8": (
        "y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, v)", FLAT, "float16[B,S,32] y", 1,
    ),
    "values of another size": (
        f"y = Attention{TWO}(q, k, v)",
        "float16[B,S,32] q, float16[B,S,32] k, float16[B,S,64] v", "float16[B,S,64] y", 1,
    ),
    "heads of 257": (
        "y = Attention(q, k, v)",
        "float16[B,2,S,257] q, float16[B,2,S,257] k, float16[B,2,S,257] v",
        "float16[B,2,S,257] y", 1,
    ),
    "32 bits": (
        f"y = Attention{TWO}(q, k, v)", FLAT.replace("float16", "float"), "float[B,S,32] y", 1,
    ),
    "16 bits, widened": (
        "a = Cast<to = 1>(q) b = Cast<to = 1>(k) c = Cast<to = 1>(v) "
        f"y = Attention{TWO}(a, b, c)", FLAT, "float[B,S,32] y", 1,
    ),
    "the same keys twice": (
        f"x = Attention{TWO}(q, k, v) y = Attention{TWO}(x, k, v)", FLAT, "float16[B,S,32] y", 2,
    ),
    "the same keys twice, by heads": (
        f"x = Attention{TWO}(q, k, v) kr = Reshape(k, heads) "
        "kt = Transpose<perm = [0, 2, 1, 3]>(kr) xr = Reshape(x, heads) "
        "xt = Transpose<perm = [0, 2, 1, 3]>(xr) vr = Reshape(v, heads) "
        "vt = Transpose<perm = [0, 2, 1, 3]>(vr) y = Attention<scale = 0.3>(xt, kt, vt)",
        FLAT, "float16[B,2,S,16] y", 2,
    ),
    "queries that are keys": (f"y = Attention{TWO}(k, k, v)", FLAT, "float16[B,S,32] y", 1),
    "the same values twice": (
        f"x = Attention{TWO}(q, k, v) kn = Neg(k) y = Attention{TWO}(x, kn, v)",
        FLAT, "float16[B,S,32] y", 0,
    ),
}  # fmt: skip


def case(name: str) -> ir.Model:
    """The graph of a case."""
    nodes, inputs, output, _ = CASES[name]
    return graph(nodes, inputs=inputs, output=output, constants="int64[4] heads = {0, 0, 2, 16}")
