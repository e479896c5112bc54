"""Decode the images of rows, and name the one that cannot be."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fedpft_flower.config import FedPFTError


def check_images(rows: Dataset, split: str) -> None:
    """Decode every image of a data set once, so that a broken one is found early.

    Raises:
        FedPFTError: an image cannot be decoded.
    """
    for i in range(len(rows)) if "image" in rows.column_names else ():
        try:
            decoded_images(rows, [i])
        except FedPFTError as error:
            raise FedPFTError(f"{split}: {error}") from error


def decoded_images(rows: Dataset, indices: Sequence[int]) -> list[Any]:
    """Return the images of these rows, in RGB.

    Raises:
        FedPFTError: one of them cannot be decoded.
    """
    try:
        return _decoded(rows, indices)
    except _UNDECODABLE:
        for i in indices:  # which one was it?
            try:
                _decoded(rows, [i])
            except _UNDECODABLE as error:
                raise FedPFTError(
                    f"the image of row {i} (counted from 0) cannot be decoded ({error})"
                    "; mend it or leave it out"
                ) from error
        raise


_UNDECODABLE = (OSError, ValueError, AttributeError)  # not an image, or cut


def _decoded(rows: Dataset, indices: Sequence[int]) -> list[Any]:
    return [image.convert("RGB") for image in rows[list(indices)]["image"]]
