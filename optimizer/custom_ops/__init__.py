"""Operators of our own: declared once, with a body in standard operators and native kernels."""

from optimizer.custom_ops.library import library_path

__all__ = ["library_path"]
