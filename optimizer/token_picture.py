"""A picture of the tokens that were merged in an image: for ``optimize inspect --tokens``.

Beside the image stands what the last layer sees of it: each patch in the mean colour of all patches
of its token, with lines between different tokens (as in ToMe, arXiv 2210.09461).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from optimizer.calibration import input_specs
from optimizer.errors import CalibrationError, ExportError, UnsupportedError
from optimizer.model_io import load_model
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples

#: Name of the output that tells where each token went; passes write it with places=true.
PLACES = "token_places"
#: Class, distillation and register tokens, at most, in front of the patches.
_MOST_SPECIAL = 16
#: The picture is enlarged until an image is about this wide, in pixels.
_WIDTH = 384
_GAP = 8


def picture(model: Path, data: Path, target: Path, *, sample: int = 0) -> dict[str, int]:
    """Write a PNG of one image and of its merged tokens.

    Args:
        model: A file with the output ``token_places`` and one image [B, C, H, W] as input.
        data: Sample data; see ``samples.load_samples``.
        target: The picture.
        sample: Which of the samples, from 0.

    Returns:
        "tokens", "patches" and "left": in all, those of the image, and different ones among them.

    Raises:
        UnsupportedError: The model has no such output or input.
        CalibrationError: The data do not fit, or have no such sample.
        ExportError: The picture cannot be written.
    """
    loaded = load_model(model)
    images = [v for v in loaded.graph.inputs if v.shape is not None and len(v.shape) == 4]
    if PLACES not in [value.name for value in loaded.graph.outputs]:
        raise UnsupportedError(
            f"{model} has no output '{PLACES}' that tells which tokens were merged; make it with "
            "--passes tome:places=true"
        )
    if len(images) != 1:
        raise UnsupportedError(
            f"{model} has {len(images)} inputs of shape [batch, channels, height, width], "
            "expected 1; only tokens of images can be drawn"
        )
    samples = load_samples(data, input_specs(loaded), option="--tokens")
    feeds = [batch.feed for index, batch in enumerate(samples.iterate(1)) if index == sample]
    if not feeds:
        raise CalibrationError(f"--tokens: there is no sample {sample}, the first is 0")
    places = OrtRunner(loaded).run(feeds[0])[PLACES][0]
    image = feeds[0][str(images[0].name)][0]
    patch = patch_size(image.shape[1:], len(places))
    if patch is None:
        raise UnsupportedError(
            f"{len(places)} tokens are no grid of square patches of an image of "
            f"{image.shape[2]} x {image.shape[1]} pixels with up to {_MOST_SPECIAL} more"
        )
    groups = places[len(places) - image[0].size // patch**2 :]
    _write(target, side_by_side(image, groups, patch))
    return {"tokens": len(places), "patches": len(groups), "left": len(np.unique(groups))}


def patch_size(sizes: tuple[int, ...], tokens: int) -> int | None:
    """The side of the square patches that, with few tokens more, are ``tokens``."""
    height, width = sizes
    for patch in range(1, min(height, width) + 1):
        if height % patch or width % patch:
            continue
        special = tokens - height * width // patch**2
        if 0 <= special <= _MOST_SPECIAL:
            return patch
    return None


def side_by_side(image: np.ndarray, groups: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [H', W', 3]: ``image`` [C, H, W], and the same with the colours of ``groups`` [n]."""
    colours = _colours(image)
    height, width = colours.shape[:2]
    rows, columns = height // patch, width // patch
    grid = groups.reshape(rows, columns)
    patches = colours.reshape(rows, patch, columns, patch, 3).mean(axis=(1, 3))
    merged = np.empty_like(patches)
    for group in np.unique(grid):
        merged[grid == group] = patches[grid == group].mean(axis=0)
    scale = max(1, _WIDTH // width)
    left = _enlarged(colours, scale)
    right = _enlarged(merged, scale * patch)
    _draw_lines(right, grid, scale * patch)
    gap = np.full((len(left), _GAP, 3), 1.0)
    return np.asarray(np.round(255 * np.concatenate([left, gap, right], axis=1)), np.uint8)


def _colours(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] from 0 to 1: normalised images span all numbers."""
    numbers = np.moveaxis(image.astype(np.float64), 0, -1)
    numbers = numbers[..., :3] if numbers.shape[-1] >= 3 else numbers[..., :1].repeat(3, axis=-1)
    low, high = numbers.min(), numbers.max()
    return np.asarray((numbers - low) / (high - low if high > low else 1))


def _enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def _draw_lines(pixels: np.ndarray, grid: np.ndarray, size: int) -> None:
    """Red lines between neighbours of different groups, in place."""
    red = np.array([0.9, 0.2, 0.1])
    for row, column in np.argwhere(grid[1:] != grid[:-1]):
        at = slice(column * size, (column + 1) * size)
        pixels[(row + 1) * size - 1 : (row + 1) * size + 1, at] = red
    for row, column in np.argwhere(grid[:, 1:] != grid[:, :-1]):
        at = slice(row * size, (row + 1) * size)
        pixels[at, (column + 1) * size - 1 : (column + 1) * size + 1] = red


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 3] (ISO/IEC 15948): one image, eight bits, no filter."""
    height, width = pixels.shape[:2]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def _write(target: Path, pixels: np.ndarray) -> None:
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(png(pixels))
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"{target} cannot be written: {error.strerror or error}.") from error
