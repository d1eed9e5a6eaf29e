"""Models ready to be run again and again, whatever runs them: what ``benchmark`` times."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from optimizer.deviation import is_floating
from optimizer.engines.cuda import Driver
from optimizer.engines.plan import is_engine
from optimizer.errors import OptimizerError
from optimizer.feeds import Sizes, synthesize
from optimizer.runners.ort import OrtRunner, import_onnxruntime, ort_value, translate_error
from optimizer.runners.ort_device import CPU, on_device
from optimizer.runners.tensorrt import TensorRTRunner
from optimizer.samples import InputSpec, check_feed
from optimizer.targets import KV_CACHE_KEY

#: Name of the length of buffers that are filled in place.
MAX_LENGTH = "max_length"


class Timed(Protocol):
    """One model with its feed bound, ready to be run again and again.

    Attributes:
        label: What results call it.
        device: "cpu", or the GPU that runs it.
        feed: Its inputs.
        load_seconds: Time to load it.
    """

    label: str
    device: str
    feed: dict[str, np.ndarray]
    load_seconds: float

    def run(self) -> None:
        """Run once; outputs are left where they are."""
        ...

    def outputs(self) -> dict[str, np.ndarray]:
        """Outputs of the last run by name."""
        ...


@dataclass(frozen=True)
class Setup:
    """How models are run.

    Attributes:
        sizes: Lengths of dynamic axes.
        feed: Values of inputs, where they matter; the others are made up.
        threads: Threads within an operator.
        custom_ops: Libraries of custom operators.
        vocabulary: Number of token ids, where known; only small ids are made up otherwise.
        device: "cpu" or "cuda", of ONNX Runtime.
        plugins: Libraries of plugins, for engines.
        axes: Names of the axes of inputs, for engines, which have none.
    """

    sizes: Sizes = field(default_factory=Sizes)
    feed: Mapping[str, np.ndarray] = field(default_factory=dict)
    threads: int = 1
    custom_ops: Sequence[str | Path] = ()
    vocabulary: int | None = None
    device: str = CPU
    plugins: Sequence[str | Path] = ()
    axes: Mapping[str, Sequence[int | str | None]] = field(default_factory=dict)


class Operand:
    """A model in ONNX Runtime, with inputs and outputs in the memory of its device.

    Where the model says that its KV cache is filled in place, past and present share a buffer.
    """

    def __init__(
        self, model: ir.Model | str | Path, setup: Setup | None = None, *, label: str = "model"
    ) -> None:
        """Create the session and bind everything.

        Args:
            model: A graph, or the path of an ONNX file.
            setup: How to run it.
            label: What results call it.

        Raises:
            OptimizerError: The model cannot be loaded, or an axis has no length.
        """
        setup = setup or Setup()
        self.label = label
        started = time.perf_counter()
        self._runner = OrtRunner(
            model,
            threads=setup.threads,
            custom_ops=setup.custom_ops,
            rounding=False,
            device=setup.device,
        )
        self.load_seconds = time.perf_counter() - started
        self.device = setup.device if setup.device == CPU else gpu_name()
        self._session = self._runner.session
        buffers = self._buffers(model)
        sizes = setup.sizes
        named = {MAX_LENGTH: sizes.past + sizes.sequence} if buffers else {}
        self.feed = _feed(self._runner.inputs, setup, named)
        check_feed(self.feed, self._runner.inputs, label)
        self._bind(buffers, setup.device)

    def _buffers(self, model: ir.Model | str | Path) -> dict[str, str]:
        """Cache input -> output that shares its memory."""
        if isinstance(model, ir.Model):
            text = model.metadata_props.get(KV_CACHE_KEY)
        else:
            text = self._session.get_modelmeta().custom_metadata_map.get(KV_CACHE_KEY)
        facts = json.loads(text) if text else {}
        return dict(facts.get("buffers", {})) if facts.get("form") == "in-place" else {}

    def _bind(self, buffers: Mapping[str, str], device: str) -> None:
        ort = import_onnxruntime()
        self._binding = self._session.io_binding()
        # OrtValues on the CPU share memory with these arrays, which must stay alive.
        self._values = {
            name: on_device(ort, ort_value(array), array, device)
            for name, array in self.feed.items()
        }
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        shared = {present: past for past, present in buffers.items()}
        for name in self._runner.output_names:
            if name in shared:
                self._binding.bind_ortvalue_output(name, self._values[shared[name]])
            else:
                self._binding.bind_output(name, device)

    def run(self) -> None:
        """Run once; outputs are left where they are.

        Raises:
            ModelError: The run failed.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise translate_error(error, self.label) from error

    def outputs(self) -> dict[str, np.ndarray]:
        """Outputs of the last run by name."""
        arrays = self._binding.copy_outputs_to_cpu()
        return dict(zip(self._runner.output_names, arrays, strict=True))


class EngineOperand:
    """A TensorRT engine on a GPU.

    A run is what the engine computes, without copies between the GPU and the host.
    """

    def __init__(
        self, path: str | Path, setup: Setup | None = None, *, label: str = "engine"
    ) -> None:
        """Load the engine and bind everything.

        Raises:
            OptimizerError: See ``TensorRTRunner``; an axis has no length, or one that no
                optimization profile takes.
        """
        setup = setup or Setup()
        self.label = label
        started = time.perf_counter()
        self._runner = TensorRTRunner(path, plugins=setup.plugins)
        self.load_seconds = time.perf_counter() - started
        self.device = self._runner.gpu.name
        self.feed = _feed(self._runner.named(setup.axes), setup)
        self._runner.bind(self.feed)

    def run(self) -> None:
        """Run once; returns when the GPU is done.

        Raises:
            EngineError: The run failed.
        """
        self._runner.execute()

    def outputs(self) -> dict[str, np.ndarray]:
        """Outputs of the last run by name."""
        return self._runner.outputs()


def gpu_name() -> str:
    """The GPU that ONNX Runtime takes: the first."""
    with contextlib.suppress(OptimizerError):
        return Driver().devices[0].name
    return "GPU"


def make_operand(model: ir.Model | str | Path, setup: Setup, label: str) -> Timed:
    """A model or an engine, ready to be run; raises what its class does."""
    if isinstance(model, str | Path) and is_engine(model):
        return EngineOperand(model, setup, label=label)
    return Operand(model, setup, label=label)


def _feed(
    inputs: Sequence[InputSpec], setup: Setup, named: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """The values of a setup, and made-up ones for other inputs.

    The same seed for every model: inputs of the same name and shape are equal.
    """
    sizes = setup.sizes
    named = {**(named or {}), **(sizes.named or {})}
    sizes = Sizes(sizes.batch, sizes.sequence, sizes.past, named)
    specs = [_with_vocabulary(spec, setup.vocabulary) for spec in inputs]
    feed = synthesize(specs, sizes, np.random.default_rng(0))
    for name, array in setup.feed.items():
        if name in feed:
            dtype = feed[name].dtype  # of a model in half precision another one
            feed[name] = array.astype(dtype) if is_floating(array) else array
    return feed


def _with_vocabulary(spec: InputSpec, vocabulary: int | None) -> InputSpec:
    if vocabulary is None or spec.name != "input_ids":
        return spec
    return InputSpec(spec.name, spec.dtype, spec.shape, vocabulary)
