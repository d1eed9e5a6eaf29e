"""Makes the number of tokens the same for every input, where an export left it open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from optimizer.calibration import input_specs
from optimizer.errors import ModelError, OptionError
from optimizer.feeds import Sizes, synthesize
from optimizer.raising.dims import Dim
from optimizer.raising.shapes import Shapes
from optimizer.runners.ort import OrtRunner
from optimizer.structure import Block
from optimizer.tokens.flow import Keeps
from optimizer.tokens.towers import chains, fault, tokens_of

#: Values and the shapes they had.
Before = list[tuple[ir.Value, ir.Shape]]


def fix_tokens(model: ir.Model, blocks: Sequence[Block], tokens: int, keeps: Keeps) -> Before:
    """Declare that every tower that could be reduced is entered by ``tokens`` tokens, in place.

    The axis of the inputs that decides it gets that size, wherever its name appears.

    Returns:
        What ``restore`` needs.
    """
    shapes, sizes = Shapes(), dict[str, int]()
    names = set(_symbols(model.graph.inputs))
    for chain in chains(blocks):
        if any(fault(block, ordered=keeps.ordered) for block in chain):
            continue
        found = solved(tokens_of(chain[0], shapes), tokens)
        if found is not None and found[0] in names:
            sizes.setdefault(*found)
    before: Before = []
    if not sizes:
        return before
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *outputs):
        if value.shape is not None and not sizes.keys().isdisjoint(_symbols([value])):
            before.append((value, value.shape))
            known = [
                sizes.get(str(d.value), d) if not isinstance(d, int) else d for d in value.shape
            ]
            value.shape = ir.Shape(known)
    return before


def check_tokens(model: ir.Model, tokens: int, name: str) -> None:
    """Run a model whose number of tokens was fixed once, on made-up inputs.

    Args:
        model: With the sizes that ``fix_tokens`` gave it.
        tokens: For the message.
        name: Of the pass.

    Raises:
        OptionError: It does not run, as where its table of positions is shorter.
    """
    specs = input_specs(model)
    named = {d: tokens for spec in specs for d in spec.shape[1:] if isinstance(d, str)}
    feed = synthesize(specs, Sizes(sequence=tokens, named=named), np.random.default_rng(0))
    try:
        OrtRunner(model).run(feed)
    except ModelError as error:
        raise OptionError(
            f"pass '{name}': option tokens: the model does not run with {tokens} tokens ({error}); "
            "choose as many as it has positions for, or fewer."
        ) from error


def restore(before: Before) -> None:
    """Undo ``fix_tokens``."""
    for value, shape in before:
        value.shape = shape


def solved(size: Dim | None, number: int) -> tuple[str, int] | None:
    """Symbol and value for which ``size``, a symbol plus a constant, is ``number``."""
    if size is None or isinstance(size, int):
        return None
    constant = sum(count for symbols, count in size if not symbols)
    others = [(symbols, count) for symbols, count in size if symbols]
    if len(others) != 1 or others[0][1] != 1 or len(others[0][0]) != 1 or number <= constant:
        return None
    return others[0][0][0], number - constant


def _symbols(values: Sequence[ir.Value]) -> Iterator[str]:
    for value in values:
        for dim in () if value.shape is None else value.shape:
            if not isinstance(dim, int) and dim.value is not None:
                yield str(dim.value)
