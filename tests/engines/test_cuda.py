"""The driver's interface, on a GPU where there is one."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from played_cuda import stage

from optimizer.engines.cuda import Driver, Gpu
from optimizer.errors import EngineError, MissingDependencyError


def walk(gpu: Gpu) -> None:
    """Copies there and back, side by side, of nothing, and of what replaced it."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(np.float32) for size in (0, 1, 1000, 1 << 20)]
    memory = [gpu.allocate(array.nbytes) for array in arrays]
    assert all(item.pointer and item.size for item in memory)
    for array, item in zip(arrays, memory, strict=True):
        gpu.upload(item.pointer, array)
    gpu.synchronize()
    found = [np.empty_like(array) for array in arrays]
    for array, item in zip(found, memory, strict=True):
        gpu.download(array, item.pointer)
    gpu.synchronize()
    for array, expected in zip(found, arrays, strict=True):
        assert np.array_equal(array, expected)
    memory[-1].free()
    memory[-1].free()  # once is enough
    with pytest.raises(EngineError, match="not enough memory"):
        gpu.allocate(1 << 44)


def test_a_played_gpu(monkeypatch):
    played = stage(monkeypatch, "8.9", "12.0")
    driver = Driver()
    assert [(item.index, item.capability) for item in driver.devices] == [(0, "8.9"), (1, "12.0")]
    gpu = Gpu(driver, driver.devices[1])
    assert played.context == 1001
    walk(gpu)
    del gpu
    gc.collect()
    assert not played.memory
    assert not played.streams


@pytest.mark.gpu
def test_a_real_gpu():
    try:
        driver = Driver()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    for device in driver.devices:
        assert device.name
        assert float(device.capability) >= 5
        walk(Gpu(driver, device))
