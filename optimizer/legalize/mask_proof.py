"""Finds out what an attention mask lets through, by evaluating it.

A mask subgraph computes bools from the attention mask, positions and shapes; exporters spell it in
many ways. It is cut out and evaluated with the ONNX reference on small shapes, with and without
padding, and around every integer constant in it, where a sliding window could begin. The result is
compared with the one form that a cache filled in place supports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from optimizer import graph as graphs
from optimizer.nodes import ancestors

#: Float masks: from here on a score is taken as cut off. The most negative float16 is -65504, and
#: a score moved by less than this could still win.
_CUT = -1e4
#: Largest integer constant of a mask around which a window is looked for.
_LARGEST_WINDOW = 1 << 17
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True)
class Roles:
    """What the graph inputs mean.

    Attributes:
        padding: The attention mask input [B, P+S], 1 = token.
        tokens: An input whose first two dimensions are [B, S].
        pasts: The inputs holding cached keys and values [B, Hkv, P, c].
    """

    padding: ir.Value
    tokens: ir.Value
    pasts: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Window:
    """A proven mask: causal, without padding; ``size`` keys back, itself included, 0 = all."""

    size: int = 0


@dataclass(frozen=True)
class _Case:
    """One shape: batch, new tokens, past, and the attention mask [B, P+S]."""

    batch: int
    sequence: int
    past: int
    mask: np.ndarray


def find_roles(model: ir.Model, pasts: Sequence[ir.Value]) -> Roles | str:
    """The meaning of the graph inputs, or why it is not clear."""
    rest = [value for value in model.graph.inputs if value not in pasts]
    matrices = [v for v in rest if v.dtype in _INTEGERS and _rank(v) == 2]
    named = [value for value in matrices if value.name == "attention_mask"]
    if len(named) != 1:
        named = [v for v in matrices if "mask" in str(v.name) and "token_type" not in str(v.name)]
    if len(named) != 1:
        return "the model has no input 'attention_mask' that says how many tokens there are"
    tokens = [v for v in rest if v is not named[0] and _rank(v) in (2, 3)]
    if not tokens:
        return "the model has no input of shape [batch, sequence]"
    return Roles(named[0], tokens[0], tuple(pasts))


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def prove(model: ir.Model, mask: ir.Value | None, roles: Roles, *, causal: bool) -> Window | str:
    """What ``mask``, with the operator's own causal flag, lets through; a reason where unsuitable.

    Args:
        model: Not changed.
        mask: Bool (True = attend) or float, broadcastable to [B, H, S, P+S].
        roles: The meaning of the graph inputs.
        causal: Whether the operator cuts off later keys itself.
    """
    if mask is None:
        return "it ignores the attention mask, so padding cannot be told from tokens"
    cut = _Subgraph.cut(model, mask, roles)
    if isinstance(cut, str):
        return cut
    size = 0
    for case in _cases(cut.constants):
        attended = cut.evaluate(case)
        if isinstance(attended, str):
            return attended
        if causal:
            attended = attended & _expected(case, 0, padding=False)
        if size == 0 and case.sequence == 1 and case.mask.all():
            size = _window(attended)
        rows = case.mask[:, case.past :].astype(bool)  # what a padding token attends to is unused
        if not np.array_equal(attended[rows], _expected(case, size)[rows]):
            return (
                "its attention mask is not causal with padding (evaluated at batch "
                f"{case.batch}, sequence {case.sequence}, past {case.past})"
            )
    return Window(size)


def cuts_tokens(model: ir.Model, mask: ir.Value, roles: Roles) -> bool:
    """Whether ``mask`` hides valid tokens from each other, as a causal one does."""
    cut = _Subgraph.cut(model, mask, roles)
    attended = cut if isinstance(cut, str) else cut.evaluate(_case(1, 4, 0))
    return not isinstance(attended, str) and not attended.all()


def _window(attended: np.ndarray) -> int:
    """Size of the window if one token does not see all keys, else 0."""
    seen, total = int(attended[0, 0].sum()), attended.shape[-1]
    return seen if seen < total else 0


def _expected(case: _Case, window: int, *, padding: bool = True) -> np.ndarray:
    """[B, S, P+S] bool: causal, within the window, not padding."""
    key = np.arange(case.past + case.sequence)
    query = case.past + np.arange(case.sequence)[:, None]
    result = key <= query
    if window:
        result &= query - key < window
    full = np.broadcast_to(result, (case.batch, *result.shape))
    return full & case.mask.astype(bool)[:, None, :] if padding else full


def _cases(constants: Sequence[int]) -> Iterator[_Case]:
    # Single tokens after a long past come first: they show the window that the others must have.
    for number in constants:
        yield _case(1, 1, number + 2)
    for number in constants:
        yield from (_case(1, 1, past) for past in range(max(number - 3, 0), number + 2))
        yield _case(1, 3, number)
    for batch, sequence, past in ((1, 1, 0), (1, 4, 0), (2, 1, 3), (2, 3, 2), (3, 5, 0)):
        yield _case(batch, sequence, past)
    yield _case(2, 4, 0, padded=((0, 2), (0, 3)))
    yield _case(3, 5, 0, padded=((1, 1), (1, 2), (1, 3), (1, 4), (2, 4)))
    yield _case(2, 1, 4, padded=((0, 2), (0, 3)))
    yield _case(2, 2, 4, padded=((1, 3),))


def _case(batch: int, sequence: int, past: int, padded: Sequence[tuple[int, int]] = ()) -> _Case:
    mask = np.ones((batch, past + sequence), np.int64)
    for row, column in padded:
        mask[row, column] = 0
    return _Case(batch, sequence, past, mask)


@dataclass(frozen=True)
class _Subgraph:
    """The cut-out computation of a mask.

    Attributes:
        evaluator: Runs it.
        inputs: The graph inputs it reads.
        constants: Integer constants in it that could be the size of a window, rising.
    """

    evaluator: ReferenceEvaluator
    inputs: tuple[ir.Value, ...]
    roles: Roles
    constants: tuple[int, ...]

    @classmethod
    def cut(cls, model: ir.Model, mask: ir.Value, roles: Roles) -> _Subgraph | str:
        """Cut out what computes ``mask``; a reason if it depends on something unsuitable."""
        nodes, inputs, _ = ancestors(mask)
        fault = _fault(nodes, roles)
        if fault is not None:
            return fault
        extracted = ir.convenience.extract(model.graph, inputs, [mask])
        extracted.opset_imports.update(model.graph.opset_imports)
        for value in (*extracted.inputs, *extracted.outputs):
            value.shape = None
        proto = ir.to_proto(ir.Model(extracted, ir_version=model.ir_version))
        try:
            evaluator = ReferenceEvaluator(proto)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"its attention mask cannot be evaluated ({error})"
        return cls(evaluator, inputs, roles, _integers(nodes))

    def evaluate(self, case: _Case) -> np.ndarray | str:
        """[B, S, P+S] bool, True = attend; a reason if heads differ or it cannot be evaluated."""
        try:
            feed = {str(v.name): self._feed(v, case) for v in self.inputs}
            mask = self.evaluator.run(None, feed)[0]
            total = case.past + case.sequence
            mask = np.broadcast_to(
                mask, np.broadcast_shapes(mask.shape, (case.batch, 1, case.sequence, total))
            )
        except Exception as error:  # the reference raises whatever it likes
            return f"its attention mask cannot be evaluated ({' '.join(str(error).split())[:120]})"
        if mask.dtype != np.bool_:
            if np.any((mask != 0) & (mask > _CUT)):
                return "its attention mask adds a bias to scores instead of cutting them off"
            mask = mask == 0
        if mask.shape != (case.batch, mask.shape[1], case.sequence, total) or np.any(
            mask != mask[:, :1]
        ):
            return "its attention mask differs from head to head"
        result: np.ndarray = mask[:, 0]
        return result

    def _feed(self, value: ir.Value, case: _Case) -> np.ndarray:
        dtype = np.float32 if value.dtype is None else value.dtype.numpy()
        if value is self.roles.padding:
            return case.mask.astype(dtype)
        if value in self.roles.pasts:
            assert value.shape is not None  # noqa: S101 - checked where pasts are matched
            heads, size = value.shape[1], value.shape[3]
            shape = (case.batch, int(heads), case.past, int(size))  # type: ignore[arg-type]
            return np.zeros(shape, dtype)
        if _is_positions(value):
            positions = case.past + np.arange(case.sequence)
            return np.tile(positions, (case.batch, 1)).astype(dtype)
        extra = (1,) * max((_rank(value) or 2) - 2, 0)
        return np.zeros((case.batch, case.sequence, *extra), dtype)


def _is_positions(value: ir.Value) -> bool:
    return "position" in str(value.name)


def _fault(nodes: Sequence[ir.Node], roles: Roles) -> str | None:
    """Why the mask is no function of attention mask, positions and shapes alone."""
    for node in nodes:
        if any(True for _ in graphs.attribute_graphs(node)):
            return "its attention mask depends on control flow"
        if node.op_type in ("Shape", "Size"):
            continue
        for value in node.inputs:
            if value is None or not value.is_graph_input():
                continue
            if value is not roles.padding and not _is_positions(value):
                return f"its attention mask depends on the numbers in input '{value.name}'"
    return None


def _integers(nodes: Sequence[ir.Node]) -> tuple[int, ...]:
    found = set()
    for node in nodes:
        for value in node.inputs:
            tensor = graphs.constant(value)
            if tensor is not None and tensor.size == 1 and tensor.dtype.is_integer():
                number = abs(int(graphs.scalar(value) or 0))
                if 1 <= number <= _LARGEST_WINDOW:
                    found.add(number)
    return tuple(sorted(found))
