"""Learned cross tokens: written into a tower, as models trained with them have them.

CrossGET (arXiv 2305.17455): a copy of the class token stands behind the others; in front of layer l
it becomes itself + e_l, with e_l [D] learned from what the other modality sees. It takes part in
attention, its query tells which tokens are important, it is never merged, and nobody reads it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.blocks import find_blocks
from optimizer.errors import OptionError
from optimizer.raising.shapes import Shapes
from optimizer.tokens.emit import Emitter, read_instead
from optimizer.tokens.flow import MASK, Flow, Keeps, Walk
from optimizer.tokens.towers import Tower, find_towers, reads_scores

_LAST = np.iinfo(np.int64).max


def read_cross_tokens(path: str) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, one [layers, D] per tower.

    Raises:
        OptionError: It cannot be read, or holds something else.
    """
    option = f"pass 'crossget': option cross_tokens: {path}"
    forms = "expected an .npz file with one floating-point array [layers, D] per tower"
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise OptionError(f"{option} cannot be read ({error}); {forms}.") from None
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
            found = f"{array.dtype} {list(array.shape)}"
            raise OptionError(f"{option}: array '{name}' is {found}, or not finite; {forms}.")
    if not arrays:
        raise OptionError(f"{option} is empty; {forms}.")
    return arrays


def crosses_of(
    arrays: Mapping[str, np.ndarray], towers: Sequence[Tower]
) -> list[np.ndarray | None]:
    """The array of each tower: that called "layers.N" after its first layer, or the only one.

    Raises:
        OptionError: An array has another shape than its tower, or none is for any.
    """
    result: list[np.ndarray | None] = []
    alone = len(arrays) == 1 and not next(iter(arrays)).startswith("layers.")
    for tower in towers:
        first = tower.blocks[0]
        name = next(iter(arrays)) if alone else f"layers.{first.index}"
        expected = (len(tower.blocks), first.hidden_size)
        found = arrays.get(name)
        if found is not None and found.shape != expected:
            raise OptionError(
                f"pass 'crossget': option cross_tokens: array '{name}' has shape "
                f"{list(found.shape)}, but the tower that begins at layer {first.index} needs "
                f"{list(expected)}."
            )
        result.append(found)
    if arrays and towers and all(found is None for found in result):
        names = ", ".join(f"'layers.{tower.blocks[0].index}'" for tower in towers)
        raise OptionError(
            f"pass 'crossget': option cross_tokens names the arrays {sorted(arrays)}; expected "
            f"{names}, after the first layers of the towers."
        )
    return result


def with_cross(tower: Tower) -> Tower:
    """What the tower will be: one token more, behind the others, protected, which guides."""
    protected = (*tower.protected, tower.count)
    return replace(tower, count=tower.count + 1, protected=protected, cross=tower.count)


def cross_fault(tower: Tower) -> str | None:
    """Why a tower is given no cross token."""
    if tower.cross is not None:
        return "it has cross tokens of its own"
    if any(map(reads_scores, tower.blocks)):
        return "its attention scores are read, which would have a row and a column more"
    if not tower.protected:
        return "no token is protected that a cross token could be a copy of"
    causal = bool(tower.causal) or any(block.attention.is_causal for block in tower.blocks)
    if tower.padding is not None or causal:
        return "cross tokens are for towers without padding and causal masks"
    return None


def insert_cross(model: ir.Model, tower: Tower, tokens: np.ndarray) -> Tower:
    """Write cross tokens into a tower, in place; nothing else behind it changes.

    Args:
        model: Canonical.
        tower: Of this model, as it is now.
        tokens: [layers, D]; the first protected token, which is the class token, is copied.

    Returns:
        The tower as it is then.
    """
    graph, blocks = model.graph, tower.blocks
    first = blocks[0].input
    _without_masks(tower)
    walk = Walk(
        Shapes(), {block.attention.node for block in blocks}, tower.count, frozenset(),
        Keeps(placed=False), join=False, outside=False,
    )  # fmt: skip
    flow = walk.follow(graph, [first])
    _leave_out(graph, flow)
    for value in set(flow.rows) - {first}:
        if value.shape is not None and len(value.shape) == 3 and not value.is_graph_output():
            value.shape = ir.Shape([value.shape[0], tower.count + 1, value.shape[2]])
    _write(graph, tower, tokens, tower.protected[0])
    protected = (*tower.protected, tower.count)
    found, _ = find_towers(model, find_blocks(model).blocks, protected, tower.keeps)
    made = next(made for made in found if made.blocks[0].index == blocks[0].index)
    return replace(made, cross=tower.count)


def _without_masks(tower: Tower) -> None:
    """Masks of a tower without padding hide nothing, and are for as many tokens as there were."""
    for block in tower.blocks:
        if len(block.attention.node.inputs) > MASK:
            block.attention.node.replace_input_with(MASK, None)


def _leave_out(graph: ir.Graph, flow: Flow) -> None:
    """Nobody outside of the tower sees the last token."""
    given: dict[ir.Value, ir.Value] = {}
    for reader in flow.readers:
        value = reader.value
        if _keeps(reader.node):
            continue
        if value not in given:
            pen = Emitter(graph, reader.node, f"{value.name}/cross", value.dtype)
            given[value] = _part(pen, value, 0, -1)
        read_instead(reader.node, value, given[value])


def _keeps(node: ir.Node | None) -> bool:
    """Whether a node takes tokens out by their place from the front, whatever stands behind."""
    index = None if node is None or node.op_type != "Gather" else graphs.const(node.inputs[1])
    return index is not None and bool((index >= 0).all())


def _part(pen: Emitter, value: ir.Value, start: int, end: int) -> ir.Value:
    bounds = [pen.integers([number]) for number in (start, end, 1)]
    return pen.put("Slice", value, *bounds, as_="part", dtype=value.dtype)


def _write(graph: ir.Graph, tower: Tower, tokens: np.ndarray, guide: int) -> None:
    order = {node: index for index, node in enumerate(graph)}
    for block, token in zip(tower.blocks, tokens, strict=True):
        value = block.input
        uses = [use for use in value.uses() if use.node in order]
        anchor = min((use.node for use in uses), key=order.__getitem__)
        name = f"layers.{block.index}/cross"
        pen = Emitter(graph, anchor, name, value.dtype or ir.DataType.FLOAT)
        if block is tower.blocks[0]:
            kept, last = value, _part(pen, value, guide, guide + 1)
        else:
            kept, last = _part(pen, value, 0, -1), _part(pen, value, -1, _LAST)
        cross = pen.put("Add", last, pen.numbers(token[None, None], "token"), as_="cross")
        made = pen.put("Concat", kept, cross, as_="tokens", axis=1)
        shape = value.shape
        if shape is not None and len(shape) == 3:
            made.shape = ir.Shape([shape[0], tower.count + 1, shape[2]])
        for use in uses:
            use.node.replace_input_with(use.idx, made)
