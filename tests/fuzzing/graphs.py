"""Random valid graphs: what ``canonicalize`` reads, composed into patterns and near misses.

A graph is written under several assignments of its named dimensions at once: every value knows its
shape under each of them, so an operator is only written where it is valid for all. All choices come
from one ``random.Random``; ``hypothesis.strategies.randoms`` gives one whose choices shrink.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
from fuzzing.values import BOOL, DTYPES, FLOAT, INT64, ORDINARY, Shape, Value, _compute


@dataclass
class Writer:
    """A graph under construction.

    Attributes:
        r: Source of every choice.
        opset: Of the standard operators.
        dtype: Floating-point type of the model.
        sizes: Of the named dimensions.
        scope: Values that may be read here, in order.
    """

    r: random.Random
    opset: int
    dtype: int = FLOAT
    sizes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(ORDINARY))
    scope: list[Value] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: dict[str, tuple[int, list[int | str]]] = field(default_factory=dict)
    domains: set[str] = field(default_factory=set)
    forced_outputs: list[Value] = field(default_factory=list)
    counter: list[int] = field(default_factory=lambda: [0])
    rng_seed: int = 0
    #: Assignments under which some Reshape asks for a size of 0, which means something else.
    degenerate: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.rng_seed)

    # Names, constants, inputs.

    def name(self, base: str) -> str:
        self.counter[0] += 1
        return f"{base}{self.counter[0]}"

    def chance(self, percent: int) -> bool:
        return self.r.randrange(100) < percent

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.r.randrange(len(items))]

    def array(self, shape: Shape, low: float = -1.0, high: float = 1.0) -> np.ndarray:
        return self.rng.uniform(low, high, shape)

    def const(self, numbers: Any, dtype: int | None = None, base: str = "c") -> Value:
        """A constant: an initializer, or a Constant node."""
        kind = self.dtype if dtype is None else dtype
        array = np.asarray(numbers).astype(DTYPES[kind])
        name = self.name(base)
        if self.chance(15):
            tensor = onh.from_array(array, name)
            self.nodes.append(oh.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(onh.from_array(array, name))
        known = (array,) * self.feeds if array.dtype.kind in "iub" else None
        return Value(name, kind, (array.shape,) * self.feeds, True, array, known)

    def ints(self, numbers: Any) -> Value:
        return self.const(np.asarray(numbers, np.int64), INT64, "i")

    @property
    def feeds(self) -> int:
        return len(self.sizes["B"])

    def shapes(self, dims: Sequence[int | str]) -> tuple[Shape, ...]:
        return tuple(
            tuple(d if isinstance(d, int) else self.sizes[d][feed] for d in dims)
            for feed in range(self.feeds)
        )

    def input(
        self, dims: list[int | str], dtype: int | None = None, name: str | None = None
    ) -> Value:
        kind = self.dtype if dtype is None else dtype
        name = name or self.name("x")
        self.inputs[name] = (kind, dims)
        value = Value(name, kind, self.shapes(dims), exact=True)
        self.scope.append(value)
        return value

    # Nodes.

    def emit(
        self,
        op: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[tuple[int, tuple[Shape, ...]]],
        *,
        domain: str = "",
        exact: bool = False,
        compute: Callable[..., np.ndarray] | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """A node whose output types and shapes the caller knows.

        ``compute`` follows the numbers of integer operands, where all of them are known.
        """
        names = ["" if v is None else v.name for v in inputs]
        while names and not names[-1]:
            names.pop()
        if domain:
            self.domains.add(domain)
        known = None if compute is None else self.follow(compute, inputs)
        made = [
            Value(self.name("v"), dtype, shapes, exact, known=known) for dtype, shapes in outputs
        ]
        node = oh.make_node(
            op, names, [v.name for v in made], domain=domain, name=self.name("n"), **attributes
        )
        if self.chance(5):
            node.name = ""
        self.nodes.append(node)
        self.scope.extend(made)
        return made

    def follow(
        self, compute: Callable[..., np.ndarray], inputs: Sequence[Value | None]
    ) -> tuple[np.ndarray, ...] | None:
        """``compute`` of the known numbers of the operands, under each assignment."""
        columns = [v.known for v in inputs if v is not None]
        held = [column for column in columns if column is not None]
        if len(held) != len(columns) or any(array.size > 64 for c in held for array in c):
            return None
        return tuple(np.asarray(compute(*arrays)) for arrays in zip(*held, strict=True))

    def op(self, op: str, *inputs: Value, dtype: int | None = None, **options: Any) -> Value:
        """An element-wise node with broadcasting."""
        shapes = self.broadcast(*inputs)
        assert shapes is not None, f"{op} of {[v.shapes for v in inputs]}"
        kind = inputs[0].dtype if dtype is None else dtype
        return self.emit(op, inputs, [(kind, shapes)], **options)[0]

    @staticmethod
    def broadcast(*values: Value) -> tuple[Shape, ...] | None:
        try:
            return tuple(
                np.broadcast_shapes(*columns)
                for columns in zip(*(v.shapes for v in values), strict=True)
            )
        except ValueError:
            return None

    def swap(self, x: Value, y: Value) -> tuple[Value, Value]:
        """Both operands of a commutative operator, in any order."""
        return (y, x) if self.chance(50) else (x, y)

    def reduce(self, op: str, x: Value, axes: list[int], keep: int = 1) -> Value:
        real = {axis % x.rank for axis in axes}
        shapes = tuple(
            tuple(
                1 if axis in real else size
                for axis, size in enumerate(shape)
                if keep or axis not in real
            )
            for shape in x.shapes
        )
        as_input = self.opset >= (13 if op == "ReduceSum" else 18)
        inputs = [x, self.ints(axes)] if as_input else [x]
        extra = {} if as_input else {"axes": axes}
        if keep == 0 or self.chance(50):
            extra["keepdims"] = keep
        return self.emit(op, inputs, [(x.dtype, shapes)], **extra)[0]

    def with_axes(self, op: str, x: Value, axes: list[int], shapes: tuple[Shape, ...]) -> Value:
        """Squeeze or Unsqueeze."""
        turn = _compute(lambda array: np.reshape(array, shapes[0]))
        kind = [(x.dtype, shapes)]
        if self.opset >= 13:
            return self.emit(op, [x, self.ints(axes)], kind, exact=x.exact, compute=turn)[0]
        return self.emit(op, [x], kind, exact=x.exact, compute=turn, axes=axes)[0]

    def unsqueeze(self, x: Value, axes: list[int]) -> Value:
        rank = x.rank + len(axes)
        places = sorted(axis % rank for axis in axes)
        shapes = []
        for shape in x.shapes:
            result = list(shape)
            for place in places:
                result.insert(place, 1)
            shapes.append(tuple(result))
        return self.with_axes("Unsqueeze", x, axes, tuple(shapes))

    def squeeze(self, x: Value, axes: list[int]) -> Value:
        gone = {axis % x.rank for axis in axes}
        shapes = tuple(tuple(s for a, s in enumerate(sh) if a not in gone) for sh in x.shapes)
        return self.with_axes("Squeeze", x, axes, shapes)

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        shapes = tuple(tuple(shape[axis] for axis in perm) for shape in x.shapes)
        plain = list(perm) == list(reversed(range(x.rank))) and self.chance(30)
        extra = {} if plain else {"perm": list(perm)}
        return self.emit("Transpose", [x], [(x.dtype, shapes)], exact=x.exact, **extra)[0]

    def reshape(self, x: Value, target: Value, shapes: tuple[Shape, ...], **extra: Any) -> Value:
        for feed, numbers in enumerate(target.known or ()):
            for axis in np.flatnonzero(numbers == 0) if not extra.get("allowzero") else ():
                source = x.shapes[feed]
                if axis >= len(source) or source[axis] != shapes[feed][axis]:
                    self.degenerate.add(feed)
        same = _compute(lambda array: np.reshape(array, shapes[0]))
        kind = [(x.dtype, shapes)]
        return self.emit("Reshape", [x, target], kind, exact=x.exact, compute=same, **extra)[0]

    def slice(self, x: Value, axis: int, start: int, end: int, step: int = 1) -> Value:
        picked = [range(shape[axis])[slice(start, end, step)] for shape in x.shapes]
        shapes = tuple(
            (*shape[: axis % x.rank], len(part), *shape[axis % x.rank + 1 :])
            for shape, part in zip(x.shapes, picked, strict=True)
        )
        kind = [(x.dtype, shapes)]
        taken = _compute(lambda array: array[start:end:step]) if x.rank == 1 else None
        if self.opset < 10:
            assert step == 1
            bounds = {"starts": [start], "ends": [end], "axes": [axis]}
            return self.emit("Slice", [x], kind, exact=x.exact, compute=taken, **bounds)[0]
        inputs = [x, self.ints([start]), self.ints([end]), self.ints([axis])]
        if step != 1 or self.chance(20):
            inputs.append(self.ints([step]))
        return self.emit("Slice", inputs, kind, exact=x.exact, compute=taken)[0]

    def split(self, x: Value, axis: int, sizes: list[int]) -> list[Value]:
        real = axis % x.rank
        outputs = [
            (x.dtype, tuple((*s[:real], size, *s[real + 1 :]) for s in x.shapes)) for size in sizes
        ]
        equal = len(set(sizes)) == 1 and self.chance(50)
        inputs, extra = [x], {"axis": axis}
        if equal and self.opset >= 18:
            extra["num_outputs"] = len(sizes)
        elif not equal and self.opset >= 13:
            inputs.append(self.ints(sizes))
        elif not equal:
            extra["split"] = sizes
        return self.emit("Split", inputs, outputs, exact=x.exact, **extra)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        real = axis % parts[0].rank
        shapes = tuple(
            (*columns[0][:real], sum(c[real] for c in columns), *columns[0][real + 1 :])
            for columns in zip(*(p.shapes for p in parts), strict=True)
        )
        exact = all(p.exact for p in parts)
        kind = [(parts[0].dtype, shapes)]
        joined = (lambda *arrays: np.concatenate(arrays)) if parts[0].rank == 1 else None
        return self.emit("Concat", parts, kind, exact=exact, compute=joined, axis=axis)[0]

    def gather(self, x: Value, index: Value, axis: int = 0) -> Value:
        real = axis % x.rank
        shapes = tuple(
            (*shape[:real], *place, *shape[real + 1 :])
            for shape, place in zip(x.shapes, index.shapes, strict=True)
        )
        kind = [(x.dtype, shapes)]
        taken = (lambda array, at: array[at]) if x.rank == 1 else None
        return self.emit("Gather", [x, index], kind, exact=x.exact, compute=taken, axis=axis)[0]

    def cast(self, x: Value, to: int) -> Value:
        same = x.exact and (x.dtype in (INT64, BOOL) or to in DTYPES)
        whole = np.dtype(DTYPES[to]).kind in "iub" and to != onnx.TensorProto.BFLOAT16
        turned = (lambda array: array.astype(DTYPES[to])) if whole else None
        return self.emit("Cast", [x], [(to, x.shapes)], exact=same, compute=turned, to=to)[0]

    def matmul(self, x: Value, y: Value) -> Value | None:
        shapes = []
        for a, b in zip(x.shapes, y.shapes, strict=True):
            try:
                shapes.append(np.matmul(np.empty(a, np.int8), np.empty(b, np.int8)).shape)
            except ValueError:
                return None
        return self.emit("MatMul", [x, y], [(x.dtype, tuple(shapes))])[0]

    def shape_of(self, x: Value) -> Value:
        kind = (INT64, ((x.rank,),) * self.feeds)
        (value,) = self.emit("Shape", [x], [kind], exact=True)
        return self.knowing(value, [np.array(shape, np.int64) for shape in x.shapes])

    def knowing(self, value: Value, known: Sequence[np.ndarray]) -> Value:
        """The same value with its numbers."""
        place = next(i for i, item in enumerate(self.scope) if item is value)
        self.scope[place] = replace(value, known=tuple(known))
        return self.scope[place]

    def dim(self, x: Value, axis: int) -> Value:
        """Shape(x)[axis] as a vector of one, in one of its spellings."""
        shape = self.shape_of(x)
        way = self.r.randrange(3 if self.opset >= 10 else 2)
        if way == 0:
            return self.gather(shape, self.ints([axis % x.rank]))
        if way == 1:
            return self.unsqueeze(self.gather(shape, self.ints(axis % x.rank)), [0])
        return self.slice(shape, 0, axis % x.rank, axis % x.rank + 1)

    # Picking from what is there.

    def find(self, accept: Callable[[Value], bool]) -> Value | None:
        """A value of the scope, a late one more often than an early one."""
        fitting = [v for v in self.scope if accept(v)]
        if not fitting:
            return None
        return fitting[-1 - min(int(self.r.random() ** 2 * len(fitting)), len(fitting) - 1)]

    def floats(self, rank: int | None = None, last: bool = False) -> Value | None:
        """A floating-point value; with ``last`` the length of its last axis is fixed."""
        return self.find(
            lambda v: (
                v.dtype == self.dtype
                and (rank is None or v.rank == rank)
                and (not last or (v.rank > 0 and bool(v.size(-1))))
                and v.numbers is None
            )
        )

    # The finished model.

    def graph_outputs(self, count: int) -> list[Value]:
        """What the model returns: the last value, and some in the middle of patterns."""
        written = {name for node in self.nodes for name in node.output}
        free = [v for v in self.scope if v.name in written]
        chosen: dict[str, Value] = {v.name: v for v in self.forced_outputs}
        if free:
            chosen[free[-1].name] = free[-1]
        for _ in range(count):
            if free:
                value = self.pick(free)
                chosen[value.name] = value
        return list(chosen.values())

    def dims_text(self, value: Value) -> list[int | str | None]:
        """How the shape of an output is declared: exactly, by a name of its own, or not at all."""
        result: list[int | str | None] = []
        for axis in range(value.rank):
            known = value.size(axis)
            sizes = tuple(shape[axis] for shape in value.shapes)
            named = [n for n, column in self.sizes.items() if column == sizes]
            result.append(known if known is not None else named[0] if named else None)
        return result

    def model(self, outputs: Sequence[Value], *, declare: int = 100) -> onnx.ModelProto:
        """The model; ``declare`` percent of the outputs say their shape."""
        infos = [oh.make_tensor_value_info(n, t, dims) for n, (t, dims) in self.inputs.items()]
        results = [
            oh.make_tensor_value_info(
                v.name, v.dtype, self.dims_text(v) if self.chance(declare) else [None] * v.rank
            )
            for v in outputs
        ]
        graph = oh.make_graph(self.nodes, "g", infos, results, self.initializers)
        opsets = [oh.make_opsetid("", self.opset)]
        opsets += [oh.make_opsetid(domain, 1) for domain in sorted(self.domains)]
        return oh.make_model(graph, opset_imports=opsets, ir_version=8 if self.opset < 20 else 10)

    def feed(self, number: int) -> dict[str, np.ndarray]:
        """Random inputs of one assignment."""
        rng = np.random.default_rng((self.rng_seed, number))
        made = {}
        held = {tensor.name for tensor in self.initializers}
        for name, (kind, dims) in self.inputs.items():
            if name in held and number != 1:
                continue  # an initializer that may be overridden, and once is
            shape = self.shapes(dims)[number]
            dtype = np.dtype(DTYPES[kind])
            if dtype.kind in "iu":
                made[name] = rng.integers(0, 3, shape).astype(dtype)
            elif dtype.kind == "b":
                made[name] = np.asarray(rng.random(shape) < 0.7)
            else:
                made[name] = rng.uniform(-2, 2, shape).astype(dtype)
            if name.startswith("mask") and made[name].size:
                made[name][..., 0] = 1  # a query without any key gives what nobody defines
        return made
