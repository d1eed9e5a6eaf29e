"""Known bad combinations of drivers, GPUs, CUDA libraries, ONNX Runtime and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator

from optimizer.diagnosis.findings import Found
from optimizer.environment import Facts
from optimizer.environment.facts import Library, Needed
from optimizer.environment.libraries import version_in_name
from optimizer.environment.versions import release
from optimizer.targets import TARGETS

#: Major version of CUDA -> oldest driver (docs.nvidia.com/deploy/cuda-compatibility, table 1).
_DRIVERS = {11: 450, 12: 525, 13: 580}
#: Compute capabilities that CUDA 13 starts from (its release notes).
_OLDEST_FOR_CUDA_13 = (7, 5)
#: Compute capabilities that TensorRT for RTX has kernels for, and the least of those that follow.
RTX_CAPABILITIES = frozenset({"7.5", "8.0", "8.6", "8.9"})
RTX_FROM = (12, 0)
#: Of the driver, not of any package.
_DRIVER = "libcuda.so.1"
_TENSORRT = ("libnvinfer", "libnvonnxparser")


def cuda_provider(facts: Facts) -> Iterator[Found]:
    """The CUDA provider asks for libraries that are not there."""
    library = facts.onnxruntime.providers.get("cuda")
    missing = [] if library is None else [n for n in library.missing if n.name != _DRIVER]
    if missing:
        cuda = _cuda(facts)
        wanted = f"onnxruntime-gpu[cuda,cudnn]=={facts.onnxruntime.version}"
        yield Found(
            f"the CUDA provider of {facts.onnxruntime.wheel} {facts.onnxruntime.version} cannot "
            f"load: {_described(missing)}",
            f'install CUDA {cuda or ""} libraries: pip install "{wanted}"'.replace("  ", " "),
        )


def tensorrt_provider(facts: Facts) -> Iterator[Found]:
    """The TensorRT provider asks for another major version than is installed."""
    library = facts.onnxruntime.providers.get("tensorrt")
    wrong = [] if library is None else [n for n in _of_tensorrt(library) if n.others]
    if not wrong:
        return
    need = wrong[0]
    full = facts.flavour("tensorrt")
    found = version_in_name(need.others[0])
    version = full.version if full is not None else found
    yield Found(
        f"the TensorRT provider of {facts.onnxruntime.wheel} {facts.onnxruntime.version} needs "
        f"{need.name}, installed is TensorRT {version} ({need.others[0].name}): it cannot load, "
        "and ONNX Runtime goes on without it",
        f"{_install_tensorrt(facts, need.name)} where you use that provider; engines for "
        "tensorrt-11 need an environment of their own",
    )


def _install_tensorrt(facts: Facts, library: str) -> str:
    """What installs the major version that a library's name ends in."""
    cuda = _cuda(facts)
    suffix = "" if cuda is None else f"-cu{cuda}"
    return f'pip install "tensorrt{suffix}=={library.rpartition(".so.")[2]}.*"'


def other_providers(facts: Facts) -> Iterator[Found]:
    """A provider that ONNX Runtime offers and cannot load, of which nothing else was said."""
    for name, library in facts.onnxruntime.providers.items():
        if library.error:
            yield Found(f"the {name} provider: {library.error}", "reinstall ONNX Runtime")
        missing = [need for need in library.missing if need.name != _DRIVER]
        if name == "cuda" or not missing or any(need.others for need in _of_tensorrt(library)):
            continue
        wanted = [need.name for need in missing if need.name.startswith(_TENSORRT)]
        yield Found(
            f"ONNX Runtime offers the {name} provider, which cannot load: {_described(missing)}",
            "nothing, unless you use that provider"
            + (f"; then {_install_tensorrt(facts, wanted[0])}" if wanted else ""),
        )


def needs_preload(facts: Facts) -> Iterator[Found]:
    """Libraries that only lie in folders of Python packages."""
    library = facts.onnxruntime.providers.get("cuda")
    if library is None or library.missing:
        return
    hidden = [need for need in library.needs if need.finder == "python"]
    if hidden:
        yield Found(
            f"the CUDA provider finds {hidden[0].name}{_and_more(hidden)} only after a program has "
            "loaded them: they lie in Python packages, where the system does not look",
            "call onnxruntime.preload_dlls() before the first session, or set LD_LIBRARY_PATH",
        )


def old_driver_for_onnxruntime(facts: Facts) -> Iterator[Found]:
    """The driver is older than the CUDA that ONNX Runtime was built for."""
    found = _old_driver(facts, _major(facts.onnxruntime.cuda))
    if found:
        yield Found(f"{facts.onnxruntime.wheel} is built for {found[0]}", found[1])


def old_driver_for_tensorrt(facts: Facts) -> Iterator[Found]:
    """The driver is older than the CUDA that TensorRT was built for."""
    full = facts.flavour("tensorrt")
    found = None if full is None else _old_driver(facts, full.cuda)
    if found and full is not None:
        yield Found(f"TensorRT {full.version} is built for {found[0]}", found[1])


def _old_driver(facts: Facts, cuda: int | None) -> tuple[str, str] | None:
    """What is too old and what to do, or None."""
    nvidia = facts.nvidia
    oldest = _DRIVERS.get(cuda or 0)
    if cuda is None or oldest is None:
        return None
    advice = f"update the driver to {oldest} or later, or install a build for an older CUDA"
    if nvidia.driver is not None and release(nvidia.driver)[:1] < (oldest,):
        return f"CUDA {cuda}, which needs driver {oldest}; installed is {nvidia.driver}", advice
    if nvidia.cuda is not None and release(nvidia.cuda)[:1] < (cuda,):
        return f"CUDA {cuda}; the installed driver runs CUDA up to {nvidia.cuda}", advice
    return None


def gpu_without_cuda_13(facts: Facts) -> Iterator[Found]:
    """A GPU that CUDA 13 does not know any more, where no other is there."""
    gpus = facts.nvidia.gpus
    new = [gpu for gpu in gpus if _numbers(gpu.capability) >= _OLDEST_FOR_CUDA_13]
    if gpus and not new and (_major(facts.onnxruntime.cuda) or 0) >= 13:
        yield Found(
            f"{facts.onnxruntime.wheel} is built for CUDA 13, which starts at compute capability "
            f"7.5; {gpus[0].name} has {gpus[0].capability}",
            "install a build of ONNX Runtime for CUDA 12",
        )


def gpu_wheel_without_driver(facts: Facts) -> Iterator[Found]:
    """ONNX Runtime for GPUs on a machine without one."""
    if "cuda" in facts.onnxruntime.providers and not facts.nvidia.gpus:
        yield Found(
            f"{facts.onnxruntime.wheel} is installed and no NVIDIA GPU was found: sessions run on "
            "the CPU, with no more than a log line about it",
            "install onnxruntime instead, or make the GPU and its driver visible",
        )


def driver_error(facts: Facts) -> Iterator[Found]:
    """The driver is there and does not answer."""
    if facts.nvidia.error:
        yield Found(
            f"the NVIDIA driver does not answer: {facts.nvidia.error}",
            "check that the driver's version fits the kernel module, and in a container that the "
            "GPU is passed in; then try nvidia-smi by hand",
        )


def torch_cuda_major(facts: Facts) -> Iterator[Found]:
    """The libraries of torch and ONNX Runtime are of different majors of CUDA."""
    torch, ort = _major(facts.torch_cuda), _major(facts.onnxruntime.cuda)
    if torch is not None and ort is not None and torch != ort:
        yield Found(
            f"torch brings the libraries of CUDA {facts.torch_cuda}, {facts.onnxruntime.wheel} "
            f"{facts.onnxruntime.version} needs those of CUDA {ort}: importing torch first does "
            "not load them",
            f'pip install "onnxruntime-gpu[cuda,cudnn]", or a torch for CUDA {ort}',
        )


def tensorrt_stub(facts: Facts) -> Iterator[Found]:
    """The Python package of TensorRT without the library itself."""
    yield from _stub(facts, "tensorrt")


def rtx_stub(facts: Facts) -> Iterator[Found]:
    """The Python package of TensorRT for RTX without the library itself."""
    yield from _stub(facts, "tensorrt-rtx")


def _stub(facts: Facts, flavour: str) -> Iterator[Found]:
    found = facts.flavour(flavour)
    # How the library is called elsewhere, and where it lies, was not looked at.
    if found is not None and not found.libraries and facts.platform == "linux":
        yield Found(
            f"{flavour} {found.version} is installed without its shared libraries",
            f"pip install --force-reinstall {flavour}=={found.version} with access to NVIDIA's "
            "package index, or install NVIDIA's package for your system",
        )


def rtx_gpu(facts: Facts) -> Iterator[Found]:
    """A GPU that TensorRT for RTX has no kernels for."""
    gpus = facts.nvidia.gpus
    if facts.flavour("tensorrt-rtx") and gpus and not any(runs_rtx(g.capability) for g in gpus):
        yield Found(
            f"TensorRT for RTX has no kernels for {gpus[0].name} (compute capability "
            f"{gpus[0].capability}): engines can be built here and run elsewhere",
            "use full TensorRT on this GPU",
        )


def runs_rtx(capability: str) -> bool:
    """Whether TensorRT for RTX runs on GPUs of a compute capability."""
    return capability in RTX_CAPABILITIES or _numbers(capability) >= RTX_FROM


def rtx_unversioned(facts: Facts) -> Iterator[Found]:
    """The parser opens a name that the wheel does not have."""
    found = facts.flavour("tensorrt-rtx")
    for path in () if found is None else found.libraries[:1]:
        if not path.with_name("libtensorrt_rtx.so").exists():
            yield Found(
                f"{path.parent} holds {path.name} only: parsing a model with plugin operators "
                "ends the process, because the parser opens libtensorrt_rtx.so",
                "link that name to the library before anything imports tensorrt_rtx",
            )


def newer_onnx(facts: Facts) -> Iterator[Found]:
    """The default opset of onnx is newer than the installed TensorRT parses."""
    newest = (facts.core.facts or {}).get("opset", 0)
    for item in facts.tensorrt:
        full = item.flavour == "tensorrt"
        target = TARGETS.get(f"tensorrt-{item.major}" if full else item.flavour)
        if target is not None and newest > target.max_opset:
            yield Found(
                f"onnx {facts.version_of('onnx')} writes opset {newest} where nothing else is "
                f"asked for; the parser of {item.flavour} {item.version} is known to take "
                f"{target.max_opset}",
                "export with an opset that the target takes; this program writes no newer one",
            )


def _of_tensorrt(library: Library) -> tuple[Needed, ...]:
    return tuple(need for need in library.missing if need.name.startswith(_TENSORRT))


def _described(missing: list[Needed]) -> str:
    """Such as "libcudart.so.13 (found: libcudart.so.12), libcublas.so.13 are missing"."""
    names = []
    for need in missing[:4]:
        other = f" (found: {need.others[0].name})" if need.others else ""
        names.append(need.name + other)
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return f"{', '.join(names)}{more} {'is' if len(missing) == 1 else 'are'} missing"


def _cuda(facts: Facts) -> int | None:
    """Major version of CUDA that ONNX Runtime wants: as it says, or as its libraries ask for."""
    said = _major(facts.onnxruntime.cuda)
    needs = (need for item in facts.onnxruntime.providers.values() for need in item.needs)
    names = (need.name for need in needs if need.name.startswith("libcudart.so."))
    return said or _major(next(names, "").rpartition(".so.")[2])


def _and_more(needs: list[Needed]) -> str:
    return f" and {len(needs) - 1} more" if len(needs) > 1 else ""


def _major(version: str | None) -> int | None:
    numbers = release(version or "")
    return numbers[0] if numbers else None


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdecimal())
