"""Engines of families as their exporters write them, by what the passes do to them.

``benchmarks/engines.py`` builds all of them; here is one of each kind of layer and of pass.
"""

from __future__ import annotations

import importlib.util

import engines
import pytest

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="TensorRT for RTX is not installed: pip install tensorrt-rtx",
    ),
]

#: Family, with a KV cache or not, pass set, and types that layers must have.
CELLS = [
    ("llama", True, "fp16", {"half"}),
    ("llama", True, "int8, fp16", {"half", "int8"}),
    ("llama", False, "cqil", {"float"}),
    ("gemma2", True, "bf16", {"bf16"}),
    ("mixtral", False, "int8", {"float", "int8"}),
    ("falcon-alibi", False, "fp16", {"half", "float"}),
    ("falcon-alibi", True, "bf16", {"bf16", "float"}),
    ("gpt2", True, "int8", {"float", "int8"}),
    ("mpt", True, "fp32", {"float"}),
    ("t5-decoder", True, "fp16", {"half"}),
    ("whisper-decoder", False, "fp32", {"float"}),
    ("bert", False, "int8, fp16", {"half", "int8"}),
    ("vit", False, "tome, fp16", {"half"}),
    ("swin", False, "bf16", {"bf16"}),
]


@pytest.mark.parametrize(
    ("name", "cached", "pass_set", "kinds"),
    CELLS,
    ids=[
        f"{name}{'-kv' * cached}-{passes.replace(', ', '+')}" for name, cached, passes, _ in CELLS
    ],
)
def test_a_family_becomes_an_engine(
    name: str, cached: bool, pass_set: str, kinds: set[str]
) -> None:
    row = engines.build(name, cached, pass_set)
    assert row["outcome"] == "built", row["detail"]
    assert kinds <= set(row["layers"])
    assert row["bytes"] > 0.1 * row["model_bytes"]


def test_a_pass_that_finds_nothing_to_do_is_a_refusal_with_its_reason() -> None:
    row = engines.build("bert", False, "cqil")
    assert row["outcome"] == "refused"
    assert "post-norm" in row["detail"]
