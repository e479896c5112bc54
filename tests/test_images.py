from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor

from benchmarks.plain_loop import PlainLoop
from fedpft_flower.adapters import get_adapter
from fedpft_flower.config import Config, DataConfig
from fedpft_flower.encoding import Part, encode, hold_out, shuffled_batches
from fedpft_flower.images import CROP_AREA, crop_and_flip, decoded_images, in_rgb


def gradient(width=40, height=20, blue=0):
    """Return an image whose red says the column and whose green says the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = 5 * np.arange(width)
    pixels[..., 1] = 5 * np.arange(height)[:, None]
    pixels[..., 2] = blue
    return Image.fromarray(pixels)


def test_a_crop_is_a_part_of_the_image_every_other_one_mirrored():
    generator, shares, mirrored, ratios = np.random.default_rng(0), [], 0, []
    for _ in range(300):
        part = crop_and_flip(gradient(), generator)
        pixels = np.asarray(part).astype(int)
        columns, rows = pixels[0, :, 0] // 5, pixels[:, 0, 1] // 5
        assert np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
        step = columns[1] - columns[0] if len(columns) > 1 else 1
        assert np.array_equal(columns, columns[0] + step * np.arange(len(columns)))
        mirrored += step == -1
        shares.append(part.width * part.height / 800)
        ratios.append(part.width / part.height)
    assert 120 < mirrored < 180
    assert min(shares) > 0.8 * CROP_AREA[0]
    # The image is twice as wide as high, so the largest crops are cut.
    assert 0.7 < max(shares) <= 1.0
    assert min(ratios) > 0.6 and max(ratios) < 2.1
    assert crop_and_flip(gradient(1, 1), generator).size == (1, 1)


@pytest.fixture
def rows(vit_directory):
    def made(augment="none", keep=False):
        images = [gradient(blue=20 * row) for row in range(8)]
        data = Dataset.from_dict({"image": images, "label": list(range(8))})
        data = data.cast_column("image", ImageFeature())
        processor = AutoImageProcessor.from_pretrained(vit_directory)
        config = DataConfig(augment=augment)
        return encode(data, processor, "image", config, keep=keep)

    return made


def test_training_varies_images_where_asked_and_evaluation_never(rows):
    plain = rows().batch([0, 1])["pixel_values"]
    assert torch.equal(rows().varied(3).batch([0, 1])["pixel_values"], plain)
    asked = rows("crop-flip")
    assert torch.equal(asked.batch([0, 1])["pixel_values"], plain)
    varied = asked.varied(3)
    first, second = (varied.batch([0, 1]) for _ in range(2))
    assert first["labels"].tolist() == [0, 1]
    assert first["pixel_values"].shape == plain.shape
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    again = asked.varied(3).batch([0, 1])
    assert torch.equal(first["pixel_values"], again["pixel_values"])


def test_processed_images_are_kept_as_far_as_memory_is_given(rows, monkeypatch):
    every = rows().batch(range(8))["pixel_values"]
    monkeypatch.setattr("fedpft_flower.encoding.KEPT_BYTES", 3 * every[0].nbytes)
    asked = []

    def decoded(data, indices):
        asked.append(list(indices))
        return decoded_images(data, indices)

    monkeypatch.setattr("fedpft_flower.encoding.decoded_images", decoded)
    found, other = rows(keep=True), rows("crop-flip", keep=True)
    for chosen in ([2, 0], [0, 2], [5, 2, 6], [5], [6]):
        batch = found.batch(chosen)
        for place, row in enumerate(chosen):
            assert torch.equal(batch["pixel_values"][place], every[row])
            assert int(batch["labels"][place]) == row
    assert asked == [[2, 0], [5, 2, 6], [6]]  # 6 has no room
    varied = other.varied(1)
    varied.batch([0])
    varied.batch([0])
    assert asked[3:] == [[0], [0]]
    clients = rows()
    clients.batch([0])
    clients.batch([0])
    assert asked[5:] == [[0], [0]]


def test_held_out_rows_and_the_others_are_all_rows_once(rows):
    parts = hold_out(rows("crop-flip"), 3, seed=1)
    assert [len(part) for part in parts] == [3, 5]
    labels = [
        label
        for part in parts
        for batch in shuffled_batches(part, 2, seed=0)
        for label in batch["labels"].tolist()
    ]
    assert sorted(labels) == list(range(8))
    varied = parts[0].varied(0)
    assert isinstance(varied, Part) and len(varied) == 3
    one, other = (varied.batch([0])["pixel_values"] for _ in range(2))
    assert not torch.equal(one, other)


def test_a_federation_learns_from_varied_images(local_grid, settings):
    adapters = []
    for augment in ("none", "crop-flip", "crop-flip"):
        change = {"rounds": 1, "method": "fedpft-n", "data.augment": augment}
        loop = PlainLoop(Config.from_run_config(settings | change), 5)
        list(loop.run())
        adapters.append(get_adapter(loop.server.sub_fm))
    same = [
        all(torch.equal(one[name], other[name]) for name in one)
        for one, other in pairwise(adapters)
    ]
    assert same == [False, True]


def test_images_of_every_mode_become_rgb():
    deep = Image.fromarray(np.full((2, 2), 0x80FF, dtype=np.uint16))
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = Image.new("LA", (2, 2), (0, 128))
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    colours = {
        image.mode: in_rgb(image).getpixel((0, 0))
        for image in (deep, clear, half, palette, Image.new("L", (2, 2), 7))
    }
    assert colours == {
        "I;16": (128,) * 3,
        "RGBA": (255,) * 3,
        "LA": (127,) * 3,
        "P": (255,) * 3,
        "L": (7,) * 3,
    }
