"""Make of a finished run what can be handed on (`fedpft-export`).

An export opens where there is only `transformers` and `peft`: the adapter as a PEFT
folder, the FM with the adapter merged, and a model card.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedpft_flower.adapters import attach_adapter, export_adapter, load_adapter
from fedpft_flower.card import Licence, Origin, render_card
from fedpft_flower.config import FedPFTError
from fedpft_flower.disk import existing_path, put, shell_path
from fedpft_flower.endings import end_like_ctrl_c, one_line_end
from fedpft_flower.foundation import (
    BUNDLED_HUB_NAME,
    BUNDLED_NAME,
    FoundationModel,
    load_fm_of,
    source_of_fm,
)
from fedpft_flower.plan import Plan
from fedpft_flower.runs import FinishedRun
from fedpft_flower.software import quiet
from fedpft_flower.store import tensors_hash
from fedpft_flower.sub_fm import frozen_weights
from fedpft_flower.tasks import task_of
from fedpft_flower.wording import last_part

# How the names of files begin that say what others may do with an FM.
_LICENCES = ("license", "licence", "notice", "copying", "use_policy")


def run(arguments: Sequence[str] | None = None) -> None:
    """Export a finished run from the command line; exit 0 only if all is written."""
    options = _parser().parse_args(arguments)
    quiet()
    end_like_ctrl_c()
    place = options.run.expanduser().absolute()
    out = options.out.expanduser().absolute() if options.out else place / "export"
    with one_line_end("interrupted; nothing is left behind"):
        export(place, out, options.fm, _tell)
    print(f"exported: {out}", flush=True)


def export(
    place: Path,
    out: Path,
    fm_name: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write adapter, merged FM and model card of a finished run, all or nothing.

    The merged FM has the numbers in which the server held the FM: those of its
    checkpoint, unless `fm.dtype` said otherwise (float32 for a float16 one).

    Args:
        place: the run directory.
        out: the directory to write, which must not be there.
        fm_name: where the FM is now; None takes the run's `fm.name`.
        tell: is told what is being done, a line at a time.

    Raises:
        FedPFTError: the run is not finished, the FM is another one, `out` is there or
            cannot be written.
    """
    if out.exists():
        raise FedPFTError(f"{out} is there already; remove it or give another --out")
    finished = FinishedRun.read(place)
    config = finished.config
    if fm_name is not None:
        config = replace(config, fm=replace(config.fm, name=shell_path(fm_name)))
        finished = replace(finished, config=config)
    tell(f"loading FM {last_part(config.fm.name)}")
    try:
        fm = _load(finished)
        dtype, model = fm.model.dtype, _with_adapter(finished, fm)
        licences = _licence_files(config.fm.name)
        origin = _origin(config.fm.name, fm, dtype, licences)
        card = render_card(finished, origin)
    except (LookupError, TypeError) as error:
        raise FedPFTError(
            f"the files of {place} lack what an export shows ({error!r}); was the run "
            "made by this version?"
        ) from error
    model.config.dtype = dtype  # a float16 FM was computed with as float32

    def write(draft: Path) -> None:
        draft.mkdir()
        tell("writing the adapter")
        _write_adapter(model, fm, origin, draft / "adapter")
        tell(f"merging, and writing the FM in {origin.dtype}")
        merged = model.merge_and_unload().to(dtype)
        merged.config.dtype = dtype
        merged.save_pretrained(draft / "merged")
        fm.processor.save_pretrained(draft / "merged")
        for path in licences:
            shutil.copyfile(path, draft / path.name)
        (draft / "README.md").write_text(card, encoding="utf-8")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        put(out, write)
    except FedPFTError:
        raise
    except Exception as error:  # tokenizers have no public class for a full disk
        raise FedPFTError(
            f"cannot write {out} ({error}); make room or give another --out"
        ) from error


def _load(run: FinishedRun) -> FoundationModel:
    """Load the FM as the run did, and make sure that it is the same."""
    config, task = run.config, task_of(run.config.data.task)
    fm = load_fm_of(config, run.manifest["labels"])
    found = tensors_hash(frozen_weights(fm.model, fm.head))
    if found != run.manifest["fm-sha256"]:
        raise FedPFTError(
            f"the FM {last_part(config.fm.name)!r} has SHA-256 {found[:16]}..., the "
            f"run had {run.manifest['fm-sha256'][:16]}...; give the run's FM by --fm"
        )
    if task.objective == "generate":
        # Rows to train on are padded on the right; who generates wants the FM's own.
        own = fm.processor.init_kwargs.get("padding_side", fm.processor.padding_side)
        fm.processor.padding_side = own
    return fm


def _with_adapter(run: FinishedRun, fm: FoundationModel) -> PeftModel:
    """Return the FM with the adapter that the run ended with."""
    plan, config = Plan.from_json(run.manifest["plan"]), run.config
    model = attach_adapter(fm.model, config.lora, fm.head, config.seed, plan.adapters)
    load_adapter(model, final_adapter(run))
    return model.eval()


def final_adapter(run: FinishedRun) -> dict[str, Tensor]:
    """Return the adapter that a run ended with.

    Raises:
        FedPFTError: it cannot be read, or is another than the run noted.
    """
    weights = run.path / "adapter" / "adapter_model.safetensors"
    try:
        adapter = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise FedPFTError(
            f"cannot read {weights} ({error}); give a run directory that is whole"
        ) from error
    if tensors_hash(adapter) != run.manifest.get("final-adapter-sha256"):
        raise FedPFTError(
            f"{weights} is not the adapter that the run ended with (manifest.json has "
            "another SHA-256, or none); give a run directory that is whole"
        )
    return adapter


def _write_adapter(
    model: PeftModel, fm: FoundationModel, origin: Origin, place: Path
) -> None:
    """Write a PEFT folder with label names and processor, and without our paths."""
    model.peft_config["default"].base_model_name_or_path = origin.name
    export_adapter(model, place)
    (place / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    fm.model.config.save_pretrained(place)
    fm.processor.save_pretrained(place)


def _origin(
    name: str, fm: FoundationModel, dtype: torch.dtype, licences: Sequence[Path]
) -> Origin:
    local = existing_path(source_of_fm(name)) is not None
    return Origin(
        name=BUNDLED_HUB_NAME if name == BUNDLED_NAME else last_part(name),
        on_hub=name == BUNDLED_NAME or not local,
        architecture=fm.architecture,
        dtype=str(dtype).removeprefix("torch."),
        licence=_licence(name),
        licence_files=tuple(path.name for path in licences),
    )


def _licence(name: str) -> Licence | None:
    """Return the licence that the FM's own card names, or None."""
    source = source_of_fm(name)
    local = existing_path(source)
    try:
        card = ModelCard.load(
            local / "README.md" if local else source, ignore_metadata_errors=True
        )
    except Exception:  # no card, no network, or YAML of any kind
        return None
    told = [card.data.get(key) for key in ("license", "license_name", "license_link")]
    identifier, called, link = (x if isinstance(x, str) and x else None for x in told)
    if called is None and identifier in (None, "other"):
        return None
    return Licence(identifier or "other", called, link)


def _licence_files(name: str) -> list[Path]:
    """Return the FM's files that say what others may do with it, sorted."""
    source = source_of_fm(name)
    place = existing_path(source)
    if place is None:
        spelt = (
            form(n) for n in _LICENCES for form in (str.lower, str.upper, str.title)
        )
        wanted = [f"{name}*" for name in spelt]
        try:
            place = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception:  # no network, and none of its files here
            return []
    return sorted(
        path
        for path in place.iterdir()
        if path.is_file() and path.name.lower().startswith(_LICENCES)
    )


def _tell(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpft-export",
        description="Write adapter, merged FM and model card of a finished run.",
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--out", type=Path, help="what to write (default: RUN/export)")
    parser.add_argument("--fm", help="where the run's FM is now, if it was moved")
    return parser
