"""Decode the images of rows, name one that cannot be, and vary them for training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from PIL.Image import Transpose

from fedpft_flower.config import OwnRowsError

AT_ONCE = 8  # images in memory, which may be photographs


def check_images(rows: Dataset, split: str) -> None:
    """Decode every image of a data set once, so that a broken one is found early.

    Raises:
        OwnRowsError: an image cannot be decoded.
    """
    rows_with = len(rows) if "image" in rows.column_names else 0
    for start in range(0, rows_with, AT_ONCE):
        try:
            decoded_images(rows, range(start, min(start + AT_ONCE, rows_with)))
        except OwnRowsError as error:
            raise OwnRowsError(f"{split}: {error}", f"{split}: {error.told}") from error


def decoded_images(rows: Dataset, indices: Sequence[int]) -> list[Any]:
    """Return the images of these rows, in RGB.

    Raises:
        OwnRowsError: one of them cannot be decoded.
    """
    try:
        return _decoded(rows, indices)
    except Exception:  # broken files make decoders raise almost anything
        for i in indices:  # which one was it?
            try:
                _decoded(rows, [i])
            except Exception as error:
                what = f"the image of row {i} (counted from 0) cannot be decoded"
                raise OwnRowsError(
                    f"{what} ({error}); mend it or leave it out",
                    f"{what}; this node's log says more",
                ) from error
        raise


def _decoded(rows: Dataset, indices: Sequence[int]) -> list[Any]:
    return [in_rgb(image) for image in rows[list(indices)]["image"]]


def in_rgb(image: Any) -> Any:
    """Return an image in RGB: on white where it is transparent, from 16 bits to 8."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


# Of a random crop: its share of the area, and its width by its height (Szegedy et al.
# 2015, arXiv 1409.4842).
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def crop_and_flip(image: Any, generator: np.random.Generator) -> Any:
    """Return a random part of an image, every other time mirrored.

    The image processor then brings it to the size of all others, which makes it a
    random resized crop.
    """
    width, height = image.size
    area = width * height * generator.uniform(*CROP_AREA)
    ratio = np.exp(generator.uniform(*np.log(CROP_RATIO)))
    across = min(width, max(1, round((area * ratio) ** 0.5)))
    down = min(height, max(1, round((area / ratio) ** 0.5)))
    left = int(generator.integers(width - across + 1))
    top = int(generator.integers(height - down + 1))
    part = image.crop((left, top, left + across, top + down))
    mirrored = generator.random() < 0.5
    return part.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else part
