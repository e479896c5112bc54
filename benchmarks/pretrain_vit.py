"""Train a small vision transformer from random weights, to have an FM for images.

python -m benchmarks.pretrain_vit DATA [DATA ...] --out DIR [--epochs N] [--minutes M]

Each DATA is a local set of images with labels that `datasets` loads (--image-column,
--label-column, --train-split and --test-split say where other names stand); the classes
of several are told apart. Images are held in memory as bytes. After every epoch a
checkpoint is written; the same command goes on where it ended. With --minutes it trains
as many epochs, N at most, as a few steps tell will fit. DIR is then what `fm.name`
takes.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks import parser, run_main
from fedpft_flower.config import DataConfig, FedPFTError, derive_seed
from fedpft_flower.devices import device_here, has_bf16
from fedpft_flower.disk import put
from fedpft_flower.images import decoded_images
from fedpft_flower.tasks import load_task

WARM_UP, WEIGHT_DECAY, CLIP = 0.05, 0.05, 1.0
SMOOTHING, MIXUP = 0.1, 0.3
PROGRESS_SECONDS = 10.0
# Steps that tell the speed, behind some that only warm up.
WARM_STEPS, TIMED_STEPS = 3, 12


@dataclass(frozen=True)
class Recipe:
    """Say what is trained, and how."""

    data: tuple[str, ...]
    epochs: int = 9
    batch_size: int = 128
    lr: float = 1e-3
    size: int = 32
    patch: int = 4
    hidden: int = 192
    layers: int = 6
    heads: int = 3
    seed: int = 0
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str = "test"


@dataclass(frozen=True)
class Images:
    """Hold images as bytes [N, 3, S, S] and their labels [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)


def main() -> None:
    """Train, or go on training, and save the model."""
    arguments = parser(__doc__)
    arguments.add_argument("data", nargs="+")
    arguments.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(Recipe):
        if field.name != "data":
            flag = f"--{field.name.replace('_', '-')}"
            arguments.add_argument(flag, type=field.type, default=field.default)
    arguments.add_argument(
        "--minutes", type=float, help="train no longer than about this"
    )
    options = vars(arguments.parse_args())
    out, minutes = options.pop("out"), options.pop("minutes")
    recipe = Recipe(**options | {"data": tuple(options["data"])})
    training, held_out, names = read(recipe)
    print(f"{len(training)} images of {len(names)} classes, {len(held_out)} held out")
    if minutes is not None:
        epochs = epochs_within(minutes, recipe, training, names, out)
        recipe = dataclasses.replace(recipe, epochs=epochs)
    Pretraining(recipe, names, out).run(training, held_out)
    print(f"model: {out.resolve()}")


def read(recipe: Recipe) -> tuple[Images, Images, list[str]]:
    """Read all sets, and return training images, held-out ones and the classes.

    Held out is the test split, which is `validation` where there is no other.
    """
    parts: list[tuple[Images, Images]] = []
    names: list[str] = []
    for path in recipe.data:
        config = DataConfig(
            task="image",
            path=path,
            image_column=recipe.image_column,
            label_column=recipe.label_column,
            train_split=recipe.train_split,
            test_split=recipe.test_split,
        )
        task = load_task(config, recipe.seed)
        if task.train is None:
            raise FedPFTError(
                f"{path} has no split {recipe.train_split!r}; give one that has"
            )
        shift = len(names)
        parts.append(
            (
                as_bytes(
                    concatenate_datasets([task.train, task.validation]),
                    recipe.size,
                    shift,
                ),
                as_bytes(task.test, recipe.size, shift),
            )
        )
        names += [f"{Path(path).name}/{label}" for label in task.labels]
    training, held_out = (
        Images(
            torch.cat([one.pixels for one in ones]),
            torch.cat([one.labels for one in ones]),
        )
        for ones in zip(*parts, strict=True)
    )
    return training, held_out, names


def epochs_within(
    minutes: float, recipe: Recipe, images: Images, names: list[str], out: Path
) -> int:
    """Return how many epochs to train in so many minutes, as the speed here has it.

    What was begun in `out` keeps its number: the learning rate follows it.

    Raises:
        FedPFTError: not even one epoch fits.
    """
    begun = out / "checkpoint.json"
    if begun.exists():
        return int(json.loads(begun.read_text(encoding="utf-8"))["recipe"]["epochs"])
    with TemporaryDirectory() as place:
        trial = Pretraining(recipe, names, Path(place))
        trial.train_epoch(first(images, WARM_STEPS * recipe.batch_size))
        few = first(images, TIMED_STEPS * recipe.batch_size)
        began = time.monotonic()
        trial.train_epoch(few)
        speed = len(few) / (time.monotonic() - began)
    fit = int(minutes * 60 * speed / len(images))
    print(f"{speed:.0f} images/s: {fit} epochs fit into {minutes:g} minutes")
    if fit < 1:
        needed = math.ceil(len(images) / speed / 60)
        raise FedPFTError(
            f"--minutes {minutes:g} is less than an epoch takes here; give {needed}, "
            "or fewer images"
        )
    return min(fit, recipe.epochs)


def first(images: Images, count: int) -> Images:
    """Return the first so many images, or all."""
    return Images(images.pixels[:count], images.labels[:count])


def as_bytes(rows: Dataset, size: int, shift: int) -> Images:
    """Decode and resize all images of a data set."""
    pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for i in range(len(rows)):
        (image,) = decoded_images(rows, [i])
        if image.size != (size, size):
            image = image.resize((size, size))
        pixels[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return Images(pixels, torch.tensor(rows["label"][:]) + shift)


class Pretraining:
    """Train a ViT by AdamW with mixup, and keep a checkpoint an epoch."""

    def __init__(self, recipe: Recipe, names: list[str], out: Path) -> None:
        """Build the model, or take it from the checkpoint in `out`."""
        self.recipe, self.out, self._names = recipe, out, names
        self.device = device_here()
        torch.manual_seed(recipe.seed)
        config = ViTConfig(
            image_size=recipe.size,
            patch_size=recipe.patch,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=4 * recipe.hidden,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
        self.model = ViTForImageClassification(config)
        nn.Module.to(self.model, self.device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY
        )
        self.epoch = 0
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.json").exists():
            self._load()

    def run(self, training: Images, held_out: Images) -> None:
        """Train the epochs that are left, and save the model in `out`."""
        precision = "bf16" if has_bf16(self.device) else "fp32"
        print(f"{self.recipe.epochs - self.epoch} epochs on {self.device}, {precision}")
        while self.epoch < self.recipe.epochs:
            loss = self.train_epoch(training)
            self.epoch += 1
            print(
                f"epoch {self.epoch}/{self.recipe.epochs}: training loss {loss:.3f}, "
                f"held-out accuracy {self.accuracy(held_out):.4f}",
                flush=True,
            )
            self._save()
        self.model.save_pretrained(self.out)
        half, size = [0.5] * 3, {"height": self.recipe.size, "width": self.recipe.size}
        ViTImageProcessor(image_mean=half, image_std=half, size=size).save_pretrained(
            self.out
        )

    def train_epoch(self, images: Images) -> float:
        """Train one epoch, and return the mean loss."""
        steps = math.ceil(len(images) / self.recipe.batch_size)
        self.model.train()
        generator = torch.Generator().manual_seed(
            derive_seed(self.recipe.seed, "epoch", self.epoch)
        )
        total, began, shown = 0.0, time.monotonic(), time.monotonic()
        for step, (pixels, targets) in enumerate(self._batches(images, generator), 1):
            done = self.epoch * steps + step
            self.optimiser.param_groups[0]["lr"] = self.recipe.lr * rate(
                done / (self.recipe.epochs * steps)
            )
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=has_bf16(self.device)
            ):
                logits = self.model(pixel_values=pixels).logits
            loss = nn.functional.cross_entropy(logits.float(), targets)
            if not bool(torch.isfinite(loss)):
                raise FedPFTError(f"the loss is {loss.item()}; lower --lr")
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimiser.step()
            total += float(loss.detach())
            now = time.monotonic()
            if now - shown >= PROGRESS_SECONDS:
                shown, speed = now, (now - began) / step
                left = (self.recipe.epochs * steps - done) * speed / 60
                print(
                    f"  step {step}/{steps}, loss {total / step:.3f}, "
                    f"{self.recipe.batch_size / speed:.0f} images/s, "
                    f"{left:.0f} minutes left",
                    flush=True,
                )
        return total / steps

    def _batches(
        self, images: Images, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield varied and mixed inputs [B, 3, S, S], and targets [B, classes]."""
        classes = len(self._names)
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(self.recipe.batch_size):
            pixels = shifted(images.pixels[chosen], generator)
            target = nn.functional.one_hot(images.labels[chosen], classes).float()
            target = target * (1 - SMOOTHING) + SMOOTHING / classes
            other = torch.randperm(len(chosen), generator=generator)
            seed = int(torch.randint(2**31, (), generator=generator))
            share = float(np.random.default_rng(seed).beta(MIXUP, MIXUP))
            x = normalised(pixels)
            yield (
                (share * x + (1 - share) * x[other]).to(self.device),
                (share * target + (1 - share) * target[other]).to(self.device),
            )

    @torch.no_grad()
    def accuracy(self, images: Images) -> float:
        """Return the share of images that the model classifies rightly."""
        self.model.eval()
        hits = 0
        for chosen in torch.arange(len(images)).split(256):
            pixels = normalised(images.pixels[chosen]).to(self.device)
            said = self.model(pixel_values=pixels).logits.argmax(dim=-1).cpu()
            hits += int((said == images.labels[chosen]).sum())
        return hits / len(images)

    def _save(self) -> None:
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{n}": t for n, t in state.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        place = self.out / f"checkpoint-{self.epoch}.safetensors"
        put(place, lambda draft: save_file(tensors, draft))
        about = {"epoch": self.epoch, "recipe": dataclasses.asdict(self.recipe)}
        text = json.dumps(about, indent=1)
        put(
            self.out / "checkpoint.json",
            lambda draft: draft.write_text(text, encoding="utf-8"),
        )
        (self.out / f"checkpoint-{self.epoch - 1}.safetensors").unlink(missing_ok=True)

    def _load(self) -> None:
        about = json.loads((self.out / "checkpoint.json").read_text(encoding="utf-8"))
        own = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        defaults = {f.name: f.default for f in dataclasses.fields(Recipe)}
        if defaults | about["recipe"] != own:
            raise FedPFTError(
                f"{self.out} holds a checkpoint of another command; choose another "
                "--out, or remove it"
            )
        self.epoch = about["epoch"]
        tensors = load_file(self.out / f"checkpoint-{self.epoch}.safetensors")
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser/"):
                _, i, key = name.split("/")
                kept.setdefault(int(i), {})[key] = tensor
        weights = {
            name.removeprefix("model/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("model/")
        }
        self.model.load_state_dict(weights)
        state = self.optimiser.state_dict()
        self.optimiser.load_state_dict(state | {"state": kept})
        print(f"going on after epoch {self.epoch}")


def rate(share: float) -> float:
    """Return the learning rate's factor: linear warm-up, then half a cosine."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to an eighth of it, and mirror every other one."""
    size = pixels.shape[-1]
    most = size // 8
    padded = nn.functional.pad(pixels.float(), [most] * 4, mode="reflect")
    starts = torch.randint(2 * most + 1, (2, len(pixels)), generator=generator)
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    out = torch.empty_like(pixels)
    for i, (top, left) in enumerate(starts.T.tolist()):
        part = padded[i, :, top : top + size, left : left + size]
        out[i] = part.flip(-1) if flip[i] else part
    return out


def normalised(pixels: Tensor) -> Tensor:
    """Return bytes as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


if __name__ == "__main__":
    run_main(main)
