"""Write the model card of an export: data, method, metrics, protection, licence."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from fedpft_flower.architectures import AUTO_PROCESSORS, Architecture, model_class_of
from fedpft_flower.config import Objective, TrainConfig, names_in
from fedpft_flower.methods import METHODS, name_of
from fedpft_flower.metrics import METRICS, metric_of
from fedpft_flower.plan import Plan
from fedpft_flower.runs import FinishedRun
from fedpft_flower.tasks import task_of
from fedpft_flower.wording import (
    count_nodes,
    data_name,
    last_part,
    percent,
    shown_settings,
    which_adapter,
)

# How the hub calls what an exported model does.
_PIPELINES = {
    ("text", "classify"): "text-classification",
    ("image", "classify"): "image-classification",
    ("text", "generate"): "text-generation",
}


@dataclass(frozen=True)
class Licence:
    """Name a licence as a model card's front matter does."""

    identifier: str  # the hub's, or "other"
    name: str | None = None
    link: str | None = None


_UNKNOWN = Licence("other", "unknown")


@dataclass(frozen=True)
class Origin:
    """Say what is known of the FM that an export is made of."""

    name: str  # a hub name, or the last part of a directory's path
    on_hub: bool
    architecture: Architecture
    dtype: str  # of the merged weights
    licence: Licence | None  # as its own card names it
    licence_files: tuple[str, ...] = ()  # names of the files beside this card


def render_card(run: FinishedRun, origin: Origin) -> str:
    """Return the model card of an export: YAML front matter, then Markdown.

    No path of this machine is in it, and no name of a node.
    """
    sections = [
        f"---\n{_front_matter(run, origin).to_yaml()}\n---",
        f"# {_title(run, origin)}",
        _introduction(run, origin),
        _loading(run, origin),
        _training(run),
        _data(run),
        _metrics(run),
        _protection(run),
        _limits(run, origin),
        _licence(origin),
    ]
    return "\n\n".join(sections) + "\n"


def _title(run: FinishedRun, origin: Origin) -> str:
    return _plain(f"{origin.name} on {data_name(run.config.flat())}")


def _front_matter(run: FinishedRun, origin: Origin) -> ModelCardData:
    task, licence = task_of(run.config.data.task), origin.licence or _UNKNOWN
    pipeline = _PIPELINES[task.modality, task.objective]
    data, after = data_name(run.config.flat()), run.summary["test-after"]
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=data,
            dataset_name=data,
            dataset_split=run.manifest["splits"]["test"]["source"] or "test",
            metric_type=name,
            metric_value=after[f"fm-{name}"],
        )
        for name in _metric_names(run)
    ]
    return ModelCardData(
        license=licence.identifier,
        license_name=licence.name,
        license_link=licence.link,
        base_model=origin.name,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["peft", "lora", "federated-learning", "fedpft", run.config.method],
        metrics=_metric_names(run),
        model_name=_title(run, origin),
        eval_results=results,
    )


def _metric_names(run: FinishedRun) -> list[str]:
    """Return the metrics of the task; first the one that the run is judged by."""
    objective: Objective = task_of(run.config.data.task).objective
    first = metric_of(run.config.data)
    return [first, *(name for name in METRICS[objective] if name != first)]


def _introduction(run: FinishedRun, origin: Origin) -> str:
    known = "" if origin.on_hub else f" (SHA-256 `{run.manifest['fm-sha256']}`)"
    labels = ", ".join(map(_plain, run.manifest["labels"]))
    whole = Plan.from_json(run.manifest["plan"]).is_whole
    trained = "it" if whole else "a smaller model, which was plugged into the whole one"
    return (
        f"`{origin.name}`{known}, fine-tuned in a federation by FedPFT-Flower (FedPFT: "
        f"arXiv 2404.11536): clients trained an adapter on {trained}.\n\n"
        "- `adapter/`: the adapter alone, in PEFT's format\n"
        f"- `merged/`: the whole model with the adapter merged, {origin.dtype}"
        + (f"\n\nLabels, in order: {labels}." if labels else "")
    )


def _loading(run: FinishedRun, origin: Origin) -> str:
    config, task = run.config, task_of(run.config.data.task)
    model = model_class_of(origin.architecture, task.objective).__name__
    image = task.modality == "image"
    processor = AUTO_PROCESSORS[task.modality].__name__
    told = "" if origin.on_hub else "  # or where it is"
    labels = run.manifest["labels"]
    lines = [
        "## Use",
        "```python",
        f"from transformers import {model}, {processor}",
        "",
        f'model = {model}.from_pretrained("merged")',
        f'processor = {processor}.from_pretrained("merged")',
        "```",
        *(["The processor needs Pillow.", ""] if image else []),
        "or, with the model that the adapter belongs to,",
        "```python",
        "from peft import PeftModel",
        f"from transformers import AutoConfig, {model}",
        "",
        'config = AutoConfig.from_pretrained("adapter")',
        f"base = {model}.from_pretrained(",
        f'    "{origin.name}",{told}',
        "    config=config,",
        # A classifier's own head of another size is replaced by the adapter's.
        *(["    ignore_mismatched_sizes=True,"] if labels else []),
        ")",
        'model = PeftModel.from_pretrained(base, "adapter")',
        "```",
    ]
    if not image:
        most = config.data.max_length
        lines.append(f"It was trained on at most {most} tokens of a text.")
    if task.objective == "generate" and len(names_in(config.data.text_columns)) > 1:
        template = config.data.prompt_template
        shown = (
            "by the tokenizer's chat template"
            if template == "chat"
            else f"as `{template!r}`"
        )
        lines.append(f"Prompts were put {shown}; the end token ends a response.")
    return "\n".join(lines)


def _training(run: FinishedRun) -> str:
    config, plan = run.config, Plan.from_json(run.manifest["plan"])
    nodes, lora = run.manifest["nodes"], run.config.lora
    kept = (
        "the whole model"
        if plan.is_whole
        else f"{plan.told}; {percent(run.summary['share-withheld'])} of the model's "
        "weights were never sent"
    )
    rows = [
        ("method", f"{name_of(config)} ({METHODS[config.method].paper})"),
        ("clients had", kept),
        ("aggregation", config.strategy),
        ("rounds", run.summary["rounds"]),
        ("adapter of", which_adapter(run.summary)),
        ("clients", count_nodes(nodes)),
        ("LoRA", f"r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout}"),
        ("learning rate", _told_lr(config.train)),
        ("refined without labels", _yes(run.summary["refinement"].get("kept", False))),
        ("seed", config.seed),
        ("fedpft-flower", run.manifest["versions"]["fedpft-flower"]),
    ]
    return f"## Training\n\n{_table(['what', 'value'], rows)}"


def _data(run: FinishedRun) -> str:
    settings = shown_settings(run.config.flat())
    splits = [
        (name, split["rows"], split["source"], f"`{split['sha256']}`")
        for name, split in run.manifest["splits"].items()
    ]
    told = [f"Task `{settings['data.task']}`, data `{data_name(settings)}`."]
    if path := last_part(str(settings["data.public-path"])):
        told.append(f"Public data, unlabelled: `{path}`.")
    refined = run.summary["refinement"]
    share = refined.get("validation-share", 0.0) if refined.get("kept") else 0.0
    seen = f", whose inputs are {percent(share)} of what it was refined on" * bool(
        share
    )
    told.append(f"Choices were made on validation{seen}; test was only reported.")
    table = _table(["split", "rows", "from", "SHA-256"], splits)
    return f"## Data\n\n{' '.join(told)}\n\n{table}"


def _metrics(run: FinishedRun) -> str:
    summary, names = run.summary, [*_metric_names(run), "loss"]
    rows = [
        ("before", "test", summary["test-before"]),
        ("this model", "test", summary["test-after"]),
        *(("this model", name, found) for name, found in summary["more-tests"].items()),
    ]
    table = _table(
        ["model", "split", *names],
        [
            (model, split, *(f"{found[f'fm-{name}']:.4g}" for name in names))
            for model, split, found in rows
        ],
    )
    return f"## Metrics\n\n{table}"


def _protection(run: FinishedRun) -> str:
    sheet = run.summary["protection"]["rows"]
    rows = [(row["name"], row["value"], row["note"]) for row in sheet]
    parts = ["## Protection sheet", _table(["what", "value", "note"], rows)]
    if privacy := run.summary.get("privacy"):
        told = ", ".join(f"{name} {value}" for name, value in privacy.items())
        parts.append(f"Differential privacy: {_plain(told)}.")
    return "\n\n".join(parts)


def _limits(run: FinishedRun, origin: Origin) -> str:
    rounded = (
        ""
        if origin.dtype == "float32"
        else f" `merged/` is rounded to {origin.dtype}, so its answers differ a little "
        "from those of the adapter in the model, which the metrics are of."
    )
    private = (
        ""
        if run.summary.get("privacy")
        else " No differential privacy was used: the adapter can leak information on "
        "the rows that it was trained on."
    )
    return (
        "## Intended use and limits\n\n"
        "For inputs like those of the data above. Nothing is known of others, nor of "
        f"bias; what holds of `{origin.name}` holds here too.{private}{rounded}"
    )


def _licence(origin: Origin) -> str:
    files = ", ".join(f"`{name}`" for name in origin.licence_files)
    beside = f" Its files: {files}." if files else ""
    licence = origin.licence
    link = f" ({_plain(licence.link)})" if licence and licence.link else ""
    told = (
        f"The licence of `{origin.name}` is "
        f"`{_plain(licence.name or licence.identifier)}`{link}, as its own model card "
        "says; it covers `merged/`, which contains that model."
        if licence
        else f"The licence of `{origin.name}` is not known here: check it before you "
        "pass anything on; `merged/` contains that model."
    )
    return f"## Licence\n\n{told}{beside}"


def _told_lr(train: TrainConfig) -> str:
    warmup = f"warm-up {percent(train.warmup_ratio)} of the rounds, "
    return f"{train.lr}, {warmup if train.warmup_ratio else ''}decay {train.lr_decay}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        f"| {' | '.join(_plain(str(cell)) for cell in line)} |" for line in lines
    )


def _plain(text: str) -> str:
    """Return text that ends no cell, no line, and opens no element."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
