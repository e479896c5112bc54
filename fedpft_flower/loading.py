"""Load what a run starts from: the task's rows, public rows, the FM; tell of rows."""

import logging

import numpy as np
from datasets import Dataset

from fedpft_flower.columns import alike_labels, look_like_values, texts_in_common
from fedpft_flower.config import Config
from fedpft_flower.foundation import load_fm_of
from fedpft_flower.images import check_images
from fedpft_flower.methods import method_of
from fedpft_flower.plan import Plan
from fedpft_flower.public import load_public
from fedpft_flower.server import ProxyServer
from fedpft_flower.tasks import TaskData, load_task, task_of

logger = logging.getLogger(__name__)


def load_rows(config: Config) -> tuple[TaskData, Dataset | None]:
    """Load the task's rows, and public rows where there are any.

    Raises:
        FedPFTError: they cannot be read, or do not fit the configuration.
    """
    logger.info("loading task %s", config.data.task)
    task = load_task(config.data, config.seed)
    needs_public = method_of(config).needs_public
    has_public = bool(config.data.public_path or task_of(config.data.task).public)
    needed = needs_public or has_public
    public = load_public(config.data, config.seed) if needed else None
    for split, rows in (*task.judged.items(), ("public", public)):
        if rows is not None:
            check_images(rows, split)
    return task, public if public is None else _apart(public, task)


def _apart(public: Dataset, task: TaskData) -> Dataset:
    """Leave out public rows that models are judged on, where others are left.

    Nothing should learn from them, if only from their inputs. Images are not compared.
    """
    judged = list(task.judged.values())
    texts = {"text", "text_pair"} & set(public.column_names)
    if not texts or not texts <= set(task.test.column_names):
        return public
    common = texts_in_common(public, judged)
    if not common.any():
        return public
    if common.all():
        logger.warning(
            "every public row is also one to validate or test on, so figures tell less "
            "of new rows; give another corpus in data.public-path"
        )
        return public
    logger.warning(
        "%d of %d public rows are also rows to validate or test on: left out",
        common.sum(),
        len(public),
    )
    return public.select(np.flatnonzero(~common))


def load_server(
    config: Config, task: TaskData, public: Dataset | None, plan: Plan | None = None
) -> ProxyServer:
    """Load the FM and make the server of it.

    Args:
        config: the run's.
        task: what the FM is to learn.
        public: the public corpus.
        plan: that of a run that goes on.

    Raises:
        FedPFTError: the FM cannot be loaded, or does not fit.
    """
    logger.info("loading FM %s", config.fm.name)
    fm = load_fm_of(config, task.labels)
    return ProxyServer(config, fm, task, public, plan)


_LABELS_SHOWN = 20


def tell_task(task: TaskData, config: Config) -> None:
    """Tell of the rows, and warn of what makes figures look better, or worse."""
    shown = {"train": None if config.privacy.on else task.train, **task.judged}
    for split, rows in shown.items():
        if rows is not None:
            note = task.notes.get(split, "")
            where = f" ({note})" if note not in ("", split) else ""
            logger.info("%s: %d rows%s", split, len(rows), where)
    if task.labels:
        first = ", ".join(task.labels[:_LABELS_SHOWN])
        more = ", ..." if len(task.labels) > _LABELS_SHOWN else ""
        logger.info("%d labels: %s%s", len(task.labels), first, more)
    if alike := alike_labels(task.labels):
        logger.warning(
            "labels %s differ in case or blanks alone; mend the data if they are one",
            " and ".join(map(repr, alike)),
        )
    if task.train is None or config.privacy.on:  # with noise nothing of rows is told
        return
    if look_like_values(task.labels, task.train):
        logger.warning(
            "%d labels for %d training rows; is data.label-column = %r the column of "
            "labels?",
            len(task.labels),
            len(task.train),
            config.data.label_column,
        )
    if "image" in task.test.column_names:
        return
    for split, rows in task.judged.items():
        if again := int(texts_in_common(rows, [task.train]).sum()):
            logger.warning(
                "%d of %d rows of %s have the texts of training rows, so figures on it "
                "tell less of new ones",
                again,
                len(rows),
                split,
            )
