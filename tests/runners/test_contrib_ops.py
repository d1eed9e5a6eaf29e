"""The oracle for ONNX Runtime's own operators agrees with its CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner

RNG = np.random.default_rng(3)
B, S, P, H, C = 2, 5, 3, 4, 8
D = H * C
#: Both sides in float32, sums of at most 32 terms, softmax and a norm: some ten roundings.
TOLERANCE = 32 * np.finfo(np.float32).eps


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def mask(*shape: int) -> np.ndarray:
    kept = np.ones(shape, np.int32)
    kept[-1, ..., -2:] = 0
    return kept


def node(
    op_type: str,
    inputs: list[np.ndarray | None],
    outputs: int = 1,
    domain: str = "com.microsoft",
    unread: int = 0,
    **attributes: Any,
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A model of one node, its inputs those of the graph, and a feed."""
    names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
    feed = {name: a for name, a in zip(names, inputs, strict=True) if a is not None}
    results = [f"o{index}" for index in range(outputs)]
    every = [*results, *(f"unread{index}" for index in range(unread))]
    made = oh.make_node(op_type, names, every, "n", domain=domain, **attributes)
    graph = oh.make_graph(
        [made],
        "g",
        [
            oh.make_tensor_value_info(n, oh.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feed.items()
        ],
        [oh.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in results],
    )
    imports = [oh.make_opsetid("", 18), oh.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(oh.make_model(graph, opset_imports=imports, ir_version=9)), feed


QKV = [floats(B, S, D), floats(B, S, D), floats(B, S, D)]
CACHE = [floats(B, H, P, C), floats(B, H, P, C)]
LENGTHS = np.array([P + S - 1, P + S - 1], np.int32)
TABLES = [floats(16, C // 2), floats(16, C // 2)]
#: Of grouped heads, whose size the kernel wants to be a multiple of 16.
G = 16
ANGLES = [floats(16, G // 2), floats(16, G // 2)]
PACKED = floats(B, S, (H + 4) * G)
GROUPED_CACHE = [floats(B, 2, P, G), floats(B, 2, P, G)]
GROUPED = {"num_heads": H, "kv_num_heads": 2}
CASES: dict[str, tuple[ir.Model, dict[str, np.ndarray]]] = {
    "bias gelu": node("BiasGelu", [floats(B, S, D), floats(D)]),
    "fast gelu": node("FastGelu", [floats(B, S, D), floats(D)]),
    "fast gelu without bias": node("FastGelu", [floats(B, S, D)]),
    "gelu": node("Gelu", [floats(B, S, D)]),
    "quick gelu": node("QuickGelu", [floats(B, S, D)], alpha=1.0),
    "simplified norm": node(
        "SimplifiedLayerNormalization", [floats(B, S, D), floats(D)], domain="", axis=-1,
        epsilon=1e-3,
    ),
    "skip norm": node(
        "SkipLayerNormalization", [floats(B, S, D), floats(B, S, D), floats(D), floats(D)],
        epsilon=1e-3,
    ),
    "skip norm with bias": node(
        "SkipLayerNormalization",
        [floats(B, S, D), floats(B, S, D), floats(D), floats(D), floats(D)], epsilon=1e-3,
    ),
    "skip rms norm": node(
        "SkipSimplifiedLayerNormalization", [floats(B, S, D), floats(B, S, D), floats(D)],
        epsilon=1e-3,
    ),
    **{
        f"matmul {a}{b}{c}{d}": node(
            "FusedMatMul",
            [floats(3, 3, 3, 3), floats(3, 3, 3, 3)],
            alpha=0.5, transA=a, transB=b, transBatchA=c, transBatchB=d,
        )
        for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)
    },
    "gemm": node(
        "FusedGemm", [floats(3, 4), floats(5, 4), floats(5)], transB=1, activation="Tanh",
    ),
    "conv": node("FusedConv", [floats(1, 3, 6, 6), floats(2, 3, 3, 3)], activation="Relu"),
    "rotary": node(
        "RotaryEmbedding",
        [floats(B, S, D), RNG.integers(0, 16, (B, S)), *TABLES],
    ),
    "rotary from an offset": node(
        "RotaryEmbedding", [floats(B, S, D), np.array([4]), *TABLES], interleaved=1,
    ),
    "rotary by heads, in part": node(
        "RotaryEmbedding",
        [floats(B, H, S, C), np.array([0]), floats(16, 2), floats(16, 2)],
        num_heads=H, rotary_embedding_dim=4,
    ),
    "attention of heads": node("MultiHeadAttention", QKV, num_heads=H),
    "with biases": node("MultiHeadAttention", [*QKV, floats(3 * D)], num_heads=H, scale=0.3),
    "with flags": node("MultiHeadAttention", [*QKV, None, mask(B, S)], num_heads=H),
    "with a bias of scores": node(
        "MultiHeadAttention", [*QKV, None, None, floats(B, H, S, S)], num_heads=H
    ),
    "with a cache": node(
        "MultiHeadAttention",
        [*QKV, None, mask(B, P + S), floats(1, 1, S, P + S), *CACHE], outputs=3, num_heads=H,
    ),
    "one way": node("MultiHeadAttention", QKV, num_heads=H, unidirectional=1),
    "over a complete cache": node("MultiHeadAttention", [QKV[0], *CACHE], num_heads=H),
    "packed weights": node(
        "Attention", [floats(B, S, D), floats(D, 3 * D), floats(3 * D), mask(B, S)], num_heads=H
    ),
    "packed weights, lengths": node(
        "Attention",
        [floats(B, S, D), floats(D, 3 * D), floats(3 * D), np.array([S, 3], np.int32)],
        num_heads=H,
    ),
    "packed weights, cache": node(
        "Attention",
        [floats(B, S, D), floats(D, 3 * D), floats(3 * D), None, floats(2, B, H, P, C)],
        outputs=2, num_heads=H, unidirectional=1,
    ),
    "grouped heads": node(
        "GroupQueryAttention",
        [PACKED[:1], None, None, *(c[:1] for c in GROUPED_CACHE), LENGTHS[:1],
         np.array(P + S, np.int32)],
        outputs=3, **GROUPED, scale=0.4, softcap=5.0,
    ),
    "grouped heads that rotate": node(
        "GroupQueryAttention",
        [PACKED[:, :1], None, None, *GROUPED_CACHE, np.array([P, 1], np.int32),
         np.array(P + 1, np.int32), *ANGLES],
        outputs=3, **GROUPED, do_rotary=1, local_window_size=2,
    ),
    "grouped heads, first step": node(
        "GroupQueryAttention",
        [PACKED, None, None, *(c[:, :, :0] for c in GROUPED_CACHE),
         np.array([S - 1, S - 1], np.int32), np.array(S, np.int32), *ANGLES],
        outputs=3, **GROUPED, do_rotary=1, rotary_interleaved=1,
    ),
    "embeddings": node(
        "EmbedLayerNormalization",
        [RNG.integers(0, 9, (B, S)).astype(np.int32), RNG.integers(0, 2, (B, S)).astype(np.int32),
         floats(9, D), floats(S, D), floats(2, D), floats(D), floats(D)],
        unread=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_agrees_with_the_kernel(case: str) -> None:
    model, feed = CASES[case]
    found = ReferenceRunner(model, double=True).run(feed)
    wanted = OrtRunner(model).run(feed)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        bound = TOLERANCE * max(1.0, float(np.abs(value).max()))
        assert np.abs(found[name] - value).max() <= bound


def test_dynamic_quantization_agrees_up_to_one_step() -> None:
    """Codes on the edge between two may be rounded either way."""
    weights, scale = RNG.integers(-100, 100, (D, 6)).astype(np.int8), np.float32(0.01)
    inputs = [floats(B, S, D), weights, np.full(6, scale, np.float32)]
    model, feed = node("DynamicQuantizeMatMul", inputs)
    found = ReferenceRunner(model, double=True).run(feed)["o0"]
    wanted = OrtRunner(model).run(feed)["o0"]
    step = np.ptp(feed["i0"]) / 255 * 100 * scale
    assert np.abs(found - wanted).max() <= step
