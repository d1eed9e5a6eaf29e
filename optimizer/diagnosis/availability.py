"""Which targets can be used on this machine, and why the others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.diagnosis.findings import Finding
from optimizer.diagnosis.gpu_rules import runs_rtx
from optimizer.environment import Facts
from optimizer.environment.versions import release
from optimizer.targets import TARGETS

_OLDEST_TENSORRT_10 = (10, 3)
#: Major version of Jetson Linux in JetPack 6.
_JETPACK_6 = "36"


@dataclass(frozen=True)
class Availability:
    """What can be done here with a model of one target; its ONNX file can be written anywhere.

    Attributes:
        target: Name.
        runs: Whether the runtime runs it here.
        builds: Whether the runtime can build an engine here; None where there is none to build.
        reasons: Why not, if one of the two is not possible.
    """

    target: str
    runs: bool
    builds: bool | None
    reasons: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether anything can be done with it here."""
        return self.runs or bool(self.builds)


def availabilities(facts: Facts, findings: Sequence[Finding]) -> tuple[Availability, ...]:
    """One entry per target."""
    return tuple(_availability(name, facts, findings) for name in TARGETS)


def _availability(name: str, facts: Facts, findings: Sequence[Finding]) -> Availability:
    prevented = [f"finding {finding.id}" for finding in findings if name in finding.prevents]
    if name.startswith("ort-"):
        reasons = [*_onnxruntime(name, facts), *prevented]
        return Availability(name, not reasons, None, tuple(reasons))
    if name == "tensorrt-rtx":
        building = [*_installed(facts, "tensorrt-rtx", "TensorRT for RTX"), *prevented]
        running = _gpu(facts) or [
            f"TensorRT for RTX has no kernels for compute capability {gpu.capability}"
            for gpu in facts.nvidia.gpus[:1]
            if not any(runs_rtx(other.capability) for other in facts.nvidia.gpus)
        ]
        return Availability(name, not building + running, not building, tuple(building + running))
    reasons = [*(_device(name, facts) or [*_tensorrt(name, facts), *_gpu(facts)]), *prevented]
    return Availability(name, not reasons, not reasons, tuple(reasons))


def _onnxruntime(name: str, facts: Facts) -> list[str]:
    ort = facts.onnxruntime
    extra = {"ort-cpu": "cpu", "ort-cuda": "gpu"}[name]
    if ort.folder is None and not ort.distributions:
        return [f"ONNX Runtime is not installed: pip install optimize-onnx[{extra}]"]
    if name == "ort-cpu":
        return []
    if ort.offers and "CUDAExecutionProvider" not in ort.offers:
        return [f"the installed ONNX Runtime ({ort.wheel}) has no CUDA provider", *_gpu(facts)]
    return _gpu(facts)


def _gpu(facts: Facts) -> list[str]:
    return [] if facts.nvidia.gpus else ["no NVIDIA GPU was found"]


def _installed(facts: Facts, flavour: str, title: str) -> list[str]:
    found = facts.flavour(flavour)
    if found is None:
        return [f"{title} is not installed: pip install optimize-onnx[{flavour}]"]
    if not found.python:
        # Usual on Jetson: the package is the system's, and a virtual environment hides it.
        return [
            f"the Python package of {title} {found.version} is not on the search path: create the "
            "environment with --system-site-packages"
        ]
    return []


def _device(name: str, facts: Facts) -> list[str]:
    """Why engines for Jetson are not built on this one."""
    linux = facts.nvidia.jetpack
    if name != "jetson" or (linux or "").split(".")[0] == _JETPACK_6:
        return []
    if linux is None:
        return ["engines are built on the device, and this is no Jetson"]
    return [f"JetPack 6 has Jetson Linux {_JETPACK_6}, this is {linux}"]


def _tensorrt(name: str, facts: Facts) -> list[str]:
    missing = _installed(facts, "tensorrt", "TensorRT")
    found = facts.flavour("tensorrt")
    if missing or found is None:
        return missing
    major = 11 if name == "tensorrt-11" else 10
    if found.major != major:
        return [f"TensorRT {major} is needed, installed is {found.version}"]
    if major == 10 and release(found.version) < _OLDEST_TENSORRT_10:
        return [f"TensorRT 10.3 or later is needed, installed is {found.version}"]
    return []
