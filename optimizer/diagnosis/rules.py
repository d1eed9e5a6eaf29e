"""The known bad combinations, as one table: ``RULES``.

Adding one: a function that yields what it finds in the facts, a line in the table with the place
where the combination is known from, and a case in ``tests/test_diagnosis.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from optimizer.diagnosis import gpu_rules, python_rules
from optimizer.diagnosis.findings import Found, Rule, Severity
from optimizer.diagnosis.kernels import int8_kernel
from optimizer.environment import Facts
from optimizer.targets import TARGETS

_ALL = tuple(TARGETS)
_ORT = tuple(name for name, target in TARGETS.items() if target.runtime == "onnxruntime")
_FULL_TENSORRT = ("tensorrt-10", "tensorrt-11")
#: Bytes: an exported model of a billion parameters in float16 fits.
_SMALL_DISK = 2 * 10**9


def _slow_int8(facts: Facts) -> Iterator[Found]:
    kernel = int8_kernel(facts.cpu)
    if kernel is not None and not kernel.dot_product:
        yield Found(
            f"this processor has no int8 dot product ({kernel.name}): int8 products may be slower "
            "than float32 ones, and on x86 they add up pairs in 16 bits, which can overflow",
            "measure before you ship: --bench, and --budget for the accuracy",
        )


def _throttled(facts: Facts) -> Iterator[Found]:
    cpu = facts.cpu
    if cpu.quota is not None and cpu.usable is not None and cpu.quota < cpu.usable:
        threads = max(1, int(cpu.quota))
        yield Found(
            f"a control group grants {cpu.quota:g} cores' worth of time, {cpu.usable} cores are "
            "visible: a runtime that starts one thread per core is stopped in turns",
            f"set the runtime's threads to {threads} (here: --threads {threads})",
        )


def _little_disk(facts: Facts) -> Iterator[Found]:
    for folder, free in facts.free.items():
        if free < _SMALL_DISK:
            yield Found(
                f"{folder} has {free / 1e9:.1f} GB free",
                "free some space, or set TMPDIR to a folder with more: exports and results need "
                "as much as the model",
            )


RULES: tuple[Rule, ...] = (
    Rule(
        "core-import-fails",
        python_rules.core_import_fails,
        "the import itself, tried in a process of its own",
        prevents=_ALL,
    ),
    Rule(
        "own-requirement",
        python_rules.own_requirements,
        "the requirements of optimize-onnx",
        prevents=_ALL,
    ),
    Rule(
        "onnxruntime-version",
        python_rules.onnxruntime_version,
        "the requirements of optimize-onnx, extras cpu and gpu",
        prevents=_ORT,
    ),
    Rule(
        "onnxruntime-broken",
        python_rules.onnxruntime_broken,
        "the import itself, tried in a process of its own",
        prevents=_ORT,
    ),
    Rule(
        "cuda-provider-cannot-load",
        gpu_rules.cuda_provider,
        "the dynamic section of the provider's library",
        prevents=("ort-cuda",),
    ),
    Rule(
        "cuda-driver-too-old",
        gpu_rules.old_driver_for_onnxruntime,
        "docs.nvidia.com/deploy/cuda-compatibility, table 1",
        prevents=("ort-cuda",),
    ),
    Rule(
        "cuda-13-old-gpu",
        gpu_rules.gpu_without_cuda_13,
        "CUDA 13.0 release notes: Maxwell, Pascal and Volta removed",
        prevents=("ort-cuda",),
    ),
    Rule(
        "tensorrt-without-libraries",
        gpu_rules.tensorrt_stub,
        "the index has a stub that fetches the libraries from elsewhere",
        prevents=_FULL_TENSORRT,
    ),
    Rule(
        "tensorrt-rtx-without-libraries",
        gpu_rules.rtx_stub,
        "the distribution tensorrt-rtx-cu13-libs holds them",
        prevents=("tensorrt-rtx",),
    ),
    Rule(
        "tensorrt-driver-too-old",
        gpu_rules.old_driver_for_tensorrt,
        "docs.nvidia.com/deploy/cuda-compatibility, table 1",
        prevents=_FULL_TENSORRT,
    ),
    Rule(
        "tensorrt-provider-major",
        gpu_rules.tensorrt_provider,
        "microsoft/onnxruntime#32278, and the dynamic section of the provider's library",
    ),
    Rule(
        "onnxruntime-twice",
        python_rules.onnxruntime_twice,
        "microsoft/onnxruntime#26996, #7748",
    ),
    Rule(
        "gpu-wheel-without-driver",
        gpu_rules.gpu_wheel_without_driver,
        "onnxruntime.ai: execution providers that cannot be created are left out with a log line",
    ),
    Rule(
        "nvidia-driver-error",
        gpu_rules.driver_error,
        "nvidia-smi or the driver, asked in a process of its own",
    ),
    Rule(
        "torch-cuda-major",
        gpu_rules.torch_cuda_major,
        "onnxruntime.preload_dlls: torch's libraries serve only for the same major version",
    ),
    Rule(
        "tensorrt-rtx-gpu",
        gpu_rules.rtx_gpu,
        "NVIDIA TensorRT for RTX support matrix; kernels in libtensorrt_rtx 1.7.1",
    ),
    Rule(
        "extra-version",
        python_rules.other_extras,
        "the requirements of optimize-onnx",
    ),
    Rule(
        "requirement-conflict",
        python_rules.conflicts,
        "the metadata of the installed distributions",
    ),
    Rule(
        "installed-twice",
        python_rules.installed_twice,
        "the search path of Python",
    ),
    Rule(
        "foreign-package",
        python_rules.foreign_packages,
        "the search path of Python",
    ),
    Rule(
        "no-int8-dot-product",
        _slow_int8,
        "onnxruntime.ai, 'Quantize ONNX models': U8S8 on AVX2; microsoft/onnxruntime#6695",
    ),
    Rule("little-disk", _little_disk, "the file system"),
    Rule("cpu-quota", _throttled, "cgroups(7)", severity=Severity.NOTE),
    Rule(
        "libraries-need-preload",
        gpu_rules.needs_preload,
        "the provider's library has no run path (onnxruntime.preload_dlls)",
        severity=Severity.NOTE,
    ),
    Rule(
        "other-provider-cannot-load",
        gpu_rules.other_providers,
        "the dynamic section of the provider's library",
        severity=Severity.NOTE,
    ),
    Rule(
        "tensorrt-rtx-plugin-abort",
        gpu_rules.rtx_unversioned,
        "TensorRT for RTX 1.7.1: its parser opens libtensorrt_rtx.so when it meets a plugin",
        severity=Severity.NOTE,
    ),
    Rule(
        "onnx-newer-than-parser",
        gpu_rules.newer_onnx,
        "the opsets of optimizer.targets",
        severity=Severity.NOTE,
    ),
    Rule(
        "onnxruntime-optimizer-module",
        python_rules.optimizer_of_onnxruntime,
        "onnxruntime/transformers/__init__.py appends its folder to sys.path",
        severity=Severity.NOTE,
    ),
)
