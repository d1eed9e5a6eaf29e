"""The graph clean-ups that ``cost.py`` runs beside ours, each as a user would run it.

    python benchmarks/cost_peers.py NAME SOURCE TARGET

runs one of those that have no command of their own.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cost_models import Model

#: Arguments of a peer's command: source, target, and what is exported.
Arguments = Callable[[Path, Path, Model], list[str]]
_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Peer:
    """A tool beside ours.

    Attributes:
        name: In the table.
        package: Distribution it comes with.
        command: What runs it.
        also: Further distributions that it needs.
    """

    name: str
    package: str
    command: Arguments
    also: tuple[str, ...] = ()

    def version(self) -> str | None:
        """Of the installed distribution; None if it, or what it needs, is not installed."""
        try:
            for name in self.also:
                importlib.metadata.version(name)
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _here(name: str) -> Arguments:
    return lambda source, target, _: [sys.executable, __file__, name, str(source), str(target)]


def _onnxsim(source: Path, target: Path, _: Model) -> list[str]:
    return [str(_BIN / "onnxsim"), str(source), str(target), "--save-as-external-data"]


def _onnxslim(source: Path, target: Path, _: Model) -> list[str]:
    return [str(_BIN / "onnxslim"), str(source), str(target), "--save-as-external-data"]


def _polygraphy(source: Path, target: Path, _: Model) -> list[str]:
    command = [str(_BIN / "polygraphy"), "surgeon", "sanitize", str(source), "--fold-constants"]
    return [*command, "-o", str(target), f"--save-external-data={target.name}.data"]


def _ort_transformers(source: Path, target: Path, model: Model) -> list[str]:
    command = [sys.executable, "-m", "onnxruntime.transformers.optimizer", "--model_type", "bert"]
    command += ["--num_heads", str(model.heads), "--hidden_size", str(model.hidden)]
    return [*command, "--input", str(source), "--output", str(target), "--use_external_data_format"]


PEERS = (
    Peer("onnxscript optimizer", "onnxscript", _here("onnxscript")),
    Peer("ORT offline, ENABLE_ALL", "onnxruntime", _here("ort")),
    Peer("onnxsim", "onnxsim", _onnxsim),
    Peer("ORT transformers optimizer", "onnxruntime", _ort_transformers),
    Peer("onnxoptimizer", "onnxoptimizer", _here("onnxoptimizer")),
    Peer("onnxslim", "onnxslim", _onnxslim, ("colorama",)),
    Peer("Polygraphy surgeon sanitize", "polygraphy", _polygraphy, ("onnx-graphsurgeon",)),
)


def _run_onnxscript(source: Path, target: Path) -> None:
    import onnx_ir
    import onnxscript.optimizer

    model = onnx_ir.load(source)
    onnxscript.optimizer.optimize_ir(model)
    onnx_ir.save(model, target, external_data=f"{target.name}.data")


def _run_ort(source: Path, target: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    prefix = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{prefix}file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _run_onnxoptimizer(source: Path, target: Path) -> None:
    import onnx
    import onnxoptimizer

    model = onnxoptimizer.optimize(onnx.load(source))
    data = f"{target.name}.data"
    onnx.save(model, target, save_as_external_data=True, location=data)


_FUNCTIONS = {
    "onnxscript": _run_onnxscript,
    "ort": _run_ort,
    "onnxoptimizer": _run_onnxoptimizer,
}

if __name__ == "__main__":
    _FUNCTIONS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
