"""Finds the transformer blocks of a canonical graph.

Passes ask ``find_blocks`` and never match subgraphs themselves.
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer.structure import (
    Attention,
    Block,
    Linear,
    Mlp,
    Norm,
    NormKind,
    Structure,
    Style,
)

__all__ = [
    "Attention",
    "Block",
    "Linear",
    "Mlp",
    "Norm",
    "NormKind",
    "Structure",
    "Style",
    "find_blocks",
]


def find_blocks(model: ir.Model) -> Structure:
    """Find the transformer blocks of a canonical model.

    Returns:
        The blocks, and what came close with the reason why it is none. Never raises for an
        unfamiliar graph.
    """
    raise NotImplementedError
