"""Hugging Face folders become ONNX files with the promised names, or one clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import families
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers

from optimizer.errors import MissingDependencyError, ModelError, OptionError, UnsupportedError
from optimizer.frontends import export_hugging_face, hugging_face, is_model_spec

TOLERANCE = 1e-5  # float32 reassociation in two layers, see test_zoo_exports


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as ``save_pretrained`` writes them, one per zoo entry used here."""
    root = tmp_path_factory.mktemp("hf")
    for name in ("llama", "roberta", "vit"):
        families.make_model(families.FAMILIES[name]).save_pretrained(root / name)
    options = dict(families.FAMILIES["bert"].options)
    transformers.BertForMaskedLM(transformers.BertConfig(**options)).save_pretrained(root / "mlm")
    text, vision = families.FAMILIES["clip-text"].options, families.FAMILIES["clip-vision"].options
    both = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(both).eval().save_pretrained(root / "clip")
    return root


@pytest.fixture(scope="module")
def llama(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the decoder folder, without cache."""
    return export_hugging_face(str(folders / "llama"), tmp_path_factory.mktemp("llama"))


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        atol = TOLERANCE * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol)


def shapes(values: list[ir.Value]) -> dict[str, str]:
    return {str(value.name): str(value.shape) for value in values}


def damaged(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_decoder_folder_gives_logits_and_named_dimensions(llama: Path) -> None:
    assert [path.name for path in llama.parent.iterdir()] == ["llama.onnx"]
    model = ir.load(llama)
    plane = "[batch,sequence]"
    assert shapes(model.graph.inputs) == {
        "input_ids": plane,
        "attention_mask": plane,
        "position_ids": plane,
    }
    assert shapes(model.graph.outputs) == {"logits": "[batch,sequence,99]"}
    feeds = families.make_feeds(families.FAMILIES["llama"])
    assert_close(
        run(llama, feeds), families.torch_outputs(families.FAMILIES["llama"], False, feeds)
    )


def test_decoder_with_cache_prefills_and_decodes_like_one_full_run(
    folders: Path, tmp_path: Path
) -> None:
    path = export_hugging_face(str(folders / "llama"), tmp_path, kv_cache=True)
    assert path.name == "llama-kv.onnx"
    model = ir.load(path)
    dims = shapes([*model.graph.inputs, *model.graph.outputs])
    assert dims["attention_mask"] == "[batch,total_sequence]"
    assert dims["past_key_values.1.value"] == "[batch,2,past_sequence,16]"
    assert dims["present.1.value"] == "[batch,2,total_sequence,16]"
    feeds = families.make_feeds(families.FAMILIES["llama"], batch=2, sequence=7)
    feeds["attention_mask"][:] = 1
    whole = families.torch_outputs(families.FAMILIES["llama"], False, feeds)["logits"]
    past = {
        name: np.zeros((2, 2, 0, 16), np.float32)
        for name in (f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value"))
    }
    pieces, done = [], 0
    for length in (4, 1, 1, 1):
        piece = {k: v[:, done : done + length] for k, v in feeds.items() if k != "attention_mask"}
        piece["attention_mask"] = feeds["attention_mask"][:, : done + length]
        found = run(path, piece | past)
        pieces.append(found.pop("logits"))
        past = {name.replace("present", "past_key_values"): v for name, v in found.items()}
        done += length
    assert_close({"logits": np.concatenate(pieces, axis=1)}, {"logits": whole})


def test_weights_are_called_as_in_the_checkpoint_and_nothing_else_is_told(
    llama: Path, folders: Path
) -> None:
    model = ir.load(llama)
    state = families.make_model(families.FAMILIES["llama"]).state_dict()
    large = {k for k, v in model.graph.initializers.items() if v.const_value.nbytes > 100}
    assert large == set(state)
    for name, weight in state.items():
        array = model.graph.initializers[name].const_value.numpy()
        linear = weight.ndim == 2 and "embed" not in name
        np.testing.assert_array_equal(array, weight.numpy().T if linear else weight.numpy())
    assert not any(node.metadata_props for node in model.graph)
    content = llama.read_bytes()
    assert b".py" not in content
    assert str(folders).encode() not in content


def test_two_exports_are_byte_identical(folders: Path, tmp_path: Path) -> None:
    one = export_hugging_face(str(folders / "vit"), tmp_path / "one")
    two = export_hugging_face(str(folders / "vit"), tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", ["roberta", "vit"])
def test_classification_head_named_by_the_config_gives_logits(
    name: str, folders: Path, tmp_path: Path
) -> None:
    path = export_hugging_face(str(folders / name), tmp_path)
    feeds = families.make_feeds(families.FAMILIES[name], batch=5)
    found = run(path, feeds)
    assert list(found) == ["logits"]
    assert_close(found, families.torch_outputs(families.FAMILIES[name], False, feeds))


def test_masked_language_model_gives_features_without_an_invented_pooler(
    folders: Path, tmp_path: Path
) -> None:
    path = export_hugging_face(str(folders / "mlm"), tmp_path, opset=18)
    feeds = families.make_feeds(families.FAMILIES["bert"])
    model = transformers.BertForMaskedLM.from_pretrained(folders / "mlm").eval()
    with torch.no_grad():
        expected = model.bert(**{k: torch.from_numpy(v) for k, v in feeds.items()})
    assert_close(run(path, feeds), {"last_hidden_state": expected.last_hidden_state.numpy()})


@pytest.mark.parametrize("task", ["text", "vision"])
def test_clip_towers_are_exported_one_at_a_time(task: str, folders: Path, tmp_path: Path) -> None:
    path = export_hugging_face(str(folders / "clip"), tmp_path, task=task)
    assert path.name == f"clip-{task}.onnx"
    feeds = families.make_feeds(families.FAMILIES[f"clip-{task}"])
    model = transformers.CLIPModel.from_pretrained(folders / "clip").eval()
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    tower, projection = (
        (model.text_model, model.text_projection)
        if task == "text"
        else (model.vision_model, model.visual_projection)
    )
    with torch.no_grad():
        inside = tower(**tensors)
        projected = projection(inside.pooler_output)
    embeds = f"{'text' if task == 'text' else 'image'}_embeds"
    states = inside.last_hidden_state.numpy()
    assert_close(run(path, feeds), {embeds: projected.numpy(), "last_hidden_state": states})


def test_rotary_encoder_takes_any_batch(tmp_path: Path) -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 99, "pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    config = transformers.ModernBertConfig(
        **options, **tokens, intermediate_size=40, bos_token_id=0, eos_token_id=98
    )
    model = transformers.ModernBertModel(config).eval()
    model.save_pretrained(tmp_path / "m")
    path = export_hugging_face(str(tmp_path / "m"), tmp_path)
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(3, 98, (4, 5)), "attention_mask": np.ones((4, 5), np.int64)}
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in feeds.items()})
    assert_close(run(path, feeds), {"last_hidden_state": expected.last_hidden_state.numpy()})


def test_attention_that_torch_cannot_translate_is_decomposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = families.make_model(families.FAMILIES["llama"])
    model.config.architectures = ["LlamaForCausalLM"]
    tried = []

    def trace(module: torch.nn.Module, *_: object) -> ir.Model:
        tried.append(module.model)
        if module.model.config._attn_implementation == "sdpa":
            raise UnsupportedError("no translation")
        return ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)

    monkeypatch.setattr(hugging_face, "trace", trace)
    hugging_face.export_loaded(model, hugging_face.detect(model.config))
    first, second = (tried[i].state_dict() for i in (0, 1))
    assert tried[1].config._attn_implementation == "eager"
    assert not tried[1].training
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_clip_without_a_task_names_the_choices(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--task text or --task vision"):
        export_hugging_face(str(folders / "clip"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("roberta", {"kv_cache": True}, "is not a causal language model"),
        ("llama", {"task": "vision"}, "leave the task out"),
        ("llama", {"task": "dancing"}, "unknown task 'dancing': expected one of text-generation"),
        ("llama", {"opset": 12}, "opset 12 cannot be exported: expected 18 to 24"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    name: str, options: dict[str, object], message: str, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        export_hugging_face(str(folders / name), tmp_path, **options)


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=20)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedError, match="is an encoder-decoder model"):
        export_hugging_face(str(tmp_path / "t5"), tmp_path)


def test_folder_without_weights_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = damaged(folders / "llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the folder has no weights"):
        export_hugging_face(str(folder), tmp_path / "out")


@pytest.mark.parametrize("content", ["half", "lfs"])
def test_damaged_weights_are_refused(content: str, folders: Path, tmp_path: Path) -> None:
    folder = damaged(folders / "llama", tmp_path / "m")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    weights.write_bytes(data[: len(data) // 2] if content == "half" else pointer)
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        export_hugging_face(str(folder), tmp_path / "out")


def test_missing_weights_are_not_replaced_by_random_numbers(folders: Path, tmp_path: Path) -> None:
    folder = damaged(folders / "llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"misses model\.layers\.2\..* and 6 more"):
        export_hugging_face(str(folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json cannot be read"),
        ("{}", "names no model_type"),
        ('{"model_type": "warpdrive"}', "knows no model type 'warpdrive'"),
    ],
)
def test_unusable_configurations_are_refused(
    text: str, message: str, folders: Path, tmp_path: Path
) -> None:
    folder = damaged(folders / "llama", tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        export_hugging_face(str(folder), tmp_path / "out")


def test_places_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("file", "expected a folder"),
        ("empty", "has no config.json"),
        ("gone", "no such folder"),
    ):
        with pytest.raises(ModelError, match=message):
            export_hugging_face(str(tmp_path / name), tmp_path / "out")


def test_unknown_id_without_network_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugging_face, "_offline", lambda: "hub.invalid cannot be reached")
    with pytest.raises(ModelError, match=r"no folder of that name.*hub\.invalid") as caught:
        export_hugging_face("nobody-here/no-such-model", tmp_path)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1 cannot be reached" in hugging_face._offline.__wrapped__()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hugging_face._offline.__wrapped__() == "HF_HUB_OFFLINE is set"


def test_missing_torch_names_the_extra(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'optimize-onnx\[torch\]'"):
        export_hugging_face(str(folders / "llama"), tmp_path)


def test_importing_the_frontends_loads_no_torch() -> None:
    code = (
        "import sys, optimizer.frontends as f;"
        "import optimizer.frontends.hugging_face, optimizer.frontends.torch_module;"
        "assert f.is_model_spec('hf:x') == 'hf';"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf:gpt2", "hf"),
        ("hf:./folder", "hf"),
        ("my.models:make", "torch"),
        ("models:Zoo.make", "torch"),
        ("model.onnx", "onnx"),
        ("folder/model.onnx", "onnx"),
        (r"C:\models\a.onnx", "onnx"),
        ("./models:make", "onnx"),
        ("model", "onnx"),
    ],
)
def test_spelling_decides_the_frontend(text: str, kind: str) -> None:
    assert is_model_spec(text) == kind


def test_existing_file_wins_over_the_factory_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").write_text("x")
    assert is_model_spec("a:b") == "onnx"
