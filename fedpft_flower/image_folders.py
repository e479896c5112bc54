"""Read directories of images: a folder a class, maybe below a folder a split."""

import glob
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Image, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from fedpft_flower.config import FedPFTError
from fedpft_flower.splits import SPLIT_NAME, Splits, by_split

logger = logging.getLogger(__name__)


def read_image_folders(place: Path, found: Sequence[Path], cache: str) -> Splits:
    """Return the splits of a directory of images, labelled by their folders.

    In the layout CLASS/images/FILE, as Tiny-ImageNet has it, the class is the folder
    above. A split without a class that there is to train on (all its images in one
    folder, perhaps) has no labels and is left out.
    """
    splits = _image_splits(place, found)
    read = _load_folders(place, splits, cache)
    above = all(part.features["label"].names == ["images"] for part in read.values())
    folders = {
        split: [
            (path.parent.parent if above else path.parent).name
            for image in part.cast_column("image", Image(decode=False))["image"][:]
            if (path := Path(image["path"]))
        ]
        for split, part in read.items()
    }
    most = max(len(set(names)) for names in folders.values())
    classed = {s for s, names in folders.items() if len(set(names)) > 1 or most == 1}
    if learnt := set(folders.get("train", ())):
        classed = {s for s, names in folders.items() if learnt & set(names)}
    for split in folders.keys() - classed:
        logger.warning(
            "%s: split %r has no folder for each class: left out", place, split
        )
    if not above and classed == read.keys():
        return read
    label = ClassLabel(names=sorted({n for s in classed for n in folders[s]}))
    return {
        split: read[split]
        .remove_columns("label")
        .add_column("label", label.str2int(folders[split]))
        .cast_column("label", label)
        for split in read
        if split in classed
    }


def _load_folders(
    place: Path, splits: Mapping[str, list[str]] | None, cache: str
) -> Splits:
    """Return images labelled by their folders, a single one too: a site's, perhaps."""
    # Under keys of its own, since not every name of a split is one to `datasets`.
    keys = {f"s{i}": split for i, split in enumerate(splits or ())}
    read: Splits = load_dataset(
        "imagefolder",
        data_dir=str(place),
        data_files={key: splits[split] for key, split in keys.items()}
        if splits
        else None,
        drop_labels=False,
        cache_dir=cache,
    )
    return {keys.get(key, key): part for key, part in read.items()}


def _image_splits(place: Path, found: Sequence[Path]) -> dict[str, list[str]] | None:
    """Return split -> patterns of the files of a directory of images.

    Folders at the top are splits where one to train on has classes below, or where all
    are called so; else everything is one: by itself `datasets` takes a class called
    "train", or a file called "test.jpg", for a split. None where there are no images
    but archives, perhaps: it looks into them.

    Raises:
        FedPFTError: every class has folders of splits, which nothing here reads.
    """
    files = [
        path
        for path in (path.relative_to(place) for path in found)
        if path.suffix.lower() in ImageFolder.EXTENSIONS
        and not any(part.startswith((".", "__")) for part in path.parts)
    ]
    if not files:
        return None
    base = _shared_folder(files)
    below = [path.relative_to(base) for path in files]
    tops = {path.parts[0] if len(path.parts) > 1 else "" for path in below}
    classed = {path.parts[0] for path in below if len(_folders(path)) > 1}
    named = {top for top in tops if SPLIT_NAME.fullmatch(top.lower())}
    if named == tops or "train" in by_split((top, top) for top in named & classed):
        for top in sorted(tops - named):
            what = place / base / top if top else f"images at the top of {place / base}"
            logger.warning("%s: called like no split: left out", what)
        return by_split(
            (top, (glob.escape(str(base / top)) + "/**")) for top in sorted(named)
        )
    parents = {path.parent.name for path in below}
    if len(tops) > 1 and by_split((name, name) for name in parents):
        raise FedPFTError(
            f"images lie in CLASS/SPLIT, as in {files[0].parent}; put them into "
            "SPLIT/CLASS"
        )
    return {"train": ["**"]}


def _folders(file: Path) -> tuple[str, ...]:
    """Return the folders that a file is in, but for one called `images` around it."""
    folders = file.parent.parts
    return folders[:-1] if folders[-1:] == ("images",) else folders


def _shared_folder(files: Sequence[Path]) -> Path:
    """Return the folder that all files are in, above what is called like a split."""
    shared = Path(os.path.commonpath([file.parent for file in files]))
    for place, part in enumerate(shared.parts):
        if SPLIT_NAME.fullmatch(part.lower()):
            return Path(*shared.parts[:place])
    return shared
