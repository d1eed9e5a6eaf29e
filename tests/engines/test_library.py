"""Plugin libraries: the right version, loaded once, and what is registered."""

from __future__ import annotations

import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
from fake_machine import elf

from optimizer.custom_ops import library as custom_library
from optimizer.custom_ops.declaration import DOMAIN
from optimizer.engines import library
from optimizer.engines.library_path import VARIABLE, find_plugins
from optimizer.errors import EngineError, OptionError


class Registry:
    """Loads whatever it is given; each file brings one creator."""

    def __init__(self, *, loads: bool = True) -> None:
        self.loads, self.paths = loads, list[str]()

    @property
    def all_creators(self) -> list[Any]:
        names = ["Resize", *(Path(path).stem for path in self.paths)]
        return [
            types.SimpleNamespace(plugin_namespace="acme", name=name, plugin_version="1")
            for name in names
        ]

    def load_library(self, path: str) -> object | None:
        self.paths.append(path)
        return object() if self.loads else None


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", {})


def module(registry: Registry, name: str = "tensorrt", version: str = "11.1.0.2") -> Any:
    return types.SimpleNamespace(
        __name__=name, __version__=version, get_plugin_registry=lambda: registry
    )


@pytest.mark.parametrize(
    ("needs", "name", "version", "says"),
    [
        ("libnvinfer.so.10", "tensorrt", "11.1.0.2", "is built for TensorRT 10 (libnvinfer.so.10)"),
        (
            "libnvinfer.so.11",
            "tensorrt",
            "10.3.0.30",
            "TensorRT 11 (libnvinfer.so.11), this is Ten",
        ),
        (
            "libnvinfer_plugin.so.10",
            "tensorrt",
            "11.1.0.2",
            "TensorRT 10 (libnvinfer_plugin.so.10)",
        ),
        (
            "libnvinfer.so.10",
            "tensorrt_rtx",
            "1.7.1.116",
            "this is TensorRT for RTX; build it again",
        ),
        ("libtensorrt_rtx.so.1", "tensorrt", "10.3.0.30", "is built for TensorRT for RTX (libtens"),
        ("libnvinfer.so.11", "tensorrt", "11.1.0.2", None),
        ("libtensorrt_rtx.so.1", "tensorrt_rtx", "1.7.1.116", None),
        ("libc.so.6", "tensorrt_rtx", "1.7.1.116", None),
    ],
)
def test_the_version_that_a_library_links(tmp_path, needs, name, version, says):
    path = tmp_path / "turn.so"
    path.write_bytes(elf(["libstdc++.so.6", needs]))
    registry = Registry()
    if says is None:
        library.load_plugins(module(registry, name, version), [path])
        assert registry.paths == [str(path)]
        return
    with pytest.raises(EngineError) as error:
        library.load_plugins(module(registry, name, version), [path])
    assert says in str(error.value)
    assert registry.paths == [], "it was not even opened"


@pytest.mark.native
def test_a_library_that_a_linker_made(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler on the PATH")
    (tmp_path / "core.c").write_text("int core(void) { return 1; }\n")
    (tmp_path / "plugin.c").write_text("int core(void);\nint use(void) { return core(); }\n")
    shared = [compiler, "-shared", "-fPIC", "-o"]
    core = tmp_path / "libnvinfer.so.10"
    subprocess.run([*shared, core, "-Wl,-soname,libnvinfer.so.10", tmp_path / "core.c"], check=True)
    subprocess.run([*shared, tmp_path / "turn.so", tmp_path / "plugin.c", core], check=True)
    with pytest.raises(EngineError, match=r"is built for TensorRT 10 \(libnvinfer\.so\.10\)"):
        library.load_plugins(module(Registry()), [tmp_path / "turn.so"])


def test_each_is_loaded_once_in_a_process(tmp_path):
    paths = [tmp_path / name for name in ("one.so", "two.so")]
    for path in paths:
        path.write_bytes(elf())
    (tmp_path / "link.so").symlink_to(paths[0])
    registry = Registry()
    first = library.load_plugins(module(registry), [paths[0], paths[0], tmp_path / "link.so"])
    second = library.load_plugins(module(registry), paths)
    assert registry.paths == [str(path) for path in paths]
    assert first == [{"file": str(paths[0]), "creators": ["acme::one, 1"]}]
    assert [item["creators"] for item in second] == [["acme::one, 1"], ["acme::two, 1"]]
    other = Registry()  # of the other flavour
    library.load_plugins(module(other, "tensorrt_rtx", "1.7.1.1"), paths[:1])
    assert other.paths == [str(paths[0])]


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "one.so").write_bytes(elf())
    for _ in range(2):  # it is tried again: only success is remembered
        with pytest.raises(EngineError, match="could not load it: undefined symbol: core;"):
            library.load_plugins(
                module(Registry(loads=False)), [tmp_path / "one.so"], ["undefined symbol: core"]
            )


def test_a_creator_that_is_missing_and_those_that_are_there():
    with pytest.raises(EngineError) as error:
        library.check_creators(Registry(), [("n1", "acme", "Resize"), ("n2", "acme", "Resise")])
    text = str(error.value)
    assert "node 'n2': no plugin creates acme::Resise" in text
    assert "the nearest: acme::Resize" in text
    assert "Registered" in text
    assert "acme::Resize, 1" in text


class TestOurLibrary:
    @pytest.fixture
    def installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """As a wheel made with OPTIMIZE_CUDA=1 has it."""
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(custom_library, "_FOLDER", tmp_path)
        path = tmp_path / "liboptimize_tensorrt.so"
        path.write_bytes(elf())
        return path

    def test_it_is_found_where_it_is_needed(self, installed):
        assert find_plugins((), {"", DOMAIN}) == (installed,)
        assert find_plugins((), {"", "acme"}) == ()

    def test_a_named_one_comes_instead(self, installed, tmp_path, monkeypatch):
        other = tmp_path / "other" / installed.name
        other.parent.mkdir()
        other.write_bytes(elf())
        assert find_plugins((other,), {DOMAIN}) == (other,)
        monkeypatch.setenv(VARIABLE, str(other))
        assert find_plugins((), {DOMAIN}) == (other,)
        monkeypatch.setenv(VARIABLE, str(tmp_path / "none.so"))
        with pytest.raises(OptionError, match=VARIABLE):
            find_plugins((), {DOMAIN})
