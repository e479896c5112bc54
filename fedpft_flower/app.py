"""Run the ServerApp: from a configuration to a run directory."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from flwr.app import Context
from flwr.serverapp import Grid

from fedpft_flower import __version__
from fedpft_flower.checkpoint import Checkpoints, check_partitions, check_same, identity
from fedpft_flower.checks import check_run
from fedpft_flower.config import MARK, Config, FedPFTError
from fedpft_flower.encoding import content_hash
from fedpft_flower.federation import Federation, Node
from fedpft_flower.grid import CountingGrid
from fedpft_flower.ledger import Ledger
from fedpft_flower.loading import load_rows, load_server, tell_task
from fedpft_flower.plan import Plan
from fedpft_flower.privacy import Privacy
from fedpft_flower.protection import protection
from fedpft_flower.refusals import last_line
from fedpft_flower.rounds import Run
from fedpft_flower.run_directory import RunDirectory
from fedpft_flower.runs import LOG
from fedpft_flower.sampling import clients_per_round
from fedpft_flower.server import ProxyServer
from fedpft_flower.software import quiet
from fedpft_flower.store import tensors_hash
from fedpft_flower.strategies import inner_strategy
from fedpft_flower.strategy import FedPFT
from fedpft_flower.summary import manifest_of, show, summary_of
from fedpft_flower.tasks import TaskData

logger = logging.getLogger(__name__)


def serve(grid: Grid, context: Context) -> None:
    """Run a federated fine-tuning and write its results.

    Raises:
        FedPFTError: one clear line about what to mend; the run's status is failed.
    """
    _log_to_stdout()
    with ExitStack() as until_told:
        try:
            _serve(grid, context, until_told)
        except FedPFTError as error:
            logger.error("error: %s", error)
            raise FedPFTError(str(error)) from None


def _serve(grid: Grid, context: Context, until_told: ExitStack) -> None:
    config = Config.from_run_config(context.run_config)
    if config.server_threads:
        torch.set_num_threads(config.server_threads)
    check_run(config)
    directory = RunDirectory(config, context.run_id)
    until_told.enter_context(closing(directory))
    until_told.enter_context(_log_to(directory.path / LOG))
    logger.info("run directory: %s", directory.path)
    try:
        _federate(grid, config, directory)
    except FedPFTError:
        raise
    except BaseException as error:  # Flower ends runs by SystemExit
        logger.error(
            "error: %s; where the run has a checkpoint, go on with resume=%s",
            _cause(error),
            directory.path,
        )
        raise


def _cause(error: BaseException) -> str:
    """Say in one line what ended a run that nobody foresaw."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return (
            "ended from outside (flwr stop, a signal, or a SuperLink that was away, or "
            "set its clock forward, for a minute)"
        )
    line = last_line(str(error) or type(error).__name__)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return (
            f"memory ended ({line}); lower align.batch-size, "
            "align.memory-mb or plug-in.batch-size, which the server needs it for, or, "
            "where virtual clients share its GPU, fedpft-run --clients-per-gpu"
        )
    return f"{type(error).__name__}: {line}"


def _federate(grid: Grid, config: Config, directory: RunDirectory) -> None:
    counting = CountingGrid(grid, Ledger())
    checkpoints = Checkpoints(directory.path, config.checkpoint.keep)
    saved = checkpoints.load() if config.resume else None
    plan = Plan.from_json(saved.state["plan"]) if saved is not None else None
    task, public = load_rows(config)
    tell_task(task, config)
    given = saved.state["installs"] if saved is not None else {}
    federation = Federation(
        counting, config.timeout_seconds, config.wait_seconds, task.labels, given
    )
    federation.invite()  # nodes start and read their rows while the FM loads
    server = load_server(config, task, public, plan)
    splits = {
        # What a hash or a count of clients' rows tells, no noise covers.
        "train": None if config.privacy.on else task.train,
        **task.judged,
        "public": public,
    }
    hashes = _hashes(splits, server)
    own = identity(config.flat(), {**hashes, "fedpft-flower": __version__})
    if saved is not None:
        check_same(saved.state, own)
    train, begun = config.train, saved is not None and saved.round > 0
    federation.meet(train.nodes_awaited, train.min_replies if begun else None)
    if saved is not None:
        check_partitions(saved.state, federation.partitions)
    # Of nodes that were there when the run was begun, some may be gone.
    nodes = max(len(federation.nodes), train.nodes_awaited if begun else 0)
    clients = clients_per_round(train, nodes)
    inner = inner_strategy(config.strategy, config.strategy_args, clients)
    _tell_rows(federation, task, config)
    privacy = None
    if config.privacy.on:
        privacy = Privacy(config, inner, len(federation.nodes), checkpoints.note_spent)
        privacy.check_clipping(server.adapter)
        _tell_privacy(privacy, config)
    strategy = FedPFT(server, federation, inner, privacy)
    run = Run(config, directory, checkpoints, strategy, own)
    if saved is None:
        run.prepare()
    else:
        run.resume(saved)
    run.train()
    _finish(run, task, splits, hashes)


def _finish(
    run: Run,
    task: TaskData,
    splits: Mapping[str, Dataset | None],
    hashes: Mapping[str, str],
) -> None:
    """Refine the adapter, test it, and write all that a finished run has."""
    server, federation = run.strategy.server, run.strategy.federation
    run.plug_in_chosen()
    offer = federation.offer
    offer.renew(server)  # a run that was over when it was resumed has not yet
    if not offer.exposure.sent:  # nodes got it in a round that was cut short, the last
        offer.expose()
    plain, right = server.judge("test")
    hits = {"plain": right["fm"], **right}
    alike = server.likeness()  # before the FM learns to follow the sub-FM
    refinement, after = server.refine(), plain
    if refinement.get("kept"):
        after, right = server.judge("test")
        hits |= right
    summary = summary_of(run, plain, after, refinement)
    summary["more-tests"] = {}
    for name in task.more_tests:
        summary["more-tests"][name], found = server.judge(name)
        hits |= {f"{model} ({name})": right for model, right in found.items()}
    first = run.directory.rounds[0]
    summary["protection"] = protection(
        offer.exposure,
        server.metric,
        summary,
        {"before": first["public"], "after": alike} if "public" in first else {},
        hits,
        federation.grid.ledger.kinds("up"),
    )
    manifest = manifest_of(run, task, splits, hashes)
    run.directory.finish(server.fm, server.metric, summary, manifest, hits)
    show(summary, server.metric)
    logger.info("results: %s", run.directory.path)


def _tell_privacy(privacy: Privacy, config: Config) -> None:
    logger.info(
        "privacy: %d releases spend epsilon = %.3g at delta = %g",
        config.rounds,
        privacy.planned_epsilon,
        config.privacy.delta,
    )


def _tell_rows(federation: Federation, task: TaskData, config: Config) -> None:
    nodes = federation.nodes.values()
    if config.privacy.on:
        logger.info("%d nodes, their rows are not told", len(nodes))
        return
    rows = sum(node.examples for node in nodes)
    logger.info("%d nodes, %d training rows", len(nodes), rows)
    believed = [node for node in nodes if not node.partitions]
    if config.weighting == "examples" and len(believed) > 2:
        _tell_weight(max(believed, key=lambda node: node.examples), rows)
    everybody = all(node.partitions == len(nodes) for node in nodes)
    if task.train is not None and everybody and rows < len(task.train):
        logger.warning(
            "%d of %d training rows are in no partition",
            len(task.train) - rows,
            len(task.train),
        )


def _tell_weight(largest: Node, rows: int) -> None:
    if 2 * largest.examples > rows:
        logger.warning(
            "%s says that it has %d of %d rows, which is its weight in the average; "
            "if that may be wrong, set weighting = 'uniform'",
            largest.key,
            largest.examples,
            rows,
        )


def _hashes(
    splits: Mapping[str, Dataset | None], server: ProxyServer
) -> dict[str, str]:
    """Return the hashes of what a run starts from."""
    data = {
        name: content_hash(rows) for name, rows in splits.items() if rows is not None
    }
    return {
        **{f"data ({name})": content for name, content in data.items()},
        "FM": tensors_hash(server.fm_weights),
    }


def _log_to_stdout() -> None:
    """Send this package's log to standard output, where `--stream` shows it."""
    package = logging.getLogger(__package__)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
        package.addHandler(handler)
        package.propagate = False
    package.setLevel(logging.INFO)
    quiet()


class _LogFile(logging.FileHandler):
    """Write lines to a file; a full disk is told by those who write results."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Let a line go."""


@contextmanager
def _log_to(place: Path) -> Iterator[None]:
    """Keep the lines of this package in a file too, with the time."""
    handler = _LogFile(place, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger(__package__)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
