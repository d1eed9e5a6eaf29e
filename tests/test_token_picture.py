"""The picture of merged tokens."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Outcome
from rule_case import graph

from optimizer.model_io import save_model
from optimizer.token_picture import patch_size, picture, png, side_by_side


def decoded(content: bytes) -> np.ndarray:
    """Pixels of a PNG of eight bits per colour without filters."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        name, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + body
        )
        chunks[name] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_png_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    assert np.array_equal(decoded(png(pixels)), pixels)


@pytest.mark.parametrize(
    ("sizes", "tokens", "expected"),
    [((224, 224), 197, 16), ((224, 224), 256, 14), ((32, 32), 65, 4), ((8, 16), 33, 2),
     ((32, 32), 50, None)],
)  # fmt: skip
def test_patches_are_found_from_the_number_of_tokens(
    sizes: tuple[int, int], tokens: int, expected: int | None
) -> None:
    assert patch_size(sizes, tokens) == expected


def test_merged_patches_have_their_mean_colour_and_lines_around() -> None:
    image = np.zeros((1, 4, 4))
    image[0, :2, 2:] = 1.0  # the second patch is white
    found = side_by_side(image, np.array([5, 5, 7, 8]), patch=2)
    size = 384 // 4 * 2
    right = found[:, -2 * size :]
    assert np.array_equal(right[size // 2, size // 2], [128] * 3)  # two patches, one token
    assert np.array_equal(right[size // 2, size], [128] * 3)  # and no line between
    assert right[size, size // 2, 0] > 200 > right[size, size // 2, 1]  # but one below


@pytest.fixture
def reduced(tmp_path: Path) -> Path:
    """An image of four patches, of which the last two are one token."""
    model: ir.Model = graph(
        "n = Shape<end = 1>(x)  s = Concat<axis = 0>(n, five)  token_places = Expand(p, s)"
        "  y = Relu(x)",
        inputs="float[B,1,4,4] x",
        output="int64[B,5] token_places, float[B,1,4,4] y",
        constants="int64[1] five = {5}, int64[1,5] p = {0, 1, 2, 3, 3}",
    )
    save_model(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "images.npz", x=np.ones((2, 1, 4, 4), np.float32))
    return tmp_path


def test_the_command_draws(reduced: Path, command: Callable[..., Outcome]) -> None:
    found = command("inspect", reduced / "m.onnx", "--tokens", reduced / "images.npz")
    assert found.code == 0
    assert "3 of 4 patches are still apart" in found.out
    assert decoded((reduced / "m.tokens.png").read_bytes()).shape == (384, 384 * 2 + 8, 3)


def test_facts(reduced: Path) -> None:
    made = picture(reduced / "m.onnx", reduced / "images.npz", reduced / "a" / "t.png", sample=1)
    assert made == {"tokens": 5, "patches": 4, "left": 3}


def test_a_sample_that_is_not_there(reduced: Path, command: Callable[..., Outcome]) -> None:
    words = ("inspect", reduced / "m.onnx", "--tokens", reduced / "images.npz", "--sample", "2")
    found = command(*words)
    assert found.code == 2
    assert "there is no sample 2" in found.err
