"""Small passes that do, or fail to do, one thing each: for tests of what surrounds passes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optimizer.gate import LEFT_OUT, OPEN
from optimizer.graph import add_initializer, const, insert
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip


class ScaleOptions(PassOptions):
    """By how much."""

    factor: float = Field(default=1.001, description="Factor on the weight of the last product.")


def last_product(model: ir.Model) -> ir.Node:
    """The MatMul that writes the logits."""
    return next(node for node in reversed(model.graph) if node.op_type == "MatMul")


def scale(model: ir.Model, factor: float) -> Report:
    """Multiply a weight."""
    value = last_product(model).inputs[1]
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy() * np.float32(factor)
    value.const_value = ir.Tensor(array.astype(np.float32), name=value.name)
    return Report(modified=True, applied=1, sites=("logits",), details={"factor": factor})


class Scale(GraphPass[ScaleOptions]):
    """Approximate, and says so."""

    name = "scale"
    exactness = Exactness.APPROXIMATE
    Options = ScaleOptions

    def call(self, model: ir.Model, context: Context) -> Report:
        """Scale."""
        del context
        return scale(model, self.options.factor)


class Wrong(Scale):
    """Approximate, but claims to be exact."""

    name = "wrong"
    exactness = Exactness.REASSOCIATED


class Swap(GraphPass[PassOptions]):
    """a + b = b + a, bit by bit."""

    name = "swap"
    exactness = Exactness.BITWISE
    after = ("scale",)

    def call(self, model: ir.Model, context: Context) -> Report:
        """Swap the operands of every Add."""
        del context
        adds = [node for node in model.graph if node.op_type == "Add"]
        for node in adds:
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
        return Report(modified=bool(adds), applied=len(adds))


class Nothing(GraphPass[PassOptions]):
    """Never matches."""

    name = "nothing"
    exactness = Exactness.BITWISE

    def call(self, model: ir.Model, context: Context) -> Report:
        """Skip two sites."""
        del model, context
        return Report(
            modified=False,
            skipped=(Skip("layer 0", "it is not blue"), Skip("layer 1", "it is not blue")),
        )


class Liar(Scale):
    """Changes the graph and denies it."""

    name = "liar"

    def call(self, model: ir.Model, context: Context) -> Report:
        """Scale, and say nothing."""
        super().call(model, context)
        return Report(modified=False)


class Crash(Nothing):
    """Has a defect."""

    name = "crash"

    def call(self, model: ir.Model, context: Context) -> Report:
        """Fail."""
        del model, context
        raise KeyError("some key")


class Interrupted(Nothing):
    """The user presses Ctrl-C while it runs."""

    name = "interrupted"

    def call(self, model: ir.Model, context: Context) -> Report:
        """Stop."""
        raise KeyboardInterrupt


class Hungry(Nothing):
    """Needs sample data, and looks at it."""

    name = "hungry"

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def call(self, model: ir.Model, context: Context) -> Report:
        """Count samples."""
        del model
        assert context.calibration is not None
        return Report(modified=False, details={"samples": context.calibration.samples.count})


class FactorOptions(PassOptions):
    """Which sites are made wrong."""

    wrong: str = Field(default="", description="NUMBER:FACTOR of products to make wrong.")


class Factors(GraphPass[FactorOptions]):
    """Swaps the operands of every Mul, and gets some of them wrong if told so."""

    name = "factors"
    exactness = Exactness.REASSOCIATED
    Options = FactorOptions

    def call(self, model: ir.Model, context: Context) -> Report:
        """Ask, then swap."""
        pairs = [pair.split(":") for pair in self.options.wrong.split(",") if pair]
        wrong = {int(number): float(factor) for number, factor in pairs}
        sites, skipped = [], []
        for number, node in enumerate([n for n in model.graph if n.op_type == "Mul"]):
            if not context.gate.allow(str(node.name)):
                skipped.append(Skip(str(node.name), LEFT_OUT))
                continue
            self.rewrite(model, node, wrong.get(number, 1.0))
            sites.append(str(node.name))
        return Report(bool(sites), len(sites), tuple(skipped), tuple(sites))

    def rewrite(self, model: ir.Model, node: ir.Node, factor: float) -> None:
        """One site."""
        inputs = list(reversed(node.inputs))
        for index, value in enumerate(inputs):
            array = const(value) if factor != 1.0 else None
            if array is not None:
                wrong = add_initializer(model.graph, "wrong", array * np.float32(factor))
            node.replace_input_with(index, value if array is None else wrong)


class RoughFactors(Factors):
    """The same, approximate."""

    name = "rough-factors"
    exactness = Exactness.APPROXIMATE


class SecretFactors(Factors):
    """The same, without asking."""

    name = "secret-factors"

    def call(self, model: ir.Model, context: Context) -> Report:
        """Swap whatever the gate says."""
        return super().call(model, replace(context, gate=OPEN))


class HalfSecretFactors(Factors):
    """Asks for its sites, and is wrong outside of them."""

    name = "half-secret-factors"

    def call(self, model: ir.Model, context: Context) -> Report:
        """Swap, then damage the last product unasked."""
        report = super().call(model, context)
        last = [node for node in model.graph if node.op_type == "Mul"][-1]
        constant = next(v for v in last.inputs if const(v) is not None)
        assert constant is not None
        constant.const_value = ir.Tensor(np.asarray(const(constant)) * 2, name=constant.name)
        return replace(report, modified=True)


class RestlessFactors(Factors):
    """Asks for other sites each time."""

    name = "restless-factors"
    runs: ClassVar[list[int]] = []

    def call(self, model: ir.Model, context: Context) -> Report:
        """Ask for a site that is not there first."""
        self.runs.append(1)
        context.gate.allow(f"run {len(self.runs)}")
        return super().call(model, context)


class FailingFactors(Factors):
    """The same, but has a defect where it should be wrong."""

    name = "failing-factors"

    def rewrite(self, model: ir.Model, node: ir.Node, factor: float) -> None:
        """Fail."""
        if factor != 1.0:
            raise KeyError(node.name)
        super().rewrite(model, node, factor)


class IllegalFactors(Factors):
    """The same, but leaves no legal graph where it should be wrong."""

    name = "illegal-factors"

    def rewrite(self, model: ir.Model, node: ir.Node, factor: float) -> None:
        """Read a value that does not exist."""
        if factor != 1.0:
            node.replace_input_with(1, ir.Value(name="nowhere"))
            return
        super().rewrite(model, node, factor)


class Explode(GraphPass[PassOptions]):
    """Makes the outputs infinite."""

    name = "explode"
    exactness = Exactness.APPROXIMATE

    def call(self, model: ir.Model, context: Context) -> Report:
        """Scale beyond all bounds."""
        del context
        return scale(model, 3e38)


class Overreach(GraphPass[PassOptions]):
    """Writes a valid graph that cannot run: it reads behind the end of a list."""

    name = "overreach"
    exactness = Exactness.APPROXIMATE

    def call(self, model: ir.Model, context: Context) -> Report:
        """Add an entry that does not exist to one operand of a sum."""
        del context
        two = add_initializer(model.graph, "two", np.zeros(2, np.float32))
        node = next(n for n in model.graph if n.op_type == "Add")
        (size, number) = (
            insert(model.graph, node, "Size", (node.inputs[1],), dtype=ir.DataType.INT64),
            add_initializer(model.graph, "beyond", np.array(2)),
        )
        index = insert(model.graph, node, "Add", (size, number), dtype=ir.DataType.INT64)
        entry = insert(model.graph, node, "Gather", (two, index), dtype=ir.DataType.FLOAT)
        first = insert(model.graph, node, "Add", (node.inputs[0], entry), dtype=ir.DataType.FLOAT)
        node.replace_input_with(0, first)
        return Report(modified=True, applied=1)
