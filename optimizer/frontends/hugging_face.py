"""Hugging Face folders and hub ids to ONNX, through torch's dynamo exporter."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from optimizer.errors import ModelError, OptionError, UnsupportedError
from optimizer.frontends import hf_signature
from optimizer.frontends.onnx_export import check_opset, one_line, quiet, require, trace, write

_LOG = logging.getLogger(__name__)

Kind = Literal["decoder", "text", "vision"]

_HEADS: dict[str, tuple[str, Kind | None]] = {
    # suffix of the architecture's name: (task, kind; None = by the modality of the config)
    "ForCausalLM": ("text-generation", "decoder"),
    "LMHeadModel": ("text-generation", "decoder"),
    "ForSequenceClassification": ("text-classification", "text"),
    "ForTokenClassification": ("token-classification", "text"),
    "ForMaskedLM": ("fill-mask", "text"),
    "ForImageClassification": ("image-classification", "vision"),
}
_AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}
_TOWERS = {
    # two-tower models: task -> class that loads that tower out of the whole checkpoint
    "clip": {"text": "CLIPTextModelWithProjection", "vision": "CLIPVisionModelWithProjection"},
    "siglip": {"text": "SiglipTextModel", "vision": "SiglipVisionModel"},
}
TASKS = (*_AUTO, "text", "vision")
_FEATURES = ["last_hidden_state", "pooler_output"]
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


@dataclass(frozen=True)
class Plan:
    """How a configuration is loaded and exported.

    Attributes:
        loader: name of the transformers class with ``from_pretrained``.
        kind: which signature it gets.
        outputs: output fields to keep, those the model gives.
    """

    loader: str
    kind: Kind
    outputs: list[str]


def export_hugging_face(
    source: str,
    out_dir: Path,
    *,
    kv_cache: bool = False,
    opset: int = 23,
    task: str | None = None,
) -> Path:
    """Export a Hugging Face model to ``out_dir``.

    Weights are loaded as float32 and only from files that need no code of the model's own.

    Args:
        source: a folder with ``config.json`` and weights, or a hub id (``owner/name``).
        out_dir: folder for the ONNX file (and ``.data`` when the weights are large).
        kv_cache: give a decoder inputs for past keys and values and outputs for present ones.
        opset: ONNX opset, 18 to 24.
        task: what to export where the configuration leaves a choice; one of ``TASKS``.

    Returns:
        Path of the ONNX file, ``<name of the source>[-<task>][-kv].onnx``.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        ModelError: no such folder or id, no configuration, missing or damaged weights.
        OptionError: the task or the cache does not fit the model.
        UnsupportedError: transformers or the exporter cannot handle the architecture.
    """
    check_opset(opset)
    if task is not None and task not in TASKS:
        raise OptionError(f"unknown task '{task}': expected one of {', '.join(TASKS)}")
    require("torch")
    require("transformers")
    folder = _folder(source)
    config = _load_config(source, folder)
    plan = detect(config, task)
    model = _load_model(source, folder, plan)
    stem = re.sub(r"[^\w.-]+", "-", Path(source).resolve().name if folder else source).strip("-")
    name = "-".join([stem or "model", *([task] if task else []), *(["kv"] if kv_cache else [])])
    exported = export_loaded(model, plan, kv_cache=kv_cache, opset=opset)
    return write(exported, Path(out_dir) / f"{name}.onnx")


def export_loaded(model: Any, plan: Plan, *, kv_cache: bool = False, opset: int = 23) -> ir.Model:
    """Export a transformers model that is already in memory.

    The model's own attention implementation is tried first, the decomposed ("eager") one when
    torch cannot translate that.

    Raises:
        OptionError, UnsupportedError: as :func:`export_hugging_face`.
    """
    model.eval()
    if hasattr(model, "set_experts_implementation") and _is_mixture(model.config):
        # The default dispatch of tokens to experts depends on data; this form is plain algebra.
        with contextlib.suppress(Exception), quiet():
            model.set_experts_implementation("batched_mm")
    wrapper, signature = hf_signature.build(model, plan.kind, plan.outputs, kv_cache=kv_cache)
    try:
        return trace(wrapper, signature, opset)
    except UnsupportedError:
        if getattr(model.config, "_attn_implementation", "eager") == "eager":
            raise
    _LOG.debug("retrying with eager attention")
    # Built anew: some classes choose their attention layers once, when they are made.
    with quiet():
        eager = type(model)._from_config(  # noqa: SLF001  # from_config of this very class
            copy.deepcopy(model.config), attn_implementation="eager", dtype=model.dtype
        )
        eager.load_state_dict(model.state_dict(), assign=True)
    wrapper, signature = hf_signature.build(
        eager.eval(), plan.kind, plan.outputs, kv_cache=kv_cache
    )
    return trace(wrapper, signature, opset)


def detect(config: Any, task: str | None = None) -> Plan:
    """Choose loader, inputs and outputs for a configuration.

    Args:
        config: a ``transformers.PretrainedConfig``.
        task: the user's choice, already known to be in ``TASKS``.

    Raises:
        OptionError: a choice is needed, or the given one does not fit.
        UnsupportedError: encoder-decoder models and other shapes without an exporter here.
    """
    kind_name = config.model_type
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if kind_name in _TOWERS:
        choices = _TOWERS[kind_name]
        if task not in choices:
            raise OptionError(
                f"{architecture or kind_name} has two towers that are exported one at a time, "
                f"task is {task!r}: choose --task text or --task vision"
            )
        return Plan(choices[task], "text" if task == "text" else "vision", _tower_outputs(task))
    if task in ("text", "vision"):
        raise OptionError(
            f"task '{task}' chooses a tower of a two-tower model, and {architecture or kind_name} "
            "is not one: leave the task out"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{architecture or kind_name} is an encoder-decoder model; supported are causal "
            "decoders, encoders and vision towers"
        )
    modality: Kind = "vision" if hasattr(config, "image_size") else "text"
    if kind_name.endswith(("_text_model", "_vision_model")) and kind_name.split("_")[0] in _TOWERS:
        tower = "vision" if modality == "vision" else "text"
        loader = architecture or _TOWERS[kind_name.split("_")[0]][tower]
        return Plan(loader, modality, _tower_outputs(tower))
    if task is None:
        task = _default_task(config, architecture)
    heads = dict(_HEADS.values())
    kind = heads.get(task) or modality
    return Plan(_AUTO[task], kind, list(_FEATURES) if task == "feature-extraction" else ["logits"])


def _tower_outputs(tower: str) -> list[str]:
    return [f"{'text' if tower == 'text' else 'image'}_embeds", *_FEATURES]


def _default_task(config: Any, architecture: str) -> str:
    """The task an architecture's name states; masked language models give features."""
    for suffix, (task, _) in _HEADS.items():
        if architecture.endswith(suffix):
            return "feature-extraction" if task == "fill-mask" else task
    if architecture:
        return "feature-extraction"
    from transformers.models.auto import modeling_auto

    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "text-generation" if causal and not masked else "feature-extraction"


def _is_mixture(config: Any) -> bool:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def _folder(source: str) -> Path | None:
    """The local folder meant by ``source``, or None where it is spelled like a hub id.

    Raises:
        ModelError: it is spelled like a path and nothing usable is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"hf:{source}: the folder has no config.json; expected a folder written by "
                "save_pretrained() or a clone of a hub repository"
            )
        return path
    if path.exists():
        raise ModelError(
            f"hf:{source}: is a file, expected a folder with config.json and weights; "
            "name an ONNX file without hf:"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith((".", "/")):
        raise ModelError(
            f"hf:{source}: no such folder; expected a folder with config.json and weights, "
            "or a hub id such as owner/name"
        )
    return None


@functools.cache
def _offline() -> str:
    """Why the hub cannot be asked, or an empty text where it can.

    One short attempt: without it every file asked for is retried for half a minute.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    address = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies().get(address.scheme) or not address.hostname:
        return ""  # the proxy resolves names, or the endpoint is for the hub's client to judge
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error})"
    return ""


def _not_on_hub(source: str, error: BaseException) -> ModelError:
    offline = _offline()
    found = (
        f"it is not in the local cache, and {offline}"
        if offline
        else f"the Hugging Face hub gave no such model ({one_line(error)})"
    )
    return ModelError(
        f"hf:{source}: no folder of that name, and {found}; check the id, the network and "
        "HF_TOKEN, or pass a folder that holds the model"
    )


def _load_config(source: str, folder: Path | None) -> Any:
    from transformers import AutoConfig

    if folder is not None:
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"hf:{source}: config.json cannot be read ({one_line(error)}); expected JSON"
            ) from error
        if not isinstance(raw, dict) or not (raw.get("model_type") or raw.get("architectures")):
            raise ModelError(
                f"hf:{source}: config.json names no model_type; expected a transformers "
                "configuration"
            )
        if "auto_map" in raw:
            _LOG.debug("the model brings code of its own, which is not run")
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(folder or source), local_files_only=folder is not None or bool(_offline())
            )
    except Exception as error:
        if folder is None and isinstance(error, OSError):
            raise _not_on_hub(source, error) from error
        name = raw.get("model_type", "?") if folder is not None else "?"
        raise ModelError(
            f"hf:{source}: transformers knows no model type '{name}' or cannot read its "
            f"configuration ({one_line(error)}); models that need code of their own are not run"
        ) from error


def _load_model(source: str, folder: Path | None, plan: Plan) -> Any:
    import torch
    import transformers

    if folder is not None and not any(
        found for pattern in _WEIGHT_FILES for found in folder.glob(pattern)
    ):
        raise ModelError(
            f"hf:{source}: the folder has no weights; expected model.safetensors "
            "(or its shards and index) beside config.json"
        )
    loader = getattr(transformers, plan.loader, None)
    if loader is None:
        raise UnsupportedError(
            f"hf:{source}: transformers {transformers.__version__} has no class {plan.loader}; "
            "install the version that the model was saved with"
        )
    try:
        with quiet():
            model, info = loader.from_pretrained(
                str(folder or source),
                dtype=torch.float32,
                local_files_only=folder is not None or bool(_offline()),
                output_loading_info=True,
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise _bad_weights(source, error) from error
        raise UnsupportedError(
            f"hf:{source}: its configuration has no model class for this task ({plan.loader}); "
            f"choose another --task of {', '.join(_AUTO)}"
        ) from error
    except Exception as error:
        raise _bad_weights(source, error) from error
    _check_loaded(source, plan, info)
    return model


def _bad_weights(source: str, error: BaseException) -> ModelError:
    return ModelError(
        f"hf:{source}: the weights cannot be loaded ({one_line(error)}); "
        "they may be incomplete, git-lfs pointers, or of another architecture"
    )


def _check_loaded(source: str, plan: Plan, info: dict[str, Any]) -> None:
    """Refuse a model that transformers completed with random numbers for missing weights."""
    mismatched = sorted(str(entry[0]) for entry in info.get("mismatched_keys") or [])
    missing = sorted(info.get("missing_keys") or [])
    pooler = [key for key in missing if "pooler." in key]
    if "pooler_output" in plan.outputs and pooler and len(pooler) == len(missing):
        plan.outputs[:] = [name for name in plan.outputs if name != "pooler_output"]
        missing = []
    for what, keys in (("misses", missing), ("has another shape for", mismatched)):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ModelError(
                f"hf:{source}: the weight file {what} {shown}; "
                "expected every weight that the configuration names"
            )
