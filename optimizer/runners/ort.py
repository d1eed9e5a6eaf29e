"""Runs models in ONNX Runtime."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from optimizer import attention_masks
from optimizer.custom_ops.declaration import DOMAIN
from optimizer.custom_ops.library import library_path
from optimizer.errors import MissingDependencyError, ModelError, OptimizerError, UnsupportedError
from optimizer.proto import Part, skeleton
from optimizer.runners.base import Feed
from optimizer.runners.ort_device import CPU, check_device, device_error, providers
from optimizer.samples import InputSpec, check_feed
from optimizer.widening import rounded

#: Types that numpy has no element type for stay in the protobuf.
_INLINE = tuple(
    t
    for t in ir.DataType
    if t.name.startswith(("INT4", "UINT4", "INT2", "UINT2", "FLOAT4", "STRING"))
)

_FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"
#: Optimizations that move roundings; the first also fails on int8 zero points from opset 21 on.
_LIBERTIES = ("QDQPropagationTransformer", "DoubleQDQPairsRemover")
#: Precision of activations beside weights that only are stored as integers (MatMulNBits).
_WEIGHT_ONLY_ENTRY, _FLOAT32 = "session.qdq_matmulnbits_accuracy_level", "1"

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(bool)": "bool",
    "tensor(string)": "object",
    **{f"tensor({s}int{bits})": f"{s}int{bits}" for s in ("", "u") for bits in (8, 16, 32, 64)},
}


def import_onnxruntime() -> Any:
    """The ``onnxruntime`` module.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}); install it with "
            "`pip install optimize-onnx[cpu]`."
        ) from error
    return onnxruntime


class OrtRunner:
    """One ONNX Runtime session.

    The graph is handed over as protobuf without its large initializers; those are passed by
    reference, or as places in the files they lie in, so the weights are not serialized and there
    is no size limit.
    The session sees the model as it is at construction: later changes to the graph do not
    reach it.

    ONNX Runtime has no kernels for most operators in bfloat16, and leaves out the roundings
    between its nodes in float16. Half-precision models therefore run in float32, every value
    rounded as the model says (``optimizer.widening``).

    Attributes:
        inputs: What a feed must hold.
    """

    def __init__(
        self,
        model: ir.Model | str | Path,
        *,
        threads: int = 1,
        extra_outputs: Sequence[ir.Value] = (),
        part: Part | None = None,
        optimize: bool = True,
        exact: bool = False,
        custom_ops: Sequence[str | Path] = (),
        rounding: bool = True,
        device: str = CPU,
    ) -> None:
        """Create the session.

        Args:
            model: A graph, or the path of an ONNX file.
            threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.
            extra_outputs: Values of the main graph to return besides the model's outputs.
            part: Run only this part of the model.
            optimize: Let ONNX Runtime optimize the graph.
            exact: Compute what the graph says: where only weights are quantized, ONNX Runtime
                rounds the activations to 8 bits as well, unless told otherwise.
            custom_ops: Libraries of custom operators to register.
            rounding: Compute half precision in float32, rounding every value of a graph that runs
                whole; otherwise ONNX Runtime does what it does with half precision.
            device: "cpu" or "cuda".

        Raises:
            MissingDependencyError: ONNX Runtime, its provider for the device, a GPU, or an
                operator's library is missing.
            UnsupportedError: ONNX Runtime has no kernel for an operator.
            ModelError: The model is not valid.
        """
        self._passed: tuple[str, ...] = ()
        self._weights: list[Any] = []
        custom_ops = (*custom_ops, *_own_library(model))
        options = session_options(threads=threads, optimize=optimize, custom_ops=custom_ops)
        if exact:
            options.add_session_config_entry(_WEIGHT_ONLY_ENTRY, _FLOAT32)
        if extra_outputs:
            # What is only measured is measured where it is computed, and not at the very end, when
            # all values would have to be there still.
            options.execution_order = import_onnxruntime().ExecutionOrder.PRIORITY_BASED
        half: Mapping[str, ir.DataType] = {}
        if isinstance(model, ir.Model):
            if rounding and part is None:
                wide = rounded(model)
                model, half = attention_masks.runnable(wide.model), wide.types
            source: str | bytes = self._serialize(model, options, extra_outputs, part)
        else:
            source = str(model)
        where = f"model '{model}'" if isinstance(source, str) else "model"
        try:
            self._session = _session(source, options, _LIBERTIES if exact else (), device)
        except MissingDependencyError:
            raise
        except Exception as error:
            raise device_error(error, device) or translate_error(error, where) from error
        check_device(self._session, device)
        specs = (_input_spec(value) for value in self._session.get_inputs())
        self._half = {name: np.dtype(dtype.numpy()) for name, dtype in half.items()}
        self.inputs = tuple(replace(s, dtype=self._half.get(s.name, s.dtype)) for s in specs)
        self._outputs = tuple(value.name for value in self._session.get_outputs())
        self._where = where

    def _serialize(
        self,
        model: ir.Model,
        options: Any,
        extra_outputs: Sequence[ir.Value],
        part: Part | None,
    ) -> bytes:
        outputs = list(model.graph.outputs)
        named = {value.name for value in outputs}
        passed = []
        for value in extra_outputs:
            if value.name in named:
                continue
            named.add(value.name)
            # A value nothing computes would only be copied from the feed by the runtime.
            if value.is_graph_input():
                passed.append(str(value.name))
            else:
                outputs.append(value)
        self._passed = tuple(passed)
        proto, large = skeleton(model, outputs=outputs, part=part, keep=_INLINE)
        _link_files(proto, large, options)
        if large:
            # The session reads this memory as long as it lives, but does not own it.
            self._weights = [ort_value(t.numpy(), t.dtype) for t in large.values()]
            options.add_external_initializers(list(large), self._weights)
        try:
            return bytes(proto.SerializeToString(deterministic=True))
        except Exception as error:  # protobuf's own classes differ between its versions
            raise UnsupportedError(
                f"the model's 4-bit weights exceed what one protobuf message holds (2 GB): {error}"
            ) from error

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that a feed must hold."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, the model's own first."""
        return self._outputs + self._passed

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``."""
        return self._session

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        """Run once and return every output by name.

        Raises:
            CalibrationError: The feed does not fit the inputs.
            ModelError: The run failed; names the node.
        """
        check_feed(feed, self.inputs, "feed")
        wide = {name: a.astype(np.float32) if name in self._half else a for name, a in feed.items()}
        try:
            arrays = self._session.run(None, wide)
        except Exception as error:
            raise translate_error(error, self._where) from error
        result = dict(zip(self._outputs, arrays, strict=True))
        for name in self._half.keys() & result.keys():
            result[name] = result[name].astype(self._half[name])
        for name in self._passed:
            result[name] = feed[name]
        return result


def _session(source: str | bytes, options: Any, disabled: Sequence[str], device: str) -> Any:
    ort = import_onnxruntime()
    wanted = providers(ort, device)

    def create(*names: str) -> Any:
        # Without the fallback of its Python part, which prints, and goes on with the CPU.
        return ort.InferenceSession(
            source, options, providers=wanted, disabled_optimizers=names or None, enable_fallback=0
        )

    try:
        return create(*disabled)
    except Exception as error:
        if _MOVED_PAIR not in str(error):
            raise
    # Two of its rewrites contradict each other from opset 21 on: one moves int8 Q/DQ pairs past a
    # Reshape and notes their type, the other makes them uint8 and leaves the note.
    return create("QDQPropagationTransformer", *disabled)


#: What ONNX Runtime (1.31, 1.32) says then.
_MOVED_PAIR = "output_dtype INT8 does not match y_zero_point type UINT8"


def _own_library(model: ir.Model | str | Path) -> tuple[Path, ...]:
    """The library of our operators, where it exists and the model may have them.

    Without it their bodies in standard operators run.
    """
    if isinstance(model, ir.Model) and DOMAIN not in model.graph.opset_imports:
        return ()
    try:
        return (library_path(),)
    except MissingDependencyError:
        return ()


def _link_files(proto: onnx.ModelProto, large: dict[str, ir.TensorProtocol], options: Any) -> None:
    """Let ONNX Runtime read weights from the files they lie in, instead of through our memory.

    It takes one folder; what lies elsewhere stays in ``large``, the rest is removed from it.
    """
    files = {
        name: (tensor, Path(tensor.path).resolve())
        for name, tensor in large.items()
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).is_file()
    }
    if not files:
        return
    folder = Counter(path.parent for _, path in files.values()).most_common(1)[0][0]
    protos = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, (tensor, path) in files.items():
        if path.parent != folder:
            continue
        del large[name]
        entries = protos[name].external_data
        del entries[:]
        entries.add(key="location", value=path.name)
        entries.add(key="offset", value=str(tensor.offset or 0))
        entries.add(key="length", value=str(tensor.nbytes))
    options.add_session_config_entry(_FOLDER_ENTRY, str(folder))


def session_options(
    *, threads: int = 1, optimize: bool = True, custom_ops: Sequence[str | Path] = ()
) -> Any:
    """Options of a quiet session.

    Raises:
        MissingDependencyError: A custom operator library cannot be loaded.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait busily after a run would take the cores from the next model's run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    for library in custom_ops:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise MissingDependencyError(
                f"the custom operator library {library} cannot be loaded: {_first_line(error)}"
            ) from error
    return options


def ort_value(array: np.ndarray, dtype: ir.DataType | None = None) -> Any:
    """An array as ONNX Runtime holds it; it may share the array's memory.

    Args:
        array: Of any element type but strings.
        dtype: The element type, where numpy has none of its own for it.
    """
    ort = import_onnxruntime()
    array = np.ascontiguousarray(array)
    if array.dtype.kind in "fiub" and array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    # bfloat16 and the 8-bit floats are passed as the integers that hold their bits.
    bits = array.view(f"uint{array.dtype.itemsize * 8}")
    dtype = dtype or ir.DataType.from_numpy(array.dtype)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype.value)


def _input_spec(value: Any) -> InputSpec:
    dtype = np.dtype(_DTYPES.get(value.type, "object"))
    shape = tuple(d if isinstance(d, int) or d else None for d in value.shape)
    return InputSpec(value.name, dtype, shape)


_UNREGISTERED = re.compile(r"(?P<op>[\w.]*:?\w+)\(-?\d+\) is not a registered function/op")
_NO_SCHEMA = re.compile(r"No Op registered for (?P<op>\w+) with domain_version of (?P<v>\d+)")
_NO_KERNEL = re.compile(
    r"Could not find an implementation for (?P<op>[\w.:]+\(\d+\)) node with name '(?P<node>[^']*)'"
)
_RUNNING = re.compile(
    r"running (?P<op>\w+) node\. Name:'(?P<node>[^']*)' Status Message: (?P<m>.*)",
    re.DOTALL,
)
_INVALID = re.compile(
    r'In Node, \("(?P<node>[^"]*)", (?P<op>\w+), "(?P<domain>[^"]*)", -?\d+\).*?, Error (?P<m>.*)'
)
_IN_NODE = re.compile(
    r"Node \((?P<node>[^)]*)\) Op \((?P<op>[^)]*)\) (?P<m>.*)|"
    r"Node:(?P<node2>\S*) (?P<m2>.*)",
    re.DOTALL,
)


def translate_error(error: Exception, where: str) -> OptimizerError:
    """ONNX Runtime's message as an error that says which node and operator and what to do."""
    text = _first_line(error)
    version = import_onnxruntime().__version__
    if found := _UNREGISTERED.search(text):
        op = found["op"]
        if ":" in op and not op.startswith("ai.onnx:"):
            return MissingDependencyError(
                f"{where}: ONNX Runtime {version} does not know the operator "
                f"{op.replace(':', '.')}; name the library that has it with --custom-ops LIB."
            )
        return UnsupportedError(f"{where}: ONNX Runtime {version} does not know the operator {op}.")
    if found := _NO_SCHEMA.search(text):
        return UnsupportedError(
            f"{where}: ONNX Runtime {version} does not know the operator {found['op']} of opset "
            f"{found['v']}; use a lower opset or a newer ONNX Runtime."
        )
    if found := _NO_KERNEL.search(text):
        return UnsupportedError(
            f"{where}: node '{found['node']}': ONNX Runtime {version} has no CPU kernel for "
            f"{found['op']} with these element types."
        )
    if found := _RUNNING.search(text):
        return ModelError(
            f"{where}: node '{found['node']}' ({found['op']}) failed: {found['m'].strip()}"
        )
    if found := _INVALID.search(text):
        return ModelError(f"{where}: node '{found['node']}' ({found['op']}): {found['m'].strip()}")
    if found := _IN_NODE.search(text):
        node, message = found["node"] or found["node2"], found["m"] or found["m2"]
        op = f" ({found['op']})" if found["op"] else ""
        return ModelError(f"{where}: node '{node}'{op}: {message.strip()}")
    return ModelError(f"{where}: ONNX Runtime {version} cannot load or run it: {text}")


def _first_line(error: Exception) -> str:
    """The message without ONNX Runtime's prefix, source locations and C++, on one line."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    text = re.sub(r"/\S+\.(?:cc|h|hpp):\d+ ", "", text)
    text = re.sub(r"(?:\S*Status|void) onnxruntime::\S+\([^()]*\) (?:const )?", "", text)
    return " ".join(text.split())[:600]
