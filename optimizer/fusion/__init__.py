"""Exact algebra on canonical graphs: what concurrent siblings have in common becomes one.

Linears that read the same input concatenate along N (``weights.beside``), sums of linears along K
(``weights.stacked``), norms give their scale and shift to the linears behind them
(``weights.Affine``), heads concatenate layer by layer (``group``). ``legality`` says when.
"""

from optimizer.fusion.group import Bypass, FusedGroup, fuse_group
from optimizer.fusion.legality import refusal
from optimizer.fusion.norms import fold_norm
from optimizer.fusion.pack import pack_beside, pack_stacked
from optimizer.fusion.weights import Affine, beside, stacked

__all__ = [
    "Affine",
    "Bypass",
    "FusedGroup",
    "beside",
    "fold_norm",
    "fuse_group",
    "pack_beside",
    "pack_stacked",
    "refusal",
    "stacked",
]
