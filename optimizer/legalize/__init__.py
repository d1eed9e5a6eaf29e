"""Lowers a canonical model to the form that a target runs, and runs fastest.

Exact rewrites only: what they compute is what the canonical graph computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optimizer import gate as gates
from optimizer import widening
from optimizer.errors import OptionError, UnsupportedError
from optimizer.gate import Gate
from optimizer.legalize import key_masks, kv_in_place, opset_rules, ort_cpu, ort_cuda, tensorrt
from optimizer.model_input import is_runtime_operator
from optimizer.pass_base import Report, Skip
from optimizer.targets import Quantization, Target, get_target

__all__ = ["LegalizeReport", "legalize"]

KV_CACHE_FORMS = ("append", "in-place")


@dataclass(frozen=True)
class LegalizeReport(Report):
    """What lowering did.

    ``details`` holds the number of rewrites of each kind, the target and the opset.
    """


def legalize(
    model: ir.Model,
    target: str,
    *,
    kv_cache: str = "append",
    opset: int | None = None,
    gate: Gate = gates.OPEN,
) -> LegalizeReport:
    """Lower ``model`` in place.

    Args:
        model: Canonical (``optimizer/DESIGN.md``).
        target: A name of ``optimizer.targets``.
        kv_cache: "append": past in, longer present out. "in-place": the present of a step is
            written into the buffer of the past (``optimizer.legalize.kv_in_place``).
        opset: Of the result; None = the canonical one where the target takes it, else the target's.
        gate: Is asked before every rewrite.

    Raises:
        OptionError: Unknown target or form of the KV cache, or an opset the target does not take.
        UnsupportedError: This model cannot be brought into the form asked for; says why.
    """
    chosen = get_target(target)
    if kv_cache not in KV_CACHE_FORMS:
        msg = f"--kv-cache: found '{kv_cache}', expected one of {', '.join(KV_CACHE_FORMS)}"
        raise OptionError(msg)
    if kv_cache not in chosen.kv_cache:
        msg = (
            f"--kv-cache {kv_cache} does not exist for target '{target}' (it has: "
            f"{', '.join(chosen.kv_cache)}); choose --target ort-cpu or --kv-cache append"
        )
        raise UnsupportedError(msg)
    wanted = _opset(model, chosen, opset)
    if not chosen.contrib_ops:
        _refuse_contrib(model, chosen)
    with gates.using(gate):
        counts, skipped = _lower(model, chosen, kv_cache, wanted)
    applied = sum(counts.values())
    return LegalizeReport(
        modified=applied > 0,
        applied=applied,
        skipped=tuple(skipped),
        details={"target": target, "opset": wanted, "rewrites": counts},
    )


def _lower(
    model: ir.Model, target: Target, kv_cache: str, opset: int
) -> tuple[dict[str, int], list[Skip]]:
    """Rewrites by kind, and sites left alone."""
    counts: dict[str, int] = {}
    skipped: list[Skip] = []
    counts["half precision"] = widening.store_for(model, target)
    fast_cpu = target.quantization is Quantization.U8S8_CONTRIB
    if fast_cpu:  # first: it asks for shapes, which the standard operators answer
        counts["row scale"] = ort_cpu.spell_row_scales(model)
    if kv_cache == "in-place":
        counts["kv cache in place"] = kv_in_place.lower(model)
    if fast_cpu:
        lowered = ort_cpu.lower(model)
        counts.update(lowered.counts)
        skipped.extend(lowered.skipped)
    if target.runtime == "onnxruntime":
        counts["zero point"] = ort_cpu.drop_zero_points(model)
    on_cuda = target.runtime == "onnxruntime" and target.device == "cuda"
    if on_cuda:
        counts["range"] = ort_cuda.shift_ranges(model)
        counts["sum of heads"] = ort_cuda.sum_heads(model)
        counts["key mask"] = key_masks.join_key_masks(model)
        counts["bfloat16"] = ort_cuda.widen_bfloat16(model)
    if target.full_attention_mask and not fast_cpu:
        counts["attention mask"] = ort_cpu.widen_masks(model)
    if not target.attention_cache and opset >= opset_rules.RULES["Attention"][0]:
        counts["attention"] = tensorrt.simplify_attention(model, target.attention_kernels)
    counts["opset"] = opset_rules.lower(model, opset)
    for function in model.functions.values():  # bodies of our operators, right for every opset
        function.opset_imports[""] = opset
    counts["stored half precision"] = widening.write_stored(model)
    if on_cuda:
        skipped.extend(ort_cuda.copies(model))
    return {kind: count for kind, count in counts.items() if count}, skipped


def _refuse_contrib(model: ir.Model, target: Target) -> None:
    """Raise where an operator of ONNX Runtime was not raised to standard ones."""
    found = next((n for n in model.graph.all_nodes() if is_runtime_operator(n)), None)
    if found is not None:
        msg = (
            f"node '{found.name}' is {found.domain or 'ONNX'}.{found.op_type}, which only ONNX "
            "Runtime has; canonicalize could not write it in standard operators, and target "
            f"'{target.name}' runs nothing else: choose --target ort-cpu or ort-cuda, or export "
            "the model again without ONNX Runtime's fusions"
        )
        raise UnsupportedError(msg)


def _opset(model: ir.Model, target: Target, opset: int | None) -> int:
    """The opset to write."""
    own = model.graph.opset_imports.get("", target.opset)
    if opset is None:
        return target.opset_for(own)
    if not target.min_opset <= opset <= target.max_opset:
        msg = (
            f"--opset: found {opset}, target '{target.name}' takes "
            f"{target.min_opset} to {target.max_opset}"
        )
        raise OptionError(msg)
    if opset > own:
        msg = f"--opset: found {opset}, but the model has opset {own} and is only ever lowered"
        raise OptionError(msg)
    return opset
