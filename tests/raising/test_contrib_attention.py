"""What is refused leaves nothing behind; that it is raised right is seen on fused exports."""

from __future__ import annotations

import pytest
from rule_case import model, ops

from optimizer.raising import contrib_attention

_HEAD = "float[B,S,4] x, int32[N] lengths"
_WEIGHTS = ", ".join(str(n / 10) for n in range(24))
_PACKED = f"float[2,12] w = {{{_WEIGHTS}}}, float[12] b = {{1,2,3,4,5,6,7,8,9,10,11,12}}"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = com.microsoft.Attention<num_heads = 2>(h, w, b, lengths)", "one length per row"),
        ("y = com.microsoft.Attention<num_heads = 3>(h, w, b)", "the size of its heads"),
        (
            "y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x, b, lengths)",
            "one length per row",
        ),
        (
            "y = com.microsoft.MultiHeadAttention<num_heads = 3>(x, x, x, b)",
            "the size of its heads",
        ),
    ],
)
def test_refusals_write_nothing(nodes: str, reason: str) -> None:
    case = model(
        f"g ({_HEAD}, float[B,S,2] h) => (float[B,S,4] y) <{_PACKED}> {{ {nodes} }}",
        domains=', "com.microsoft" : 1',
    )
    report = contrib_attention.run(case)
    assert reason in report.skipped[0].reason
    assert len(ops(case)) == len(case.graph) == 1


def test_queries_of_unknown_rank_are_left_alone() -> None:
    case = model(
        f"g (float[B,S,2] x, bool p, int32[B,S] m) => (float[B,S,4] y) <{_PACKED}> {{"
        " h = If (p) <then_branch = t () => (float[] u) { u = Neg(x) },"
        " else_branch = e () => (float[] v) { s = Shape(x)  v = Reshape(x, s) }>"
        " y = com.microsoft.Attention<num_heads = 2>(h, w, b, m) }",
        domains=', "com.microsoft" : 1',
    )
    assert "rank of its queries" in contrib_attention.run(case).skipped[0].reason
    assert len(case.graph) == 2
