"""Small canonical transformer models for tests, one function for every style."""

from __future__ import annotations

from optimizer.conformance.decoders import Config, Writer, build, feed

__all__ = ["Config", "Writer", "build", "feed"]
