"""Tools that rewrite an ONNX file: what users may have run before they come to this project.

ONNX Runtime's own optimizations, optimizers and quantizers, simplifiers and precision converters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import families
import numpy as np
import onnx
import onnx_ir as ir
from families import Entry


class NotExported(Exception):
    """The exporter or tool itself cannot make this file; the text says what it answered."""


@dataclass(frozen=True)
class Cell:
    """One family made by one way."""

    entry: Entry
    way: str
    kv_cache: bool = False

    @property
    def id(self) -> str:
        return f"{self.entry.name}-{self.way}{'-kv' if self.kv_cache else ''}"


def _ort_session(source: Path, target: Path, level: str) -> None:
    """What ONNX Runtime itself makes of a model when it loads it, saved."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def ort_extended(cell: Cell, source: Path, target: Path) -> None:
    del cell
    _ort_session(source, target, "EXTENDED")


def ort_all(cell: Cell, source: Path, target: Path) -> None:
    del cell
    _ort_session(source, target, "ALL")


#: What ONNX Runtime's transformers optimizer calls each family.
_MODEL_TYPES = {
    "gpt2": "gpt2", "bart": "bart", "clip-text": "clip", "vit": "vit", "deit": "vit",
    "dinov2": "vit", "clip-vision": "vit", "siglip-vision": "vit", "swin": "swin", "t5": "t5",
    "phi": "phi", "mpt": "gpt2", "bloom": "gpt2", "opt": "gpt2", "gptj": "gpt2",
}  # fmt: skip


def ort_transformers(cell: Cell, source: Path, target: Path) -> None:
    from onnxruntime.transformers import optimizer

    from optimizer.frontends.onnx_export import quiet

    blocks = cell.entry.blocks
    base = cell.entry.name.removesuffix("-encoder").removesuffix("-decoder")
    with quiet():
        found = optimizer.optimize_model(
            str(source), model_type=_MODEL_TYPES.get(base, "bert"), num_heads=blocks.heads,
            hidden_size=blocks.hidden, opt_level=0,
        )  # fmt: skip
        found.save_model_to_file(str(target))


def ort_fusions(cell: Cell, source: Path, target: Path) -> None:
    from onnxscript.rewriter import ort_fusions

    del cell
    ort_fusions.optimize_for_ort(model := ir.load(source))
    ir.save(model, target)


def onnxscript(cell: Cell, source: Path, target: Path) -> None:
    import onnxscript.optimizer

    del cell
    model = ir.load(source)
    onnxscript.optimizer.optimize(model)
    ir.save(model, target)


def onnxsim(cell: Cell, source: Path, target: Path) -> None:
    import onnxsim

    del cell
    simplified, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(simplified, target)


def onnxslim(cell: Cell, source: Path, target: Path) -> None:
    import onnxslim

    del cell
    onnxslim.slim(str(source), str(target))


def float16(cell: Cell, source: Path, target: Path) -> None:
    from onnxruntime.transformers import float16

    del cell
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


_LINEAR = ["MatMul", "Gemm"]


def _folded(source: Path, target: Path) -> Path:
    """After ONNX Runtime's basic clean-up, without shapes, which its quantizers may doubt."""
    _ort_session(source, target, "BASIC")
    model = onnx.load(target)
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


def dynamic_int8(cell: Cell, source: Path, target: Path) -> None:
    from onnxruntime import quantization

    del cell
    folded = _folded(source, target.with_suffix(".folded.onnx"))
    quantization.quantize_dynamic(
        folded, target, per_channel=True, weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=_LINEAR,
    )  # fmt: skip
    folded.unlink()


def _linear_nodes(path: Path) -> list[str]:
    """Products by a weight; those of queries and keys stay in float."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type in _LINEAR and n.input[1] in weights]


def _static_int8(cell: Cell, source: Path, target: Path, *, symmetric: bool) -> None:
    from onnxruntime import quantization

    kind = quantization.QuantType
    folded = _folded(source, target.with_suffix(".folded.onnx"))
    feeds = iter([families.make_feeds(cell.entry, cell.kv_cache, seed=s) for s in range(3)])
    wanted = {value.name for value in onnx.load(folded).graph.input}

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Mapping[str, np.ndarray] | None:
            feed = next(feeds, None)
            return None if feed is None else {n: a for n, a in feed.items() if n in wanted}

    quantization.quantize_static(
        folded, target, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=kind.QInt8 if symmetric else kind.QUInt8, weight_type=kind.QInt8,
        op_types_to_quantize=_LINEAR,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
        nodes_to_quantize=_linear_nodes(folded),
    )  # fmt: skip
    folded.unlink()


def static_int8(cell: Cell, source: Path, target: Path) -> None:
    _static_int8(cell, source, target, symmetric=False)


def qdq_symmetric(cell: Cell, source: Path, target: Path) -> None:
    _static_int8(cell, source, target, symmetric=True)


def genai(cell: Cell, target: Path) -> None:
    """The model builder of ONNX Runtime's generation library, with its own kinds of nodes."""
    import tempfile

    import tokenizers
    import transformers
    from onnxruntime_genai.models import builder

    from optimizer.frontends.onnx_export import quiet
    from optimizer.model_io import save_model

    if cell.entry.kind != "decoder" or not cell.kv_cache:
        raise NotExported("the builder writes decoders with cache only")
    words = {str(index): index for index in range(families.VOCAB)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    with tempfile.TemporaryDirectory() as folder, quiet():
        source = Path(folder) / "source"
        families.make_model(cell.entry).save_pretrained(source)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(source)
        transformers.GenerationConfig(eos_token_id=98, bos_token_id=0).save_pretrained(source)
        words_of = (cell.entry.name, str(source), f"{folder}/out", "fp32", "cpu", f"{folder}/cache")
        builder.create_model(*words_of, **builder.parse_extra_options(*words_of, []))
        model = ir.load(f"{folder}/out/model.onnx")
        save_model(model, target, "never", force=True)
