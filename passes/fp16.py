"""Weights and computation become float16, except where its range or precision does not suffice.

Rewrite:      float32 values -> float16, with one Cast wherever the two meet
Applies when: 1. the operator's definition takes float16;
              2. the operator is not one whose rounding errors grow or decide (``rules``);
              3. no stored number becomes infinite, and no constant as a whole is lost;
              4. what the calibration data shows of inputs, outputs and partial sums stays below a
                 quarter (``margin``) of 65504 and above 6.1e-5, where bits get lost.
              Masks are filled with a quarter of the lowest number instead of the lowest float32.
              Nodes around a kept node follow it where that saves a Cast.
Exactness:    approximate: every operator rounds to 11 bits
Cost:         half the bytes of weights and activations. On targets without float16 kernels
              (ort-cpu) only the file gets smaller, which the report says.
Source:       Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), for what stays in
              float32. Unlike there, every node is judged by its own numbers.

Data is not required. Who deploys a model wants a file that runs: without data, whatever could leave
the range stays in float32 by rule (powers, sums, divisions by computed numbers), which costs little
in a canonical graph, where norms and attention are one node each. It is no proof: activations of
some language models exceed 65504 between ordinary layers. The report says that nothing was looked
at; with data, what is seen decides, in both directions. A margin of a quarter allows for numbers
four times as large as those seen.
"""

from __future__ import annotations

import onnx_ir as ir
from pydantic import Field

from optimizer.pass_base import Context, Report
from optimizer.precision.convert import Conversion, ConversionOptions, convert
from optimizer.precision.limits import FP16


class Options(ConversionOptions):
    """Options of ``fp16``."""

    margin: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of 65504 that numbers seen on the calibration data may reach.",
    )


class Fp16(Conversion[Options]):
    """See the module."""

    name = "fp16"
    Options = Options

    def call(self, model: ir.Model, context: Context) -> Report:
        """Convert, in place."""
        return convert(model, FP16, self.options, context, margin=self.options.margin)
