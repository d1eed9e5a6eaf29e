"""The declaration as a C header, so that a library knows which one it was built from."""

from __future__ import annotations

from optimizer.custom_ops.declaration import declaration_hash


def header() -> str:
    """Text of ``plugins/sparse_matmul/declaration.h``."""
    return (
        "// Written from optimizer/custom_ops/declaration.py by\n"
        "// python -c \"from optimizer.custom_ops.header import header; print(header(), end='')\"\n"
        "#pragma once\n"
        f"#define OPTIMIZE_SPARSE_MATMUL_DECLARATION {declaration_hash()}\n"
    )
