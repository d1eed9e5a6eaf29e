"""The ways in which models of ``families`` become ONNX files, kept on disk once made.

A column of the support table is one way: an exporter and an opset, perhaps followed by a tool that
rewrites the file (ONNX Runtime's optimizers and quantizers, simplifiers, precision converters).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx
import onnx_ir as ir
from families import Entry

CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "zoo"
"""Kept between test runs; an export takes some seconds, the file a few hundred kilobytes."""


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


def _architecture(model: Any) -> Any:
    model.config.architectures = [type(model).__name__]
    return model.config


def _halved(model: Any, dtype: str | None) -> Any:
    import torch

    return model if dtype is None else model.to(getattr(torch, dtype))


def _signature(entry: Entry, model: Any, kv_cache: bool) -> tuple[Any, Any]:
    """Wrapper and signature, those of the project's own frontend where it has one."""
    if entry.kind in ("encoder", "seq2seq"):
        import halves

        return halves.build(entry, model, kv_cache)
    from optimizer.frontends import hf_signature, hugging_face

    plan = hugging_face.detect(_architecture(model))
    return hf_signature.build(model, plan.kind, list(plan.outputs), kv_cache=kv_cache)


def _dynamo(cell: Cell, target: Path, *, opset: int, dtype: str | None = None) -> None:
    from optimizer.frontends import hugging_face, onnx_export

    model = _halved(families.make_model(cell.entry), dtype)
    if cell.entry.kind in ("encoder", "seq2seq"):
        wrapper, signature = _signature(cell.entry, model, cell.kv_cache)
        exported = onnx_export.trace(wrapper, signature, opset)
    else:
        plan = hugging_face.detect(_architecture(model))
        exported = hugging_face.export_loaded(model, plan, kv_cache=cell.kv_cache, opset=opset)
    onnx_export.write(exported, target)


def _raw(cell: Cell, target: Path) -> None:
    """Without the clean-up that torch's exporter runs by default."""
    import torch

    from optimizer.frontends.onnx_export import quiet

    wrapper, signature = _traceable(cell)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            wrapper.eval(), signature.args, dynamo=True, optimize=False, opset_version=18,
            dynamic_shapes=signature.dynamic_shapes, input_names=list(signature.inputs),
            output_names=list(signature.outputs), verbose=False,
        )  # fmt: skip
    program.save(target, external_data=False)


def _traceable(cell: Cell, dtype: str | None = None, *, eager: bool = False) -> tuple[Any, Any]:
    """Wrapper and signature; ``eager`` spells attention out instead of calling torch's own."""
    options = {"attn_implementation": "eager"} if eager else {}
    model = families.make_model(cell.entry, **options)
    if getattr(model.config, "num_local_experts", None):
        # The default dispatch of tokens to experts depends on data.
        model.set_experts_implementation("batched_mm")
    return _signature(cell.entry, _halved(model, dtype), cell.kv_cache)


def _torchscript(
    cell: Cell, target: Path, *, opset: int, dtype: str | None = None, eager: bool = False
) -> None:
    import torch

    from optimizer.frontends.onnx_export import quiet

    wrapper, signature = _traceable(cell, dtype, eager=eager)
    axes = {name: dict(found) for name, found in signature.axes.items()}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            wrapper.eval(), signature.args, str(target), dynamo=False, opset_version=opset,
            input_names=list(signature.inputs), output_names=list(signature.outputs),
            dynamic_axes=axes,
        )  # fmt: skip


def _after(way: str, tool: Callable[[Cell, Path, Path], None]) -> Callable[[Cell, Path], None]:
    """A tool that rewrites the file another way makes."""

    def make(cell: Cell, target: Path) -> None:
        tool(cell, export(Cell(cell.entry, way, cell.kv_cache), target.parent), target)

    return make


def _ort_session(cell: Cell, source: Path, target: Path, *, level: str) -> None:
    """What ONNX Runtime itself makes of a model when it loads it, saved."""
    import onnxruntime as ort

    del cell
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


#: What ONNX Runtime's transformers optimizer calls each family.
_MODEL_TYPES = {
    "gpt2": "gpt2", "bart": "bart", "clip-text": "clip", "vit": "vit", "deit": "vit",
    "dinov2": "vit", "clip-vision": "vit", "siglip-vision": "vit", "swin": "swin", "t5": "t5",
    "phi": "phi", "mpt": "gpt2", "bloom": "gpt2", "opt": "gpt2", "gptj": "gpt2",
}  # fmt: skip


def _ort_transformers(cell: Cell, source: Path, target: Path) -> None:
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


def _ort_fusions(cell: Cell, source: Path, target: Path) -> None:
    from onnxscript.rewriter import ort_fusions

    del cell
    ort_fusions.optimize_for_ort(model := ir.load(source))
    ir.save(model, target)


def _onnxscript(cell: Cell, source: Path, target: Path) -> None:
    import onnxscript.optimizer

    del cell
    model = ir.load(source)
    onnxscript.optimizer.optimize(model)
    ir.save(model, target)


def _onnxsim(cell: Cell, source: Path, target: Path) -> None:
    import onnxsim

    del cell
    simplified, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(simplified, target)


def _onnxslim(cell: Cell, source: Path, target: Path) -> None:
    import onnxslim

    del cell
    onnxslim.slim(str(source), str(target))


def _float16(cell: Cell, source: Path, target: Path) -> None:
    from onnxruntime.transformers import float16

    del cell
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


_LINEAR = ["MatMul", "Gemm"]


def _folded(source: Path, target: Path) -> Path:
    """After ONNX Runtime's basic clean-up, without shapes, which its quantizers may doubt."""
    _ort_session(Cell(families.FAMILIES["llama"], ""), source, target, level="BASIC")
    model = onnx.load(target)
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


def _dynamic_int8(cell: Cell, source: Path, target: Path) -> None:
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


def _genai(cell: Cell, target: Path) -> None:
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


WAYS: dict[str, Callable[[Cell, Path], None]] = {
    **{f"dynamo-{n}": functools.partial(_dynamo, opset=n) for n in range(18, 25)},
    "dynamo-raw": _raw,
    # torch's own attention has no translation before opset 14.
    "torchscript-13": functools.partial(_torchscript, opset=13, eager=True),
    **{f"torchscript-{n}": functools.partial(_torchscript, opset=n) for n in range(14, 21)},
    "torchscript-eager": functools.partial(_torchscript, opset=17, eager=True),
    "dynamo-fp16": functools.partial(_dynamo, opset=23, dtype="float16"),
    "dynamo-18-fp16": functools.partial(_dynamo, opset=18, dtype="float16"),
    "dynamo-bf16": functools.partial(_dynamo, opset=23, dtype="bfloat16"),
    "torchscript-fp16": functools.partial(_torchscript, opset=17, dtype="float16"),
    "torchscript-eager-fp16": functools.partial(
        _torchscript, opset=17, dtype="float16", eager=True
    ),
    "converted-fp16": _after("torchscript-17", _float16),
    "onnxscript": _after("dynamo-raw", _onnxscript),
    "onnxsim": _after("torchscript-17", _onnxsim),
    "onnxsim-dynamo": _after("dynamo-18", _onnxsim),
    "onnxslim": _after("torchscript-17", _onnxslim),
    "onnxslim-dynamo": _after("dynamo-18", _onnxslim),
    "ort-extended": _after("torchscript-17", functools.partial(_ort_session, level="EXTENDED")),
    "ort-all": _after("dynamo-18", functools.partial(_ort_session, level="ALL")),
    "ort-transformers": _after("torchscript-17", _ort_transformers),
    "ort-fusions": _after("dynamo-18", _ort_fusions),
    "ort-dynamic-int8": _after("torchscript-17", _dynamic_int8),
    "ort-static-int8": _after("torchscript-17", functools.partial(_static_int8, symmetric=False)),
    "genai": _genai,
    "qdq-symmetric": _after("dynamo-18", functools.partial(_static_int8, symmetric=True)),
}


def export(cell: Cell, cache_dir: Path = CACHE) -> Path:
    """The ONNX file of a cell, made unless it is already there.

    The file name holds a hash of the entry, the library versions, the frontend's sources and the
    files here; exports with another hash are removed.

    Raises:
        NotExported: The exporter or tool cannot make it.
    """
    path = cache_dir / f"{cell.id}-{_key(cell.entry)}.onnx"
    failed = path.with_suffix(".failed")
    if path.is_file():
        return path
    if failed.is_file():
        raise NotExported(failed.read_text("utf-8"))
    cache_dir.mkdir(parents=True, exist_ok=True)
    for stale in cache_dir.glob(f"{cell.id}-{'[0-9a-f]' * 16}.*"):
        if stale.stem != path.stem:  # another process may have written it just now
            stale.unlink(missing_ok=True)
    temporary = path.with_suffix(".part.onnx")
    try:
        WAYS[cell.way](cell, temporary)
        temporary.replace(path)
    except NotExported:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        failed.write_text(text, "utf-8")
        raise NotExported(text) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


@functools.cache
def _fixed_key() -> bytes:
    """Everything besides the entry that an export depends on."""
    digest = hashlib.sha256()
    for package in ("torch", "transformers", "onnx_ir", "onnxscript", "onnxruntime"):
        digest.update(importlib.metadata.version(package.replace("_", "-")).encode())
    from optimizer import frontends

    here = Path(__file__).parent
    sources = [
        here / "exporters.py",
        here / "halves.py",
        *Path(frontends.__file__).parent.glob("*.py"),
    ]
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.digest()


def _key(entry: Entry) -> str:
    described = asdict(entry)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(_fixed_key())
    return digest.hexdigest()[:16]


#: What the diagonal takes in turn: one export by dynamo, and one by anything else.
_DYNAMO = ("dynamo-18", "dynamo-23", "dynamo-raw", "dynamo-24", "dynamo-21", "dynamo-fp16")
_OTHERS = (
    "torchscript-17", "torchscript-13", "onnxsim", "ort-extended", "torchscript-20", "onnxslim",
    "ort-all", "torchscript-eager", "converted-fp16", "ort-dynamic-int8", "ort-fusions",
    "qdq-symmetric", "ort-transformers", "torchscript-14", "torchscript-fp16", "onnxscript",
    "ort-static-int8", "torchscript-16",
)  # fmt: skip


def diagonal() -> list[Cell]:
    """A fixed choice with every family and every exporter, with and without cache."""
    chosen: list[Cell] = []
    for index, entry in enumerate(families.FAMILIES.values()):
        first, second = _DYNAMO[index % len(_DYNAMO)], _OTHERS[index % len(_OTHERS)]
        cached = entry.cached and index % 2 == 0
        chosen.append(Cell(entry, first, cached))
        chosen.append(Cell(entry, second, entry.cached and not cached))
    return chosen


#: Cells of the diagonal that an exporter or tool cannot make.
BEYOND: frozenset[str] = frozenset()


def frontend_cells() -> list[Cell]:
    """Exports as the project's own frontend makes them, of what it takes."""
    kinds = ("decoder", "text", "vision")
    entries = [entry for entry in families.FAMILIES.values() if entry.kind in kinds]
    chosen: list[Cell] = []
    for index, entry in enumerate(entries):
        opsets = (18, 23) if index % 2 else (23, 18)
        chosen.append(Cell(entry, f"dynamo-{opsets[0]}"))
        if entry.cached:
            chosen.append(Cell(entry, f"dynamo-{opsets[1]}", True))
    return chosen
