"""Carry tokenizers and image processors from the FM to nodes, as files."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedpft_flower.architectures import AUTO_PROCESSORS, Architecture
from fedpft_flower.config import FedPFTError, first_line
from fedpft_flower.package import check_processor_file


def load_processor(place: Path, row: Architecture) -> Any:
    """Load the tokenizer or image processor of a model from its saved files.

    Args:
        place: their folder.
        row: the model's family. Decoders count positions from the first token, so they
            are padded at the end, which not every tokenizer saves.
    """
    processor = AUTO_PROCESSORS[row.modality].from_pretrained(
        place, local_files_only=True, trust_remote_code=False
    )
    if row.decoder:
        processor.padding_side = "right"
    return processor


def processor_from(files: Mapping[str, bytes], row: Architecture) -> Any:
    """Load a processor as `load_processor` does, from the contents of its files.

    Raises:
        FedPFTError: `transformers` does not load it from them.
    """
    with TemporaryDirectory() as directory:
        for name, body in files.items():
            (Path(directory) / name).write_bytes(body)
        try:
            return load_processor(Path(directory), row)
        except Exception as error:  # a tokenizer's own class raises almost anything
            raise FedPFTError(
                "the FM's processor cannot be loaded from the files that it saves "
                f"({first_line(error)}), so no node could have it; give the FM one of "
                "the classes that transformers saves whole"
            ) from error


def saved_and_loaded(processor: Any, row: Architecture) -> tuple[dict[str, bytes], Any]:
    """Return a processor's files, and the processor as nodes have it: read from them.

    Before it is used: whether it encoded rows earlier must not change its files.

    Raises:
        FedPFTError: a file is of a kind that no node takes, or what is read encodes
            otherwise.
    """
    files = processor_files(processor)
    for name in files:
        check_processor_file(name)
    loaded = processor_from(files, row)
    if row.modality == "text":
        check_same_tokens(processor, loaded)
    return files, loaded


# Words, numbers, signs and another script: what every tokenizer makes many tokens of.
_PROBE = "Neurons of feed-forward networks, 12.5 % kept: naïve or not? 神经元"


def check_same_tokens(one: Any, other: Any) -> None:
    """Check that a tokenizer encodes as it did before it was saved.

    Raises:
        FedPFTError: it does not, so that nodes would see other tokens than the FM was
            made for.
    """
    try:
        first = one(_PROBE)["input_ids"]
    except Exception:  # a vocabulary of its own, of a code perhaps, with nothing for it
        return
    if first != (second := other(_PROBE)["input_ids"]):
        raise FedPFTError(
            f"the FM's tokenizer ({type(one).__name__}) encodes otherwise once it was "
            f"saved (one text as {len(first)} and {len(second)} tokens), as nodes get "
            "it; give the FM a tokenizer.json"
        )


def processor_files(processor: Any) -> dict[str, bytes]:
    """Return the files of a tokenizer or image processor, by their names.

    A fast tokenizer writes how it last cut and padded into them.
    """
    with TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        paths = sorted(Path(directory).iterdir())
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
