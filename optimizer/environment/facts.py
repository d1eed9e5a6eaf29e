"""What is installed here and what it runs on, as plain data: what ``diagnosis`` judges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optimizer.environment.versions import Requirement, release
from optimizer.machine import Cpu, Memory


@dataclass(frozen=True)
class Distribution:
    """One installed Python distribution.

    Attributes:
        name: Normalized: lower case, words joined by ``-``.
        version: As it calls itself.
        folder: Its ``.dist-info`` or ``.egg-info``.
        requires: What it needs, without lines that hold for an extra or under a condition.
    """

    name: str
    version: str
    folder: Path
    requires: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class ImportResult:
    """What came of importing a module in a process of its own.

    Attributes:
        facts: What the module says about itself; None where it could not be imported.
        error: The last line of what went wrong, or how the process ended.
    """

    facts: dict[str, Any] | None
    error: str = ""


#: Who would find a library: the dynamic loader by itself, or only a program that asks for the
#: file in a Python package's folder (as importing that package usually does).
Finder = Literal["loader", "python", "nobody"]


@dataclass(frozen=True)
class Needed:
    """A shared library that another one asks for.

    Attributes:
        name: Such as ``libnvinfer.so.10``.
        finder: Who would find it.
        path: Where it was found.
        others: Files of the same library in other versions.
    """

    name: str
    finder: Finder
    path: Path | None = None
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Library:
    """A shared library of a package, and what it asks for.

    Attributes:
        path: The file.
        needs: Only direct needs; those of the found libraries in turn are not looked at.
        error: Why it could not be read, instead of ``needs``.
    """

    path: Path
    needs: tuple[Needed, ...] = ()
    error: str = ""

    @property
    def missing(self) -> tuple[Needed, ...]:
        """What nobody would find."""
        return tuple(need for need in self.needs if need.finder == "nobody")


@dataclass(frozen=True)
class OnnxRuntime:
    """The installed ONNX Runtime.

    Attributes:
        distributions: Those that put files into the package ``onnxruntime``.
        folder: The package, where there is one.
        wheel: Distribution that the files say they are of: the one installed last.
        version: Of that distribution.
        cuda: Version of CUDA that the files were built for; None for a CPU wheel.
        loaded: What came of importing it.
        providers: The libraries of its execution providers, by name: "cuda", "tensorrt", ...
        complete: Whether the folder has the file that makes it a package.
    """

    distributions: tuple[str, ...] = ()
    folder: Path | None = None
    wheel: str = ""
    version: str = ""
    cuda: str | None = None
    loaded: ImportResult | None = None
    providers: dict[str, Library] = dataclasses.field(default_factory=dict)
    complete: bool = True

    @property
    def offers(self) -> tuple[str, ...]:
        """Execution providers that it says it has, whether or not they can be loaded."""
        facts = self.loaded.facts if self.loaded is not None else None
        return tuple(facts["providers"]) if facts else ()


@dataclass(frozen=True)
class TensorRt:
    """One installed flavour of TensorRT.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        version: Of the Python package, or of the library where that is all there is.
        libraries: Its core library and parser, real files.
        python: Whether there is a Python package.
        cuda: Major version of CUDA that the Python package is for, where its name says so.
    """

    flavour: str
    version: str
    libraries: tuple[Path, ...] = ()
    python: bool = True
    cuda: int | None = None

    @property
    def major(self) -> int:
        """First number of the version; 0 where it has none."""
        return next(iter(release(self.version)), 0)


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: Of the product.
        capability: Compute capability, such as "8.9".
        memory: Bytes, or None where it shares the machine's.
    """

    name: str
    capability: str
    memory: int | None = None


@dataclass(frozen=True)
class Nvidia:
    """GPUs and the software below the runtimes.

    Attributes:
        gpus: In the driver's order.
        driver: Its version; None where none was found.
        cuda: Version of CUDA up to which the driver runs programs, where it says so.
        toolkit: Version of an installed CUDA toolkit.
        error: Why the driver could not be asked.
        jetpack: Release of Jetson Linux, such as "36.4", on a Jetson.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    toolkit: str | None = None
    error: str = ""
    jetpack: str | None = None


@dataclass(frozen=True)
class Foreign:
    """Something else that Python finds under the name of one of our packages.

    Attributes:
        name: "optimizer" or "passes".
        path: The file.
        first: Whether it comes before ours on the search path.
        owner: Distribution that installed it, where known.
    """

    name: str
    path: Path
    first: bool
    owner: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that was found.

    Attributes:
        version: Of this program.
        folder: Where this program lies.
        installed: Whether it is an installed distribution, and not only a checkout.
        python: Version of Python.
        system: Such as "Linux x86_64".
        platform: ``sys.platform``.
        requirements: Of this program, with the extra they belong to.
        distributions: Installed ones by name; the first on the search path counts.
        doubles: Distributions that occur a second time, further down the search path.
        core: What came of importing the libraries this program always needs.
        foreign: Other packages under our names.
        cpu, memory: The machine.
        free: Bytes free, by folder.
        onnxruntime: See there.
        tensorrt: Installed flavours.
        torch_cuda: Version of CUDA whose libraries torch brings along.
        nvidia: See there.
    """

    version: str
    folder: Path
    installed: bool
    python: str
    system: str
    platform: str
    cpu: Cpu
    memory: Memory
    requirements: tuple[Requirement, ...] = ()
    distributions: dict[str, Distribution] = dataclasses.field(default_factory=dict)
    doubles: tuple[Distribution, ...] = ()
    core: ImportResult = dataclasses.field(default_factory=lambda: ImportResult({}))
    foreign: tuple[Foreign, ...] = ()
    free: dict[str, int] = dataclasses.field(default_factory=dict)
    onnxruntime: OnnxRuntime = dataclasses.field(default_factory=OnnxRuntime)
    tensorrt: tuple[TensorRt, ...] = ()
    torch_cuda: str | None = None
    nvidia: Nvidia = dataclasses.field(default_factory=Nvidia)

    def version_of(self, distribution: str) -> str | None:
        """Version of an installed distribution, or None."""
        found = self.distributions.get(distribution)
        return None if found is None else found.version

    def flavour(self, name: str) -> TensorRt | None:
        """An installed flavour of TensorRT, or None."""
        return next((item for item in self.tensorrt if item.flavour == name), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        content: dict[str, Any] = _plain(dataclasses.asdict(self))
        content["onnxruntime"]["offers"] = list(self.onnxruntime.offers)
        content["distributions"] = {
            name: {"version": item.version, "folder": str(item.folder)}
            for name, item in self.distributions.items()
        }
        content["requirements"] = [str(item) for item in self.requirements]
        return content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
