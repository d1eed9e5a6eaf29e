"""Engines on a played GPU: profiles, shapes, types, memory, and every way that it can fail.

``fake/tensorrt`` stands in for the library, ``played_cuda`` for the driver.
"""

from __future__ import annotations

import gc
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import played_cuda
import pytest
from played_cuda import FAKE, stage

from optimizer.errors import CalibrationError, EngineError, MissingDependencyError
from optimizer.hashing import hash_file
from optimizer.runners.tensorrt import TensorRTRunner

VERSIONS = json.loads((FAKE.parent / "api_surface.json").read_text())
FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> played_cuda.PlayedDriver:
    """A GPU of compute capability 8.9, and TensorRT 10.3."""
    return stage(monkeypatch)


def engine(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[Any],
    outputs: list[Any],
    *,
    profiles: list[dict[str, Range]] = [],  # noqa: B006 - never changed
    weights: dict[str, np.ndarray] | None = None,
    sets: tuple[str, ...] = (),
    version: str = "10.3.0.30",
) -> Path:
    """A file that the module that stands in loads; values are (name, type, shape)."""
    from tensorrt._runtime import pack

    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(*item) for item in inputs],
        [oh.make_tensor_value_info(*item) for item in outputs],
        [onh.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)])
    path.write_bytes(pack(version, profiles, sets, model))
    return path


def linear(folder: Path, profiles: list[dict[str, Range]], **given: Any) -> Path:
    """y = 2 x, x [batch, 4]."""
    return engine(
        folder / "x.engine",
        [oh.make_node("Add", ["x", "x"], ["y"])],
        [("x", FLOAT, ["batch", 4])],
        [("y", FLOAT, ["batch", 4])],
        profiles=profiles,
        **given,
    )


SMALL: dict[str, Range] = {"x": ((1, 4), (2, 4), (3, 4))}
LARGE: dict[str, Range] = {"x": ((8, 4), (8, 4), (16, 4))}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_recorded_version_has_the_names_that_a_run_uses(monkeypatch, tmp_path, version):
    stage(monkeypatch, version=version)
    assert {"reallocate_output_async", "notify_shape"} <= set(VERSIONS[version]["IOutputAllocator"])
    path = linear(tmp_path, [SMALL], version=version)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(TensorRTRunner(path).run({"x": x})["y"], 2 * x)


class TestShapes:
    def test_the_profile_that_fits_is_taken_and_buffers_are_used_again(self, driver, tmp_path):
        runner = TensorRTRunner(linear(tmp_path, [SMALL, LARGE]))
        rng = np.random.default_rng(0)
        for rows in (1, 16, 3, 8, 2):
            x = rng.standard_normal((rows, 4)).astype(np.float32)
            found = runner.run({"x": x})["y"]
            assert np.array_equal(found, 2 * x)
            kept, found[:] = found.copy(), 0  # the caller's own: nothing reads it again
            assert np.array_equal(runner.outputs()["y"], kept)
        assert driver.calls.count("cuMemAlloc_v2") == 4, "input and output, twice as they grew"
        assert runner.largest_batch() == 16

    def test_a_profile_stays_while_it_fits(self, driver, tmp_path, monkeypatch):
        both: dict[str, Range] = {"x": ((1, 4), (4, 4), (9, 4))}
        runner = TensorRTRunner(linear(tmp_path, [SMALL, both]))
        chosen = []
        context = runner._context
        real = context.set_optimization_profile_async
        monkeypatch.setattr(
            context,
            "set_optimization_profile_async",
            lambda index, stream: chosen.append(index) or real(index, stream),
        )
        for rows in (2, 9, 2, 3, 1):
            runner.run({"x": np.zeros((rows, 4), np.float32)})
        assert chosen == [0, 1], "profile 1 takes them all"

    def test_no_profile_fits(self, driver, tmp_path):
        runner = TensorRTRunner(linear(tmp_path, [SMALL, LARGE]))
        with pytest.raises(CalibrationError) as error:
            runner.run({"x": np.zeros((5, 4), np.float32)})
        text = str(error.value)
        assert "'x' [5, 4], profile 0 takes [1, 4] to [3, 4]" in text
        assert "profile 1 takes [8, 4] to [16, 4]" in text
        assert "--shapes" in text
        assert not runner.takes({"x": np.zeros((5, 4), np.float32)})

    @pytest.mark.parametrize(
        ("feed", "says"),
        [
            ({"x": np.zeros((2, 3), np.float32)}, "axis 1 must be 4"),
            ({"x": np.zeros((2, 4), np.float64)}, "'x' is float64"),
            ({"z": np.zeros((2, 4), np.float32)}, "'z' is not an input"),
            ({}, "input 'x' is missing"),
        ],
    )
    def test_a_feed_that_is_wrong(self, driver, tmp_path, feed, says):
        with pytest.raises(CalibrationError, match=says):
            TensorRTRunner(linear(tmp_path, [SMALL])).run(feed)

    def test_empty_tensors_have_an_address(self, driver, tmp_path):
        """A KV cache without past: nothing goes in, what comes out is as long as what is new."""
        path = engine(
            tmp_path / "x.engine",
            [oh.make_node("Concat", ["past", "x"], ["present"], axis=1)],
            [("past", FLOAT, [1, "p", 2]), ("x", FLOAT, [1, "s", 2])],
            [("present", FLOAT, [1, "t", 2])],
            profiles=[
                {"past": ((1, 0, 2), (1, 4, 2), (1, 8, 2)), "x": ((1, 0, 2), (1, 1, 2), (1, 4, 2))}
            ],
        )
        runner = TensorRTRunner(path)
        past, x = np.zeros((1, 0, 2), np.float32), np.ones((1, 3, 2), np.float32)
        assert np.array_equal(runner.run({"past": past, "x": x})["present"], x)
        assert runner.run({"past": past, "x": x[:, :0]})["present"].shape == (1, 0, 2)
        full = np.full((1, 8, 2), 5, np.float32)
        both = runner.run({"past": full, "x": x})["present"]
        assert np.array_equal(both, np.concatenate([full, x], 1))

    def test_an_output_whose_size_depends_on_data(self, driver, tmp_path):
        path = engine(
            tmp_path / "x.engine",
            [oh.make_node("NonZero", ["x"], ["places"])],
            [("x", FLOAT, [1, "n"])],
            [("places", INT64, [2, "found"])],
            profiles=[{"x": ((1, 1), (1, 4), (1, 600))}],
        )
        runner = TensorRTRunner(path)
        for x in ([[0, 3, 0, 1]], [[0, 0]], [[1] * 600], [[7]]):
            array = np.asarray(x, np.float32)
            assert np.array_equal(
                runner.run({"x": array})["places"], np.stack(np.nonzero(array)).astype(np.int64)
            )

    def test_scalars_and_inputs_that_are_read_on_the_host(self, driver, tmp_path):
        path = engine(
            tmp_path / "x.engine",
            [
                oh.make_node("Reshape", ["x", "host_shape"], ["y"]),
                oh.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            ],
            [("x", FLOAT, [6]), ("host_shape", INT64, [2])],
            [("y", FLOAT, [2, 3]), ("s", FLOAT, [])],
        )
        found = TensorRTRunner(path).run(
            {"x": np.arange(6, dtype=np.float32), "host_shape": np.array([2, 3])}
        )
        assert found["y"].shape == (2, 3)
        assert found["s"] == 15
        assert found["s"].shape == ()


@pytest.mark.parametrize(
    "kind", ["FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL"]
)
def test_types(driver, tmp_path, kind):
    number = onnx.TensorProto.DataType.Value(kind)
    path = engine(
        tmp_path / "x.engine",
        [oh.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        [("x", number, [3])],
        [("y", number, [6])],
    )
    runner = TensorRTRunner(path)
    dtype = oh.tensor_dtype_to_np_dtype(number)
    dtype = np.dtype(ml_dtypes.bfloat16) if kind == "BFLOAT16" else dtype
    assert runner.inputs[0].dtype == dtype
    x = np.array([0, 1, 3]).astype(dtype)
    found = runner.run({"x": x})["y"]
    assert found.dtype == dtype
    assert np.array_equal(found, np.concatenate([x, x]))


def test_a_type_that_no_feed_holds(driver, tmp_path):
    path = engine(
        tmp_path / "x.engine",
        [oh.make_node("Identity", ["x"], ["y"])],
        [("x", onnx.TensorProto.INT4, [2])],
        [("y", onnx.TensorProto.INT4, [2])],
    )
    with pytest.raises(EngineError, match="'x' has the type INT4"):
        TensorRTRunner(path)


def test_inputs_that_are_not_contiguous(driver, tmp_path):
    x = np.arange(8, dtype=np.float32).reshape(4, 2).T
    found = TensorRTRunner(linear(tmp_path, [SMALL])).run({"x": x})["y"]
    assert np.array_equal(found, 2 * x)


def test_kernels_for_the_shapes_are_waited_for(driver, tmp_path, monkeypatch):
    """TensorRT for RTX would run others first, and these when they are compiled."""
    import tensorrt

    seen = []
    kinds = types.SimpleNamespace(EAGER="eager", LAZY="lazy")
    monkeypatch.setattr(tensorrt, "DynamicShapesKernelSpecializationStrategy", kinds, raising=False)
    monkeypatch.setattr(
        tensorrt.ICudaEngine,
        "create_runtime_config",
        lambda _: types.SimpleNamespace(),
        raising=False,
    )
    real = tensorrt.ICudaEngine.create_execution_context
    monkeypatch.setattr(
        tensorrt.ICudaEngine,
        "create_execution_context",
        lambda self, config: seen.append(config) or real(self),
    )
    TensorRTRunner(linear(tmp_path, [SMALL]))
    (config,) = seen
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_shapes_that_cannot_be_inferred(driver, tmp_path, monkeypatch):
    runner = TensorRTRunner(linear(tmp_path, [SMALL]))

    def fail() -> None:
        raise RuntimeError("infer_shapes error code: -1")

    monkeypatch.setattr(runner._context, "infer_shapes", fail)
    with pytest.raises(EngineError, match=r"it refuses these shapes \(infer_shapes error"):
        runner.run({"x": np.zeros((2, 4), np.float32)})
    monkeypatch.setattr(runner._context, "infer_shapes", lambda: ["z"])
    with pytest.raises(EngineError, match="nothing says what the shape or value of z is"):
        runner.run({"x": np.zeros((2, 4), np.float32)})


def test_several_engines_side_by_side_and_nothing_left_behind(driver, tmp_path):
    path = linear(tmp_path, [SMALL])
    runners = [TensorRTRunner(path) for _ in range(3)]
    feeds = [{"x": np.full((2, 4), n, np.float32)} for n in range(3)]
    for runner, feed in zip(runners, feeds, strict=True):
        runner.bind(feed)
    for runner in runners:
        runner.execute()
    assert [int(runner.outputs()["y"][0, 0]) for runner in runners] == [0, 2, 4]
    assert len(driver.streams) == 3
    del runner, runners
    gc.collect()
    assert not driver.memory
    assert not driver.streams


class TestNotHere:
    def test_no_driver(self, driver, tmp_path, monkeypatch):
        def missing() -> None:
            raise OSError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr("optimizer.engines.cuda.load_library", missing)
        self.refused(tmp_path, MissingDependencyError, "there is no NVIDIA driver here", "doctor")

    def test_no_gpu(self, driver, tmp_path):
        driver.gpus.clear()
        self.refused(tmp_path, MissingDependencyError, "driver shows no GPU", "VISIBLE_DEVICES")

    def test_a_driver_that_does_not_start(self, driver, tmp_path):
        driver.fails["cuInit"] = 803
        self.refused(tmp_path, MissingDependencyError, "does not start (CUDA error 803")

    def test_no_tensorrt(self, driver, tmp_path, monkeypatch):
        path = linear(tmp_path, [SMALL])
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingDependencyError, match=r"cannot be run here: .*tensorrt"):
            TensorRTRunner(path)

    def test_another_version(self, driver, tmp_path):
        path = linear(tmp_path, [SMALL], version="10.7.0.23")
        with pytest.raises(
            EngineError, match=r"TensorRT 10\.7\.0\.23 built .* 10\.3\.0\.30 is ins"
        ):
            TensorRTRunner(path)

    @pytest.mark.parametrize("built", ["10.3.0.26", "10.0.1.6"])
    def test_another_version_that_is_fine(self, driver, tmp_path, built):
        """The build number may differ; what is version compatible also runs on later versions."""
        path = linear(tmp_path, [SMALL], version=built, sets=("VERSION_COMPATIBLE",))
        manifest(path, version_compatible=True)
        assert TensorRTRunner(path).output_names == ("y",)

    def test_the_gpu_that_fits_is_taken(self, monkeypatch, tmp_path):
        stage(monkeypatch, "7.5", "8.9", "12.0")
        path = linear(tmp_path, [SMALL])
        manifest(path, gpu={"name": "L4", "capability": "8.9"})
        assert TensorRTRunner(path).gpu.index == 1

    @pytest.mark.parametrize(
        ("facts", "here", "fits"),
        [
            ({"gpu": {"name": "L4", "capability": "8.9"}}, "8.6", False),
            ({"gpu": {"name": "L4", "capability": "8.9"}}, "8.9", True),
            (
                {"gpu": {"name": "L4", "capability": "8.9"}, "hardware_compatible": True},
                "12.0",
                True,
            ),
            (
                {"gpu": {"name": "L4", "capability": "8.9"}, "hardware_compatible": True},
                "7.5",
                False,
            ),
            ({"compute_capabilities": [80, 86]}, "8.9", False),
            ({"compute_capabilities": [80, 86]}, "8.6", True),
            ({}, "8.6", True),
        ],
    )
    def test_engines_for_another_gpu(self, monkeypatch, tmp_path, facts, here, fits):
        stage(monkeypatch, here)
        path = linear(tmp_path, [SMALL])
        manifest(path, **facts)
        if fits:
            assert TensorRTRunner(path).gpu.capability == here
            return
        with pytest.raises(EngineError, match="here is Played GPU") as error:
            TensorRTRunner(path)
        assert here in str(error.value)

    @pytest.mark.parametrize(
        ("mode", "says"),
        [
            ("corrupt", ("the engine is damaged", "build it again")),
            ("no gpu memory", ("not enough memory on the GPU", "--shapes")),
            ("plugin missing", ("lacks a plugin", "--plugin", "Registered: acme::Turn, 1")),
            ("other driver", ("does not load this engine", "cudaError 35")),
            ("no context", ("no memory for its activations",)),
        ],
    )
    def test_the_library_refuses(self, driver, tmp_path, monkeypatch, mode, says):
        path = linear(tmp_path, [SMALL])
        monkeypatch.setenv("FAKE_TENSORRT", mode)
        with pytest.raises(EngineError) as error:
            TensorRTRunner(path)
        for part in ("x.engine", *says):
            assert part in str(error.value)

    def refused(self, folder: Path, kind: type[Exception], *says: str) -> None:
        path = linear(folder, [SMALL])
        with pytest.raises(kind) as error:
            TensorRTRunner(path)
        for part in ("x.engine: cannot be run here", *says):
            assert part in str(error.value)


class TestRunsThatFail:
    X: dict[str, np.ndarray] = {"x": np.zeros((2, 4), np.float32)}  # noqa: RUF012

    def test_the_engine_fails(self, driver, tmp_path, monkeypatch):
        runner = TensorRTRunner(linear(tmp_path, [SMALL]))
        monkeypatch.setenv("FAKE_TENSORRT", "fails")
        with pytest.raises(EngineError, match=r"on Played GPU: it failed: Error Code 7"):
            runner.run(self.X)

    def test_what_the_library_said_before_is_not_repeated(self, driver, tmp_path):
        runner = TensorRTRunner(linear(tmp_path, [SMALL]))
        runner._loaded.errors.append("something old")
        driver.fails["cuStreamSynchronize"] = 700
        with pytest.raises(EngineError, match="illegal memory access") as error:
            runner.run(self.X)
        assert "old" not in str(error.value)

    def test_the_gpu_is_full(self, driver, tmp_path):
        runner = TensorRTRunner(linear(tmp_path, [LARGE]))
        driver.limit = 300
        with pytest.raises(EngineError, match="the GPU has not enough memory"):
            runner.run({"x": np.zeros((16, 4), np.float32)})

    def test_no_memory_for_what_depends_on_data(self, driver, tmp_path):
        path = engine(
            tmp_path / "x.engine",
            [oh.make_node("NonZero", ["x"], ["places"])],
            [("x", FLOAT, [4])],
            [("places", INT64, [1, "found"])],
        )
        runner = TensorRTRunner(path)
        runner.bind({"x": np.ones(4, np.float32)})
        driver.limit = 20
        with pytest.raises(EngineError, match="it failed: Error Code 2: no output memory"):
            runner.execute()


def manifest(path: Path, **facts: Any) -> None:
    content = {
        "engine": {"sha256": hash_file(path)}, "compute_capabilities": None, "plugins": [],
        "version_compatible": False, "profiles": [], **facts,
    }  # fmt: skip
    path.with_name(path.name + ".manifest.json").write_text(json.dumps(content))


class TestPlugins:
    @pytest.fixture
    def loads(self, driver: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Paths that the registry loaded; each brings one creator, a file named "none" none."""
        import tensorrt

        seen: list[str] = []

        class Registry(tensorrt.IPluginRegistry):
            @property
            def all_creators(self) -> Any:
                values = {"plugin_namespace": "acme", "plugin_version": "1"}
                names = [Path(item).stem for item in seen if "none" not in item]
                return [
                    tensorrt._Record("IPluginCreatorV3One", {**values, "name": n}) for n in names
                ]

            def load_library(self, path: str) -> object:
                seen.append(path)
                return object()

        monkeypatch.setattr(tensorrt, "get_plugin_registry", Registry)
        return seen

    def test_those_of_the_manifest_are_found_and_loaded_once(self, loads, tmp_path, native_library):
        path, beside = linear(tmp_path, [SMALL]), native_library(tmp_path / "turn.so")
        manifest(path, plugins=[{"file": "turn.so", "sha256": hash_file(beside)}])
        for _ in range(2):
            TensorRTRunner(path)
        TensorRTRunner(path, plugins=[beside])
        assert loads == [str(beside)]

    def test_another_file_is_only_taken_if_it_is_named(self, loads, tmp_path, native_library):
        path, beside = linear(tmp_path, [SMALL]), native_library(tmp_path / "turn.so")
        manifest(path, plugins=[{"file": "turn.so", "sha256": "0"}])
        with pytest.raises(EngineError, match="was built with another plugin library"):
            TensorRTRunner(path)
        TensorRTRunner(path, plugins=[beside])
        assert loads == [str(beside)]

    def test_one_that_is_nowhere(self, loads, tmp_path):
        path = linear(tmp_path, [SMALL])
        manifest(path, plugins=[{"file": "turn.so", "sha256": "0"}])
        with pytest.raises(
            EngineError, match=r"needs the plugin library turn\.so, which is neither"
        ):
            TensorRTRunner(path)

    def test_one_that_registers_nothing(self, loads, tmp_path, native_library):
        path, none = linear(tmp_path, [SMALL]), native_library(tmp_path / "none.so")
        with pytest.raises(EngineError, match="registers no creator"):
            TensorRTRunner(path, plugins=[none])

    @pytest.fixture
    def native_library(self) -> Callable[[Path], Path]:
        from fake_machine import elf

        def write(path: Path) -> Path:
            path.write_bytes(elf(["libc.so.6"]))
            return path

        return write
