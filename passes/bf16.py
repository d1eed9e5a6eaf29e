"""Weights and computation become bfloat16, except where its precision does not suffice.

Rewrite:      float32 values -> bfloat16, with one Cast wherever the two meet
Applies when: 1. the operator's definition takes bfloat16;
              2. the operator is not one whose rounding errors grow or decide (``rules``): powers
                 and exponentials, sums and softmaxes of more than 256 or unknown many terms, what
                 picks numbers or accumulates along a sequence;
              3. its numbers are not positions: angles, distances and masks are computed from
                 integers, of which bfloat16 holds those up to 256.
              Masks are filled with a quarter of the lowest number instead of the lowest float32,
              which rounding would make infinite. Nodes around a kept node follow it where that
              saves a Cast.
Exactness:    approximate: every operator rounds to 8 bits
Cost:         half the bytes of weights and activations. On targets without bfloat16 kernels
              (ort-cpu) weights are stored in it and everything is computed in float32.
Source:       Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training (arXiv 1905.12322)

Data is not needed: the range is that of float32, so nothing that the model computes overflows, and
what too few bits do is known from the operators.
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer.pass_base import Context, Report
from optimizer.precision.convert import Conversion, ConversionOptions, convert
from optimizer.precision.limits import BF16


class Options(ConversionOptions):
    """Options of ``bf16``."""


class Bf16(Conversion[Options]):
    """See the module."""

    name = "bf16"
    Options = Options

    def call(self, model: ir.Model, context: Context) -> Report:
        """Convert, in place."""
        return convert(model, BF16, self.options, context)
