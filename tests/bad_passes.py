"""Passes that each break one promise: what the conformance suite must catch."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optimizer.errors import UnsupportedError
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip


class Good(GraphPass[PassOptions]):
    """Exchanges the operands of additions.

    Rewrite:      a + b -> b + a
    Applies when: the first operand's name comes after the second's
    Exactness:    bitwise
    Cost:         none
    Source:       arithmetic
    """

    name = "good"
    exactness = Exactness.BITWISE

    def call(self, model: ir.Model, context: Context) -> Report:
        """Rewrite."""
        count = 0
        for node in model.graph:
            first, second = [*node.inputs, None, None][:2]
            if node.op_type == "Add" and str(first.name) > str(second.name):
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)
                count += 1
        return Report(modified=count > 0, applied=count)


def rename_first(model: ir.Model, suffix: str) -> Report:
    """Name the first node anew: a change that every check of results can see."""
    if len(model.graph) == 0:
        return Report(modified=False)
    model.graph.node(0).name = f"first_{suffix}"
    return Report(modified=True, applied=1)


class Undocumented(Good):
    name = "undocumented"


class Unexplained(Good):
    """Has an option nobody explains.

    Rewrite: -
    Applies when: -
    Exactness: -
    Cost: -
    Source: -
    """

    class Options(PassOptions):
        number: int = 3


class Forgetful(Good):
    """Has an option that a recipe cannot hold."""

    class Options(PassOptions):
        number: int | None = Field(3, description="None is not the default.")


class Opaque(Good):
    """Has an option that is no JSON."""

    class Options(PassOptions):
        array: Any = Field(default=np.float32, description="A type.")


class Crashing(Good):
    """Expects a transformer."""

    def call(self, model: ir.Model, context: Context) -> Report:
        return Report(
            modified=False, details={"x": model.graph.initializers["lm_head.weight"].name}
        )


class HalfWay(Good):
    """Refuses after it has begun."""

    def call(self, model: ir.Model, context: Context) -> Report:
        rename_first(model, "x")
        raise UnsupportedError("it is not blue")


class Refusing(Good):
    """Refuses every model, and leaves it alone."""

    def call(self, model: ir.Model, context: Context) -> Report:
        raise UnsupportedError("it is not blue")


class Wordless(Good):
    """Returns nothing."""

    def call(self, model: ir.Model, context: Context) -> Any:
        return None


class Liar(Good):
    """Denies what it did."""

    def call(self, model: ir.Model, context: Context) -> Report:
        rename_first(model, "x")
        return Report(modified=False)


class Renaming(Good):
    """Renames an output without saying so."""

    def call(self, model: ir.Model, context: Context) -> Report:
        for value in model.graph.outputs:
            if not value.is_graph_input():
                value.name = "renamed"
                return Report(modified=True)
        return Report(modified=False)


class Unreasoned(Good):
    """Leaves sites alone without a reason."""

    def call(self, model: ir.Model, context: Context) -> Report:
        return Report(modified=False, skipped=(Skip("here", " "),))


class Boasting(Good):
    """Counts what it did not do."""

    def call(self, model: ir.Model, context: Context) -> Report:
        return Report(modified=False, applied=2)


class Detailed(Good):
    """Reports what no manifest can hold."""

    def call(self, model: ir.Model, context: Context) -> Report:
        return Report(modified=False, details={"numbers": np.zeros(2)})


class Freezing(Good):
    """Fixes the batch size."""

    def call(self, model: ir.Model, context: Context) -> Report:
        for value in model.graph.inputs:
            if value.shape is not None and isinstance(value.shape[0], ir.SymbolicDim):
                value.shape = ir.Shape([1, *value.shape[1:]])
                return Report(modified=True, applied=1)
        return Report(modified=False)


class Inexact(Good):
    """Changes numbers and calls itself exact."""

    exactness = Exactness.REASSOCIATED
    idempotent = False

    def call(self, model: ir.Model, context: Context) -> Report:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor.dtype == ir.DataType.FLOAT and tensor.size > 8:
                value.const_value = ir.Tensor(tensor.numpy() * np.float32(1.01), name=name)
                return Report(modified=True, applied=1)
        return Report(modified=False)


class Exploding(Inexact):
    """Makes the outputs infinite, and only calls itself approximate."""

    exactness = Exactness.APPROXIMATE

    def call(self, model: ir.Model, context: Context) -> Report:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor.dtype == ir.DataType.FLOAT and tensor.size > 8:
                value.const_value = ir.Tensor(np.full_like(tensor.numpy(), np.inf), name=name)
        return Report(modified=True, applied=1)


class Counting(Good):
    """Keeps a count over all objects."""

    idempotent = False
    numbers: ClassVar[Any] = itertools.count()

    def call(self, model: ir.Model, context: Context) -> Report:
        return rename_first(model, str(next(self.numbers)))


class Remembering(Good):
    """Keeps what it saw, within one object."""

    idempotent = False

    def __init__(self, options: PassOptions | None = None) -> None:
        super().__init__(options)
        self.seen = 0

    def call(self, model: ir.Model, context: Context) -> Report:
        self.seen += 1
        return rename_first(model, str(self.seen))


class Reading(Good):
    """Reads all weights, for nothing."""

    def call(self, model: ir.Model, context: Context) -> Report:
        for value in model.graph.initializers.values():
            value.const_value.numpy()
        return Report(modified=False)


class Defiant(Good):
    """Asks, and does not listen."""

    def call(self, model: ir.Model, context: Context) -> Report:
        context.gate.allow("the first node")
        return rename_first(model, "x") if "first_" not in str(model.graph) else Report(False)


class Growing(Good):
    """Never has enough."""

    def call(self, model: ir.Model, context: Context) -> Report:
        if len(model.graph) == 0:
            return Report(modified=False)
        return rename_first(model, f"x{model.graph.node(0).name}")


class Writing(Good):
    """Writes a file."""

    def call(self, model: ir.Model, context: Context) -> Report:
        path = Path(os.environ["BAD_PASSES_FOLDER"]) / "log.txt"
        path.write_text("called")
        return Report(modified=False)


class Hashing(Good):
    """Depends on how texts are hashed."""

    def call(self, model: ir.Model, context: Context) -> Report:
        if len(model.graph) == 0 or str(model.graph.node(0).name).startswith("first_"):
            return Report(modified=False)
        return rename_first(model, str(hash("a text")))
