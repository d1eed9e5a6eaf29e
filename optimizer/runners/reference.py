"""Runs models in numpy, one operator after the other, optionally in float64.

In float64 the result is exact for the purpose of judging float32: rounding is 2^-29 of it. That
goes for half precision too, whose Casts round nothing there. Without float64, half precision is
computed in float32 and rounded after every operator, as in ``runners.ort``.
Weights are converted where they are used, so memory stays near that of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx.reference.ops._op_list import load_op

from optimizer.errors import ModelError, UnsupportedError
from optimizer.graph import attribute_graphs, release
from optimizer.proto import names_read
from optimizer.runners.base import Feed
from optimizer.runners.numpy_ops import Array
from optimizer.runners.operators import find_operator
from optimizer.widening import Rounded, rounded

#: Converted initializers up to this many bytes are kept between runs.
_CACHE_BYTES = 1 << 20

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
#: Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


@dataclass(frozen=True)
class _Step:
    """One node, ready to run; ``free`` names what nothing needs any more after it."""

    name: str
    op_type: str
    run: Callable[[dict[str, Array], list[Any]], Sequence[Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: tuple[str, ...]


class ReferenceRunner:
    """Executes a graph as it is at construction; later changes to it do not matter."""

    def __init__(
        self,
        model: ir.Model,
        *,
        double: bool = False,
        extra_outputs: Sequence[ir.Value] = (),
    ) -> None:
        """Prepare every node.

        Args:
            model: A sorted graph.
            double: Compute everything in float64, whatever the model says.
            extra_outputs: Values of the main graph to return besides the model's outputs.

        Raises:
            UnsupportedError: An operator has no implementation here.
        """
        if model.functions:
            model = model.clone()
            try:
                common_passes.InlinePass()(model)
            except (ValueError, RuntimeError) as error:  # written for another opset than the model
                msg = f"the functions of the model cannot be written out: {error}"
                raise UnsupportedError(msg) from error
        wide = Rounded(model, {}) if double else rounded(model)
        model = wide.model
        self._half = {name: dtype.numpy() for name, dtype in wide.types.items()}
        graph = model.graph
        self._double = double
        self._tensors = {
            name: value.const_value
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        self._cache: dict[str, Array] = {}
        self._inputs = tuple(str(v.name) for v in graph.inputs if v.name not in graph.initializers)
        names = [str(v.name) for v in (*graph.outputs, *extra_outputs)]
        self._outputs = tuple(dict.fromkeys(names))
        self._steps = self._prepare(model)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that a feed must hold."""
        return self._inputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, the model's own first."""
        return self._outputs

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        """Run once and return every output by name.

        Raises:
            ModelError: A node failed; names it.
            UnsupportedError: A node needs more memory than there is.
        """
        values: dict[str, Array] = {
            name: self._converted(feed[name], narrow=name in self._half) for name in self._inputs
        }
        for step in self._steps:
            arguments = [self._value(name, values) if name else None for name in step.inputs]
            try:
                # -inf masks and the logarithm of 0 are ordinary in attention.
                with np.errstate(all="ignore"):
                    results = step.run(values, arguments)
            except NotImplementedError as error:
                msg = f"node '{step.name}': the reference has no {error} ({step.op_type})"
                raise UnsupportedError(msg) from error
            except MemoryError as error:
                msg = f"node '{step.name}' ({step.op_type}) needs more memory than there is"
                raise UnsupportedError(msg) from error
            except Exception as error:  # the operators of onnx raise whatever they like
                raise ModelError(f"node '{step.name}' ({step.op_type}) failed: {error}") from error
            for name, result in zip(step.outputs, results, strict=False):
                if name:
                    array: Any = result if isinstance(result, list) else np.asarray(result)
                    values[name] = array  # a list is a sequence of tensors
            for name in step.free:
                values.pop(name, None)
            del arguments, results
            for name in step.inputs:
                if name in self._tensors:  # its pages count as memory while they are mapped
                    release(self._tensors[name])
        arrays = {name: self._value(name, values) for name in self._outputs}
        return {n: a.astype(self._half[n]) if n in self._half else a for n, a in arrays.items()}

    def _converted(self, array: Array, *, narrow: bool = False) -> Array:
        if array.dtype.kind in "OS":  # strings of a tensor are bytes, those of a runtime are text
            text = [s.decode("utf-8", "replace") if isinstance(s, bytes) else s for s in array.flat]
            return np.array(text, object).reshape(array.shape)
        if narrow:
            return array.astype(np.float32)
        floating = array.dtype.kind in "fV" and array.dtype.names is None
        return array.astype(np.float64) if self._double and floating else array

    def _value(self, name: str, values: Mapping[str, Array]) -> Array:
        if name in values:
            return values[name]
        if name in self._cache:
            return self._cache[name]
        tensor = self._tensors[name]
        raw = tensor.numpy()
        array = self._converted(raw)
        if array is not raw:
            del raw
            release(tensor)
        if array.nbytes <= _CACHE_BYTES:
            self._cache[name] = array
        return array

    def _prepare(self, model: ir.Model) -> tuple[_Step, ...]:
        nodes = list(model.graph)
        last: dict[str, int] = {}
        for index, node in enumerate(nodes):
            last.update(dict.fromkeys((*names_read([node]), *_written(node)), index))
        free: dict[int, list[str]] = {}
        for name, index in last.items():
            if name and name not in self._outputs:
                free.setdefault(index, []).append(name)
        return tuple(
            _Step(
                str(node.name),
                node.op_type,
                self._operator(node, model),
                self._arguments(node),
                _written(node),
                tuple(free.get(index, ())),
            )
            for index, node in enumerate(nodes)
        )

    def _is_lookup(self, node: ir.Node) -> bool:
        """Gather from an initializer: only the rows looked up need converting, not the table."""
        table = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
        return table is not None and table.name in self._tensors

    def _arguments(self, node: ir.Node) -> tuple[str, ...]:
        names = tuple("" if v is None else str(v.name) for v in node.inputs)
        return ("", *names[1:]) if self._is_lookup(node) else names

    def _operator(
        self, node: ir.Node, model: ir.Model
    ) -> Callable[[dict[str, Array], list[Any]], Sequence[Any]]:
        if self._is_lookup(node):
            table = self._tensors[str(node.inputs[0].name)]  # type: ignore[union-attr]
            axis = node.attributes.get_int("axis", 0)

            def look_up(_: dict[str, Array], arguments: list[Any]) -> Sequence[Any]:
                rows = np.take(table.numpy(), arguments[1], axis=axis)
                release(table)
                return (self._converted(rows),)

            return look_up
        attributes = {k: a.value for k, a in node.attributes.items() if not a.is_ref()}
        own = find_operator(
            node.domain, node.op_type, attributes, len(node.inputs), len(node.outputs)
        )
        if own is not None:
            return lambda _, arguments: own(arguments, attributes)
        proto = ir.serde.serialize_node(node)
        if self._double:
            _to_double(proto)
        run = _reference_operator(proto, model)
        held = [name for name in names_read([node]) if name in self._tensors]
        if not any(True for _ in attribute_graphs(node)) or not held:
            return run
        return lambda values, arguments: run(
            {**values, **{name: self._value(name, values) for name in held}}, arguments
        )


def _reference_operator(
    proto: onnx.NodeProto, model: ir.Model
) -> Callable[[dict[str, Array], list[Any]], Sequence[Any]]:
    opsets = dict(model.opset_imports)
    parameters = {
        "opsets": opsets,
        "ir_version": model.ir_version,
        "verbose": 0,
        "new_ops": None,
        "existing_functions": {},
        "evaluator_cls": onnx.reference.ReferenceEvaluator,
        "log": lambda *_: None,
    }
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    where = f"node '{proto.name}'"
    if domain:
        raise UnsupportedError(
            f"{where}: the reference evaluator has no operator {domain}.{proto.op_type}."
        )
    try:
        cls = load_op(
            domain,
            proto.op_type,
            opsets.get(domain, 1),
            node=proto,
            evaluator_cls=onnx.reference.ReferenceEvaluator,
        )
        operator = cls(proto, parameters)
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedError(
            f"{where}: the reference evaluator cannot run {proto.op_type}: {error}"
        ) from error
    if operator.need_context():
        return lambda values, arguments: operator.run(*arguments, context=values)
    return lambda _, arguments: operator.run(*arguments)


def _written(node: ir.Node) -> tuple[str, ...]:
    return tuple(str(v.name) if v.name else "" for v in node.outputs)


def _to_double(node: onnx.NodeProto) -> None:
    """Replace float32, float16 and bfloat16 by float64 in a node's attributes and subgraphs."""
    for attribute in node.attribute:
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _FLOATS:
            attribute.i = onnx.TensorProto.DOUBLE
        if attribute.HasField("t"):
            _tensor_to_double(attribute.t)
        for tensor in attribute.tensors:
            _tensor_to_double(tensor)
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for tensor in graph.initializer:
                _tensor_to_double(tensor)
            for inner in graph.node:
                _to_double(inner)
    # These create float32 where nothing says otherwise.
    if node.op_type == "Constant":
        _constant_to_double(node)
    elif node.op_type == "ConstantOfShape" and not node.attribute:
        value = onnx.numpy_helper.from_array(np.zeros(1))
        node.attribute.append(onnx.AttributeProto(name="value", type="TENSOR", t=value))


def _constant_to_double(node: onnx.NodeProto) -> None:
    attribute = node.attribute[0]
    if attribute.name == "value_float":
        array = np.array(attribute.f, np.float64)
    elif attribute.name == "value_floats":
        array = np.array(attribute.floats, np.float64)
    else:
        return
    attribute.Clear()
    attribute.name = "value"
    attribute.type = onnx.AttributeProto.TENSOR
    attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))


def _tensor_to_double(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
