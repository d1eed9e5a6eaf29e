"""Makes a failing model small: cuts what is before and after the failure, one value at a time.

    python tests/fuzzing/reduce.py SEED

prints the smallest model for which the verdict on a graph seed is still of the same kind.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.printer
from fuzzing.generate import make_case
from fuzzing.oracle import Judge, feeds_of
from fuzzing.values import Case
from fuzzing.verdicts import Verdict

from optimizer.errors import OptimizerError
from optimizer.runners.ort import OrtRunner


def judge(case: Case, folder: Path) -> Verdict:
    """The verdict on a generated case."""
    path = folder / "model.onnx"
    path.write_bytes(case.model.SerializeToString())
    return Judge(path, folder / "out.onnx").run(feeds_of(case.feeds))


def reduce(case: Case, failing: Callable[[Case], bool]) -> Case:
    """The smallest case found by cuts for which ``failing`` still holds."""
    whole = _alive(Case(onnx.ModelProto.FromString(case.model.SerializeToString()), case.feeds))
    case, changed = whole if failing(whole) else case, True
    while changed:
        changed = False
        for smaller in _smaller(case):
            if _size(smaller) < _size(case) and failing(smaller):
                case, changed = smaller, True
                break
    return case


def _size(case: Case) -> tuple[int, int, int]:
    graph = case.model.graph
    return len(graph.node), len(graph.output), len(case.feeds)


def _smaller(case: Case) -> Iterator[Case]:
    graph = case.model.graph
    for feed in case.feeds if len(case.feeds) > 1 else ():
        yield Case(case.model, [feed])
    if len(graph.output) > 1:
        for output in graph.output:
            yield _with_outputs(case, [output])
    values = _values(case)
    for node in graph.node:
        for name in node.output:
            if name in values and name != graph.output[0].name:
                yield _with_outputs(case, [_info(case, name, values[name])])
    for node in reversed(graph.node):
        if any(name in values for name in node.output):
            yield _cut(case, [n for n in node.output if n in values], values)
    for feed in case.feeds if len(case.feeds) > 1 else ():
        yield Case(case.model, [f for f in case.feeds if f is not feed])


def _values(case: Case) -> dict[str, list[np.ndarray]]:
    """All values of the main graph under each feed, where the model runs."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    known = {v.name for v in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known and node.op_type != "Constant":
                model.graph.output.add(name=name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            runner = OrtRunner(path, optimize=False)
            runs = [runner.run(feed) for feed in feeds_of(case.feeds)(runner)]
        except OptimizerError:
            return {}
    return {name: [run[name] for run in runs] for name in runs[0]}


def _info(case: Case, name: str, arrays: list[np.ndarray]) -> onnx.ValueInfoProto:
    named: dict[tuple[int, ...], str] = {}
    for value in case.model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                sizes = tuple(f[value.name].shape[axis] for f in case.feeds if value.name in f)
                named[sizes] = dim.dim_param
    dims: list[int | str] = []
    for axis in range(arrays[0].ndim):
        sizes = tuple(array.shape[axis] for array in arrays)
        varied = len(set(sizes)) > 1 or sizes in named
        dims.append(named.setdefault(sizes, f"D{len(named)}") if varied else sizes[0])
    kind = oh.np_dtype_to_tensor_dtype(arrays[0].dtype)
    return oh.make_tensor_value_info(name, kind, dims)


def _with_outputs(case: Case, outputs: list[onnx.ValueInfoProto]) -> Case:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    infos = [onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in outputs]
    del model.graph.output[:]
    model.graph.output.extend(infos)
    return _alive(Case(model, case.feeds))


def _cut(case: Case, names: list[str], values: dict[str, list[np.ndarray]]) -> Case:
    """Make the outputs of a node inputs of the model."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for node in list(model.graph.node):
        if names[0] in node.output:
            model.graph.node.remove(node)
    taken = {v.name for v in model.graph.output}
    model.graph.input.extend(_info(case, n, values[n]) for n in names)
    feeds = [
        {**feed, **{n: values[n][index] for n in names}} for index, feed in enumerate(case.feeds)
    ]
    if taken & set(names):
        return case
    return _alive(Case(model, feeds))


def _alive(case: Case) -> Case:
    """Without nodes, inputs and initializers that nothing needs."""
    graph = case.model.graph
    needed = {v.name for v in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(_reads(node))
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(kept)]
    del graph.node[:]
    graph.node.extend(nodes)
    for field in (graph.input, graph.initializer):
        items = [i for i in field if i.name in needed]
        copies = [type(i).FromString(i.SerializeToString()) for i in items]
        del field[:]
        field.extend(copies)
    inputs = {v.name for v in graph.input}
    return Case(case.model, [{k: v for k, v in f.items() if k in inputs} for f in case.feeds])


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from (v.name for v in graph.output)
            for inner in graph.node:
                yield from _reads(inner)


def _runs(case: Case, folder: Path) -> bool:
    """Whether ONNX Runtime takes the original with every feed."""
    path = folder / "model.onnx"
    path.write_bytes(case.model.SerializeToString())
    try:
        runner = OrtRunner(path)
        for feed in feeds_of(case.feeds)(runner):
            runner.run(feed)
    except OptimizerError:
        return False
    return True


def main(seed: int) -> None:
    """Reduce one seed and print the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = make_case(random.Random(seed))
        first = judge(case, folder)
        print(first)  # noqa: T201
        if first.fine:
            return
        small = reduce(case, lambda c: judge(c, folder).kind == first.kind and _runs(c, folder))
        print(judge(small, folder))  # noqa: T201
        print(onnx.printer.to_text(small.model))  # noqa: T201
        for feed in small.feeds:
            print({k: (v.shape, v.reshape(-1)[:4].tolist()) for k, v in feed.items()})  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
