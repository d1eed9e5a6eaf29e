"""What each target runs, and which spelling it runs fastest: one capability table.

A target names a runtime on a kind of device. ``legalize`` reads the table; passes ask it for
decisions that depend on where the result will run.
"""

from __future__ import annotations

import difflib
import enum
from dataclasses import dataclass

from optimizer.errors import OptionError


class Quantization(enum.Enum):
    """How an int8 matrix product is spelled for a target.

    U8S8_CONTRIB: uint8 activations with zero point 128, int8 weights, and
        ``com.microsoft.MatMulIntegerToFloat``.
    S8_QDQ: symmetric int8 QuantizeLinear / DequantizeLinear pairs around MatMul, as canonical.
    """

    U8S8_CONTRIB = "u8s8-contrib"
    S8_QDQ = "s8-qdq"


class HalfPrecision(enum.Enum):
    """What a target does with a 16-bit floating type.

    COMPUTED: it computes with such numbers.
    STORED: weights and interface may have the type, computing is done in float32. ONNX Runtime has
        few kernels for either type on x86 processors: bfloat16 it refuses, float16 it converts
        around its kernels, which is slower than float32.
    """

    COMPUTED = "computed"
    STORED = "stored"


@dataclass(frozen=True)
class Target:
    """Capabilities of one target.

    Attributes:
        name: As the user types it.
        runtime: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        device: "cpu" or "cuda".
        opset: Default opset of the output.
        min_opset, max_opset: Range that the runtime's parser or kernels accept.
        kv_cache: Forms of the KV cache that can be written, the default first.
        quantization: The spelling of int8 products.
        int8_products: Whether it multiplies int8 numbers. Where it does not, it makes floats of
            them at every run, and an int8 model is slower than the one in float.
        contrib_ops: Whether it runs operators of the domain ``com.microsoft``.
        attention: Whether the standard Attention operator (opset 23) runs.
        attention_cache: Whether Attention may hold the KV cache (past inputs, present outputs) or
            have a softcap.
        attention_kernels: Smallest and largest size of a head for which Attention of a 16-bit type
            runs; every other, and all of float32, is spelled out. None = it runs for all.
        rotary: Whether the standard RotaryEmbedding operator (opset 23) runs.
        full_attention_mask: Whether an attention mask must have its query dimension written out.
        float16, bfloat16: What it does with these types.
        notes: What a user should know about this target.
    """

    name: str
    runtime: str
    device: str
    opset: int
    min_opset: int
    max_opset: int
    kv_cache: tuple[str, ...] = ("append",)
    quantization: Quantization = Quantization.S8_QDQ
    int8_products: bool = True
    contrib_ops: bool = False
    attention: bool = True
    attention_cache: bool = True
    attention_kernels: tuple[int, int] | None = None
    rotary: bool = True
    full_attention_mask: bool = False
    float16: HalfPrecision = HalfPrecision.COMPUTED
    bfloat16: HalfPrecision = HalfPrecision.COMPUTED
    notes: str = ""

    def opset_for(self, own: int) -> int:
        """The opset that a model of opset ``own`` is written in, unless the user asks for one."""
        return own if self.min_opset <= own <= self.max_opset else self.opset

    def only_stores(self, name: str) -> bool:
        """Whether it does not compute in the type "float16" or "bfloat16"."""
        kinds = {"float16": self.float16, "bfloat16": self.bfloat16}
        return kinds[name] is HalfPrecision.STORED


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ort-cpu",
            runtime="onnxruntime",
            device="cpu",
            opset=23,
            min_opset=18,
            max_opset=24,
            kv_cache=("append", "in-place"),
            quantization=Quantization.U8S8_CONTRIB,
            contrib_ops=True,
            full_attention_mask=True,
            float16=HalfPrecision.STORED,
            bfloat16=HalfPrecision.STORED,
            notes="ONNX Runtime 1.30 or later on x86-64 or Arm CPUs",
        ),
        Target(
            name="ort-cuda",
            runtime="onnxruntime",
            device="cuda",
            opset=23,
            min_opset=18,
            max_opset=24,
            int8_products=False,
            contrib_ops=True,
            full_attention_mask=True,
            notes="ONNX Runtime 1.31 or later with CUDA; it has no int8 products",
        ),
        Target(
            name="tensorrt-rtx",
            runtime="tensorrt-rtx",
            device="cuda",
            opset=23,
            min_opset=18,
            max_opset=23,
            attention_cache=False,
            attention_kernels=(9, 256),
            notes="engines are built ahead of time, also without a GPU; zero points must be zero",
        ),
        Target(
            name="tensorrt-10",
            runtime="tensorrt",
            device="cuda",
            opset=20,
            min_opset=18,
            max_opset=20,
            attention=False,
            rotary=False,
            notes="TensorRT 10.3 and later 10.x: attention is written as MatMul and Softmax",
        ),
        Target(
            name="tensorrt-11",
            runtime="tensorrt",
            device="cuda",
            opset=23,
            min_opset=18,
            max_opset=24,
            attention_cache=False,
            notes="TensorRT 11: strongly typed networks only",
        ),
        Target(
            name="jetson",
            runtime="tensorrt",
            device="cuda",
            opset=20,
            min_opset=18,
            max_opset=20,
            attention=False,
            rotary=False,
            notes="TensorRT 10.3 of JetPack 6; the engine is built on the device",
        ),
    )
}

DEFAULT_TARGET = "ort-cpu"

#: Key of the model's metadata under which a form of the KV cache other than "append" is declared,
#: as JSON: "form", "buffers" (past input -> present output), "layout", "padding", ...
KV_CACHE_KEY = "optimize.kv_cache"


def get_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        OptionError: There is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    close = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known targets: {', '.join(TARGETS)}"
    msg = f"--target: there is no target '{name}'; {hint}"
    raise OptionError(msg)
