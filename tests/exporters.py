"""The ways in which models of ``families`` become ONNX files, kept on disk once made.

A column of the support table is one way: an exporter and an opset, perhaps followed by a tool that
rewrites the file (ONNX Runtime's optimizers and quantizers, simplifiers, precision converters).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import families
import rewriters
from families import Entry
from rewriters import Cell, NotExported

_PACKAGES = (
    "torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime", "onnxsim", "onnxslim",
)  # fmt: skip
CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "zoo"
"""Kept between test runs; an export takes some seconds, the file a few hundred kilobytes."""


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
    "converted-fp16": _after("torchscript-17", rewriters.float16),
    "onnxscript": _after("dynamo-raw", rewriters.onnxscript),
    "onnxsim": _after("torchscript-17", rewriters.onnxsim),
    "onnxsim-dynamo": _after("dynamo-18", rewriters.onnxsim),
    "onnxslim": _after("torchscript-17", rewriters.onnxslim),
    "onnxslim-dynamo": _after("dynamo-18", rewriters.onnxslim),
    "ort-extended": _after("torchscript-17", rewriters.ort_extended),
    "ort-all": _after("dynamo-18", rewriters.ort_all),
    "ort-transformers": _after("torchscript-17", rewriters.ort_transformers),
    "ort-fusions": _after("dynamo-18", rewriters.ort_fusions),
    "ort-dynamic-int8": _after("torchscript-17", rewriters.dynamic_int8),
    "ort-static-int8": _after("torchscript-17", rewriters.static_int8),
    "genai": rewriters.genai,
    "qdq-symmetric": _after("dynamo-18", rewriters.qdq_symmetric),
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
        if not stale.name.startswith(f"{path.stem}."):  # another process may be writing it
            stale.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part.onnx")
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
    for package in _PACKAGES:
        digest.update(importlib.metadata.version(package).encode())
    from optimizer import frontends

    here = Path(__file__).parent
    sources = [
        here / "exporters.py",
        here / "halves.py",
        here / "rewriters.py",
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
    "qdq-symmetric", "ort-transformers", "torchscript-14", "torchscript-eager-fp16", "onnxscript",
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
BEYOND = frozenset({"gemma-dynamo-fp16", "falcon-alibi-torchscript-16-kv"})


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
