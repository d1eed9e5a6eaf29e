"""Every known bad combination: found in facts that show it, and not in those of a good machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.diagnosis import Severity, diagnose
from optimizer.diagnosis.findings import apply
from optimizer.diagnosis.kernels import fp32_kernel, int8_kernel
from optimizer.diagnosis.rules import RULES
from optimizer.environment.facts import (
    Distribution,
    Facts,
    Foreign,
    Gpu,
    ImportResult,
    Library,
    Needed,
    Nvidia,
    OnnxRuntime,
    TensorRt,
)
from optimizer.environment.versions import Requirement
from optimizer.errors import OptionError
from optimizer.machine import Cpu, Memory
from optimizer.targets import TARGETS

SITE = Path("/venv/site-packages")
CPU = Cpu("Some CPU", "x86_64", 8, 8, None, ("avx", "fma", "avx2", "avx512f", "avx512_vnni"))
LOADED = ImportResult({"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]})


def installed(**versions: str) -> dict[str, Distribution]:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return {name: Distribution(name, v, SITE / f"{name}.dist-info") for name, v in named.items()}


def found(*names: str) -> tuple[Needed, ...]:
    return tuple(Needed(name, "loader", Path("/usr/lib") / name) for name in names)


def missing(name: str, *others: str) -> Needed:
    return Needed(name, "nobody", None, tuple(SITE / "libs" / other for other in others))


ORT = OnnxRuntime(
    ("onnxruntime-gpu",),
    SITE / "onnxruntime",
    "onnxruntime-gpu",
    "1.31.1",
    "13.0",
    LOADED,
    {"cuda": Library(SITE / "cuda.so", found("libcudart.so.13", "libcuda.so.1"))},
)
#: A machine on which everything fits: nothing is to be said about it.
GOOD = Facts(
    version="0.1.0",
    folder=SITE,
    installed=True,
    python="3.11.7",
    system="Linux x86_64",
    platform="linux",
    cpu=CPU,
    memory=Memory(10**10, 10**10, None),
    requirements=(
        Requirement("onnx", ">=1.22,<1.25"),
        Requirement("onnxruntime-gpu", ">=1.30,<2", "gpu"),
        Requirement("torch", ">=2.13,<2.15", "torch"),
        Requirement("torch", "==2.13.0", "test"),
    ),
    distributions=installed(onnx="1.23.2", torch="2.14.0", protobuf="7.0"),
    core=ImportResult({"opset": 23}),
    free={"/tmp": 10**11},
    onnxruntime=ORT,
    tensorrt=(TensorRt("tensorrt", "11.4.0", (SITE / "tensorrt_libs/libnvinfer.so.11",), cuda=13),),
    torch_cuda="13.0",
    nvidia=Nvidia((Gpu("NVIDIA L4", "8.9", 23 * 10**9),), driver="580.95.05"),
)


def changed(**changes: Any) -> Facts:
    return dataclasses.replace(GOOD, **changes)


def with_ort(**changes: Any) -> Facts:
    return changed(onnxruntime=dataclasses.replace(ORT, **changes))


def with_provider(name: str, *needs: Needed, error: str = "", **changes: Any) -> Facts:
    library = Library(SITE / f"{name}.so", needs, error)
    return dataclasses.replace(with_ort(providers={**ORT.providers, name: library}), **changes)


def with_rtx(libraries: tuple[Path, ...] = (SITE / "rtx/libtensorrt_rtx.so.1",)) -> dict[str, Any]:
    return {"tensorrt": (TensorRt("tensorrt-rtx", "1.7.1", libraries),)}


def with_gpu(capability: str, **changes: Any) -> dict[str, Any]:
    return {"nvidia": Nvidia((Gpu("Some GPU", capability),), **changes)}


def conflicting() -> dict[str, Distribution]:
    other = Distribution("modelopt", "0.47", SITE / "m", (Requirement("onnx", "~=1.21.0"),))
    return {**GOOD.distributions, "modelopt": other}


PRELOAD = Needed("libcudart.so.13", "python", SITE / "nvidia/cu13/lib/libcudart.so.13")
TWICE = Distribution("onnx", "1.19.0", Path("/home/user/site-packages/onnx-1.19.0.dist-info"))
NVINFER = missing("libnvinfer.so.10", "libnvinfer.so.11")

#: rule -> facts that show the combination, and what must be said; several cases may share a rule
CASES: list[tuple[str, Facts, list[str]]] = [
    ("core-import-fails", changed(core=ImportResult(None, "ImportError: no protobuf")),
     ["ImportError: no protobuf", "--force-reinstall optimize-onnx"]),
    ("own-requirement", changed(distributions=installed(onnx="1.20.0")),
     ["onnx is 1.20.0", "takes >=1.22,<1.25", 'pip install "onnx>=1.22,<1.25"']),
    ("onnxruntime-version", with_ort(version="1.18.0"),
     ["onnxruntime-gpu is 1.18.0", ">=1.30,<2"]),
    ("onnxruntime-broken", with_ort(loaded=ImportResult(None, "was ended by SIGABRT")),
     ["was ended by SIGABRT", "pip install --force-reinstall onnxruntime-gpu"]),
    ("onnxruntime-broken", changed(onnxruntime=OnnxRuntime(("onnxruntime",))),
     ["files of it are gone", "pip install --force-reinstall onnxruntime"]),
    ("onnxruntime-broken", with_ort(complete=False, loaded=ImportResult(None, "no attribute")),
     ["files of it are gone", "pip install --force-reinstall onnxruntime-gpu"]),
    ("cuda-provider-cannot-load",
     with_provider(
         "cuda", missing("libcudart.so.13", "libcudart.so.12"), missing("libcublas.so.13")),
     ["libcudart.so.13 (found: libcudart.so.12), libcublas.so.13 are missing",
      'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"']),
    ("cuda-driver-too-old", changed(**with_gpu("8.9", driver="550.54")),
     ["built for CUDA 13, which needs driver 580; installed is 550.54", "update the driver"]),
    ("cuda-driver-too-old", changed(**with_gpu("8.9", cuda="12.8")),
     ["the installed driver runs CUDA up to 12.8"]),
    ("cuda-13-old-gpu", changed(**with_gpu("7.0", driver="580.1")),
     ["starts at compute capability 7.5; Some GPU has 7.0"]),
    ("tensorrt-without-libraries", changed(tensorrt=(TensorRt("tensorrt", "11.4.0"),)),
     ["tensorrt 11.4.0 is installed without its shared libraries"]),
    ("tensorrt-rtx-without-libraries", changed(**with_rtx(())),
     ["tensorrt-rtx 1.7.1 is installed without its shared libraries"]),
    ("tensorrt-driver-too-old", changed(**with_gpu("8.9", driver="550.54")),
     ["TensorRT 11.4.0 is built for CUDA 13, which needs driver 580"]),
    ("tensorrt-provider-major", with_provider("tensorrt", NVINFER),
     ["needs libnvinfer.so.10, installed is TensorRT 11.4.0 (libnvinfer.so.11): it cannot load",
      'pip install "tensorrt-cu13==10.*"']),
    ("tensorrt-provider-major", with_provider("tensorrt", NVINFER, tensorrt=()),
     ["installed is TensorRT 11 (libnvinfer.so.11)"]),
    ("onnxruntime-twice", with_ort(distributions=("onnxruntime", "onnxruntime-gpu")),
     ["onnxruntime and onnxruntime-gpu are both installed",
      "of onnxruntime-gpu 1.31.1 are in place",
      "pip uninstall -y onnxruntime onnxruntime-gpu"]),
    ("gpu-wheel-without-driver", changed(nvidia=Nvidia()), ["no NVIDIA GPU was found"]),
    ("nvidia-driver-error", changed(nvidia=Nvidia(error="nvidia-smi: no answer within 15 s")),
     ["nvidia-smi: no answer within 15 s"]),
    ("torch-cuda-major", changed(torch_cuda="12.8"),
     ["torch brings the libraries of CUDA 12.8", "needs those of CUDA 13"]),
    ("tensorrt-rtx-gpu", changed(**with_rtx(), **with_gpu("9.0", driver="580.1")),
     ["no kernels for Some GPU (compute capability 9.0)"]),
    ("extra-version", changed(distributions=installed(onnx="1.23.2", torch="2.12.0")),
     ["torch is 2.12.0", "takes >=2.13,<2.15"]),
    ("requirement-conflict", changed(distributions=conflicting()),
     ["modelopt 0.47 wants onnx~=1.21.0, installed is 1.23.2", "an environment of its own"]),
    ("installed-twice", changed(doubles=(TWICE,)),
     ["onnx is installed twice: 1.23.2 in /venv/site-packages is used, 1.19.0 lies in /home/user"]),
    ("foreign-package", changed(foreign=(Foreign("passes", Path("/w/passes.py"), first=True),)),
     ["/w/passes.py is called 'passes'", "rename it"]),
    ("foreign-package",
     changed(foreign=(Foreign("optimizer", SITE / "optimizer.py", first=True, owner="x"),)),
     ["(of x) is called 'optimizer'", "pip uninstall x"]),
    ("no-int8-dot-product",
     changed(cpu=dataclasses.replace(CPU, instructions=("avx", "fma", "avx2"))),
     ["no int8 dot product (AVX2)", "--bench"]),
    ("little-disk", changed(free={"/tmp": 10**9}), ["/tmp has 1.0 GB free", "TMPDIR"]),
    ("cpu-quota", changed(cpu=dataclasses.replace(CPU, quota=1.5)),
     ["grants 1.5 cores' worth of time, 8 cores are visible", "--threads 1"]),
    ("libraries-need-preload", with_provider("cuda", PRELOAD),
     ["finds libcudart.so.13 only after", "onnxruntime.preload_dlls()"]),
    ("other-provider-cannot-load", with_provider("tensorrt", missing("libnvinfer.so.10")),
     ["offers the tensorrt provider, which cannot load: libnvinfer.so.10 is missing",
      'then pip install "tensorrt-cu13==10.*"']),
    ("other-provider-cannot-load",
     with_ort(cuda=None, providers={"tensorrt": Library(
         SITE, (missing("libnvinfer.so.10"), *found("libcudart.so.12")))}),
     ['then pip install "tensorrt-cu12==10.*"']),
    ("other-provider-cannot-load", with_provider("openvino", missing("liba.so")),
     ["offers the openvino provider", "nothing, unless you use that provider"]),
    ("other-provider-cannot-load", with_provider("openvino", error="it is damaged"),
     ["the openvino provider: it is damaged"]),
    ("tensorrt-rtx-plugin-abort", changed(**with_rtx()),
     ["holds libtensorrt_rtx.so.1 only", "link that name"]),
    ("onnx-newer-than-parser", changed(core=ImportResult({"opset": 28})),
     ["onnx 1.23.2 writes opset 28", "tensorrt 11.4.0 is known to take 24"]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "facts", "parts"), CASES, ids=[case[0] for case in CASES])
def test_a_bad_combination_is_found_and_explained(
    rule: str, facts: Facts, parts: list[str]
) -> None:
    findings = [item for item in apply(RULES, facts) if item.id == rule]
    assert len(findings) == 1
    for part in parts:
        assert part in findings[0].what + " -> " + findings[0].advice
    assert findings[0].source


def test_nothing_is_said_about_a_good_machine() -> None:
    assert apply(RULES, GOOD) == ()
    assert all(item.usable for item in diagnose(GOOD).targets if item.target.startswith("ort-"))


def test_a_checkout_is_warned_of_the_optimizer_module_of_onnx_runtime(tmp_path: Path) -> None:
    module = tmp_path / "transformers/optimizer.py"
    module.parent.mkdir()
    module.touch()
    facts = dataclasses.replace(with_ort(folder=tmp_path), installed=False)
    assert [item.id for item in apply(RULES, facts)] == ["onnxruntime-optimizer-module"]
    assert apply(RULES, dataclasses.replace(facts, installed=True)) == ()


def test_every_rule_has_a_case_and_a_name_of_its_own() -> None:
    names = [rule.id for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(names) == {case[0] for case in CASES} | {"onnxruntime-optimizer-module"}
    for rule in RULES:
        assert set(rule.prevents) <= set(TARGETS)


def test_a_driver_that_fits_and_gpus_that_fit_are_not_complained_about() -> None:
    two = Nvidia((Gpu("old", "7.0"), Gpu("new", "9.0")), driver="580.65.06")
    assert apply(RULES, changed(nvidia=two)) == ()
    assert apply(RULES, changed(**with_gpu("12.0", cuda="13.0"), torch_cuda=None)) == ()


def test_a_missing_driver_is_no_missing_library() -> None:
    facts = with_provider("cuda", missing("libcuda.so.1"), nvidia=Nvidia())
    assert [item.id for item in apply(RULES, facts)] == ["gpu-wheel-without-driver"]


def test_the_gravest_findings_come_first() -> None:
    facts = changed(
        cpu=dataclasses.replace(CPU, quota=1.0),
        torch_cuda="12.8",
        core=ImportResult(None, "broken"),
    )
    severities = [item.severity for item in apply(RULES, facts)]
    assert severities == [Severity.PROBLEM, Severity.WARNING, Severity.NOTE]


# Kernels


@pytest.mark.parametrize(("instructions", "int8", "fast", "fp32"), [
    (("avx", "fma", "avx2", "avx512f", "avx512_vnni", "amx_int8"), "AMX", True, "AVX-512"),
    (("avx", "fma", "avx2", "avx512f", "avx512_vnni"), "AVX-512 VNNI", True, "AVX-512"),
    (("avx", "fma", "avx2", "avx_vnni"), "AVX-VNNI", True, "AVX2 with FMA"),
    (("avx", "fma", "avx2", "avx512f", "avx512bw"), "AVX-512", False, "AVX-512"),
    (("avx", "fma", "avx2"), "AVX2", False, "AVX2 with FMA"),
    (("asimd", "asimddp", "i8mm"), "Arm int8 matrix products", True, "Arm Neon"),
    (("asimd", "asimddp"), "Arm dot products", True, "Arm Neon"),
    (("asimd",), "Arm Neon", False, "Arm Neon"),
])  # fmt: skip
def test_the_kernels_follow_from_the_instructions(
    instructions: tuple[str, ...], int8: str, fast: bool, fp32: str
) -> None:
    cpu = dataclasses.replace(CPU, instructions=instructions)
    chosen, plain = int8_kernel(cpu), fp32_kernel(cpu)
    assert chosen is not None
    assert plain is not None
    assert (chosen.name, chosen.dot_product, plain.name) == (int8, fast, fp32)


def test_an_unknown_processor_has_no_kernels() -> None:
    assert int8_kernel(dataclasses.replace(CPU, instructions=None)) is None
    assert fp32_kernel(dataclasses.replace(CPU, instructions=())) is None


# Targets


def no_gpu(facts: Facts) -> Facts:
    return dataclasses.replace(facts, nvidia=Nvidia())


JETSON = changed(
    tensorrt=(TensorRt("tensorrt", "10.3.0", (Path("/usr/lib/libnvinfer.so.10"),)),),
    nvidia=Nvidia((Gpu("Orin", "8.7"),), cuda="13.0", jetpack="36.4"),
)
#: target, facts, whether it runs, whether engines are built, part of the reason
TARGET_CASES: list[tuple[str, Facts, bool, bool | None, str]] = [
    ("ort-cpu", GOOD, True, None, ""),
    ("ort-cpu", changed(onnxruntime=OnnxRuntime()), False, None, "optimize-onnx[cpu]"),
    ("ort-cpu", with_ort(loaded=ImportResult(None, "x")), False, None, "onnxruntime-broken"),
    ("ort-cuda", GOOD, True, None, ""),
    ("ort-cuda", no_gpu(GOOD), False, None, "no NVIDIA GPU was found"),
    ("ort-cuda", with_ort(loaded=ImportResult({"providers": ["CPUExecutionProvider"]})),
     False, None, "has no CUDA provider"),
    ("ort-cuda", with_provider("cuda", missing("liba.so")), False, None,
     "cuda-provider-cannot-load"),
    ("tensorrt-rtx", GOOD, False, False, "optimize-onnx[tensorrt-rtx]"),
    ("tensorrt-rtx", changed(**with_rtx()), True, True, ""),
    ("tensorrt-rtx", no_gpu(changed(**with_rtx())), False, True, "no NVIDIA GPU was found"),
    ("tensorrt-rtx", changed(**with_rtx(), **with_gpu("9.0", driver="580")), False, True,
     "no kernels for compute capability 9.0"),
    ("tensorrt-rtx", changed(**with_rtx(())), False, False, "tensorrt-rtx-without-libraries"),
    ("tensorrt-11", GOOD, True, True, ""),
    ("tensorrt-11", no_gpu(GOOD), False, False, "no NVIDIA GPU was found"),
    ("tensorrt-10", GOOD, False, False, "TensorRT 10 is needed, installed is 11.4.0"),
    ("tensorrt-10", changed(tensorrt=(TensorRt("tensorrt", "10.1", (SITE,)),)), False, False,
     "TensorRT 10.3 or later is needed"),
    ("tensorrt-10", JETSON, True, True, ""),
    ("tensorrt-10",
     changed(tensorrt=(TensorRt("tensorrt", "10.3", (SITE,), python=False),)), False, False,
     "--system-site-packages"),
    ("jetson", GOOD, False, False, "this is no Jetson"),
    ("jetson", JETSON, True, True, ""),
    ("jetson", dataclasses.replace(JETSON, nvidia=Nvidia(jetpack="35.4")), False, False,
     "JetPack 6 has Jetson Linux 36, this is 35.4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "facts", "runs", "builds", "reason"), TARGET_CASES)
def test_a_target_is_usable_or_there_is_a_reason(
    name: str, facts: Facts, runs: bool, builds: bool | None, reason: str
) -> None:
    (item,) = [t for t in diagnose(facts, [name]).targets if t.target == name]
    assert (item.runs, item.builds) == (runs, builds)
    assert reason in "; ".join(item.reasons)
    assert bool(item.reasons) == (not runs)
    assert diagnose(facts, [name]).exit_code == (0 if runs or builds else 6)


def test_without_a_target_the_default_one_must_be_usable() -> None:
    assert diagnose(no_gpu(GOOD)).exit_code == 0
    assert diagnose(changed(onnxruntime=OnnxRuntime())).exit_code == 6
    assert diagnose(GOOD, ["ort-cpu", "jetson"]).unusable == ("jetson",)


def test_warnings_do_not_change_the_exit_code() -> None:
    diagnosis = diagnose(changed(torch_cuda="12.8", free={"/tmp": 0}))
    assert len(diagnosis.findings) == 2
    assert diagnosis.exit_code == 0


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(OptionError, match="did you mean 'ort-cpu'"):
        diagnose(GOOD, ["ort-cpuu"])


@pytest.mark.parametrize("make", [lambda: GOOD, lambda: JETSON, lambda: CASES[5][1]])
def test_a_diagnosis_is_json(make: Callable[[], Facts]) -> None:
    facts = make()
    content = json.loads(json.dumps({"facts": facts.as_dict(), **diagnose(facts).as_dict()}))
    assert {item["severity"] for item in content["findings"]} <= {"problem", "warning", "note"}
    assert [item["target"] for item in content["targets"]] == list(TARGETS)
