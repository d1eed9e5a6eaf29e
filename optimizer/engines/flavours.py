"""The two flavours of TensorRT, and which options each really obeys.

What a flavour would only log about, or accept without effect, is refused here: an engine that is
not what was asked for must not come out of a command that ends with 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.errors import OptionError
from optimizer.targets import get_target


@dataclass(frozen=True)
class Flavour:
    """One flavour.

    Attributes:
        name: As ``Target.runtime`` has it.
        module: What Python imports.
        title: For people.
        install: How to get it.
        capabilities: Compute capabilities that can be named for a build without a GPU; empty: it
            builds for the GPU of the machine alone.
        usual: Those of them that are built for where none is named: 75 (Turing) has no float32
            matrix products, so most models must be in half precision for it.
        refused: Option -> why this flavour does not have it.
    """

    name: str
    module: str
    title: str
    install: str
    capabilities: tuple[int, ...]
    usual: tuple[int, ...]
    refused: dict[str, str]


FLAVOURS = {
    item.name: item
    for item in (
        Flavour(
            "tensorrt-rtx",
            "tensorrt_rtx",
            "TensorRT for RTX",
            "pip install 'optimize-onnx[tensorrt-rtx]' (Linux on x86-64)",
            (75, 80, 86, 89, 120, 121),
            (80, 86, 89, 120, 121),
            {
                "--timing-cache": "it measures nothing during a build",
                "--hardware-compatible": "it logs an error and builds as if it was not given; "
                "name several --compute-capability instead",
                "--version-compatible": "it needs the lean library, which is not part of it",
            },
        ),
        Flavour(
            "tensorrt",
            "tensorrt",
            "TensorRT",
            "pip install 'optimize-onnx[tensorrt]', NVIDIA's container, or JetPack",
            (),
            (),
            {"--compute-capability": "it builds for the GPU of this machine alone"},
        ),
    )
}


def flavour_of(target: str) -> Flavour:
    """The flavour that builds engines for a target.

    Raises:
        OptionError: None does, or there is no such target.
    """
    if target == "tensorrt":
        return FLAVOURS["tensorrt"]
    found = FLAVOURS.get(get_target(target).runtime)
    if found is None:
        msg = (
            f"--target: '{target}' has no engines; expected tensorrt-rtx, tensorrt, tensorrt-10, "
            "tensorrt-11"
        )
        raise OptionError(msg)
    return found


def check_options(flavour: Flavour, given: dict[str, object]) -> None:
    """Refuse options without effect.

    Args:
        flavour: That builds.
        given: Option -> value; falsy values were not given.

    Raises:
        OptionError: An option that this flavour does not obey, or a compute capability it has no
            kernels for.
    """
    for option, value in given.items():
        if value and option in flavour.refused:
            msg = f"{option}: {flavour.title} does not have it: {flavour.refused[option]}"
            raise OptionError(msg)
    wanted = given.get("--compute-capability") or ()
    wrong = [item for item in tuple(wanted) if item not in flavour.capabilities]  # type: ignore[arg-type,var-annotated]
    if wrong:
        known = ", ".join(str(item) for item in flavour.capabilities)
        msg = (
            f"--compute-capability: found {wrong[0]}, {flavour.title} has kernels for {known}; for "
            "other GPUs build with --target tensorrt on a machine that has one"
        )
        raise OptionError(msg)
