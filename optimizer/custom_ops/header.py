"""The declaration as a C header, so that a library knows which one it was built from."""

from __future__ import annotations

from optimizer.custom_ops.declaration import declaration_hash


def header() -> str:
    """Text of ``plugins/sparse_matmul/declaration.h``."""
    return (
        "// Written by `python -m optimizer.custom_ops`; do not edit.\n"
        "#pragma once\n"
        f"#define OPTIMIZE_SPARSE_MATMUL_DECLARATION {declaration_hash()}\n"
    )
