"""Hands a graph to onnx-graphsurgeon and takes it back, without its large weights.

Those travel as references that are read only where somebody looks at their numbers, so there is no
size limit and nothing whole is serialized.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from optimizer.graph import lazy
from optimizer.proto import INLINE_BYTES, MEMORY_LOCATION, skeleton


class Exchange:
    """One model on its way to onnx-graphsurgeon and back.

    Attributes:
        graph: The ``gs.Graph``.
    """

    def __init__(self, model: ir.Model) -> None:
        import onnx_graphsurgeon as gs

        self._gs = gs
        #: What references stand for, by their number.
        self._tensors: list[ir.TensorProtocol] = []
        proto, large = skeleton(model)
        _write_types(model, proto)
        with _quiet():
            self.graph = gs.import_onnx(proto)
        for constant in _constants(self.graph):
            source = large.get(constant.name)
            if source is not None and constant._values.tensor.external_data:  # noqa: SLF001
                constant._values = _weight_class()(self._reference(source), source)  # noqa: SLF001

    def back(self, graph: Any) -> ir.Model:
        """The ``onnx_ir`` form of a ``gs.Graph``."""
        weight = _weight_class()
        for constant in _constants(graph):
            values = constant._values  # noqa: SLF001 - ``values`` would read them
            if isinstance(values, np.ndarray) and _to_be_referred(values):
                tensor = _tensor_of(constant)
                if tensor is not None:
                    constant._values = weight(self._reference(tensor), tensor)  # noqa: SLF001
        with weight.by_reference(), _quiet():
            proto = self._gs.export_onnx(graph, do_type_check=False)
        model: ir.Model = ir.from_proto(proto)
        for inner in (model.graph, *model.graph.subgraphs()):
            for name, value in inner.initializers.items():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = self._referred(name, value.const_value)
        return model

    def _reference(self, tensor: ir.TensorProtocol) -> onnx.TensorProto:
        proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=tensor.shape.numpy())
        proto.data_location = onnx.TensorProto.EXTERNAL
        location = f"{MEMORY_LOCATION}/{len(self._tensors)}"
        proto.external_data.add(key="location", value=location)
        self._tensors.append(tensor)
        return proto

    def _referred(self, name: str, reference: ir.ExternalTensor) -> ir.TensorProtocol:
        tensor = self._tensors[int(str(reference.location).rpartition("/")[2])]
        if tensor.name == name:
            return tensor
        # Under another name: the tensor itself is shared with the model as it was.
        return lazy(name, tensor.dtype, tensor.shape.numpy(), tensor.numpy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what onnx-graphsurgeon says on stdout about itself and about types it keeps."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _write_types(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Types and shapes of intermediate values, which scripts read."""
    outputs = {id(value) for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.type is not None and id(value) not in outputs:
                ir.serde.serialize_value_into(proto.graph.value_info.add(), value)


def _constants(graph: Any) -> Iterator[Any]:
    """All constants of a ``gs.Graph`` and its subgraphs."""
    import onnx_graphsurgeon as gs

    for inner in (graph, *graph.subgraphs(recursive=True)):
        for tensor in inner.tensors().values():
            if isinstance(tensor, gs.Constant):
                yield tensor


def _to_be_referred(values: np.ndarray) -> bool:
    """Large ones, and those of types that onnx-graphsurgeon writes wrongly (4-bit integers)."""
    kind = values.dtype
    return not kind.hasobject and (values.nbytes > INLINE_BYTES or kind.isbuiltin != 1)


def _tensor_of(constant: Any) -> ir.TensorProtocol | None:
    """The numbers of a constant, unless onnx-graphsurgeon is to convert them on the way."""
    values = np.ascontiguousarray(constant._values).reshape(constant._values.shape)  # noqa: SLF001
    tensor = ir.Tensor(values, name=constant.name)
    wanted = constant.export_dtype
    kind = wanted if isinstance(wanted, int) else ir.DataType.from_numpy(np.dtype(wanted)).value
    return tensor if tensor.dtype.value == kind else None


@functools.cache
def _weight_class() -> Any:
    """The class of weights that are read when somebody looks at them."""
    from onnx_graphsurgeon.ir.tensor import LazyValues

    class Weight(LazyValues):  # type: ignore[misc]
        """A weight of the model; onnx-graphsurgeon's own exports (folding) get its numbers."""

        referring: ClassVar[bool] = False

        def __init__(self, reference: onnx.TensorProto, source: ir.TensorProtocol) -> None:
            self._source = source
            with Weight.by_reference():  # it looks at type and shape of ``tensor``
                super().__init__(reference)

        @property
        def tensor(self) -> onnx.TensorProto:
            if Weight.referring:
                return self._reference
            return ir.serde.serialize_tensor(self._source)

        @tensor.setter
        def tensor(self, reference: onnx.TensorProto) -> None:
            self._reference = reference

        def load(self) -> np.ndarray:
            return np.array(self._source.numpy())

        @classmethod
        @contextlib.contextmanager
        def by_reference(cls) -> Iterator[None]:
            """Within it, exports hold references instead of numbers."""
            before, cls.referring = cls.referring, True
            try:
                yield
            finally:
                cls.referring = before

    return Weight
