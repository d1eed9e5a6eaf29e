"""``python -m optimizer.custom_ops``: prints plugins/sparse_matmul/declaration.h."""

from optimizer.custom_ops.header import header

print(header(), end="")  # noqa: T201 - its output is its purpose
