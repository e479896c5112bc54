"""Keep the sub-FM that a server sends."""

from flwr.app import ConfigRecord, Context, Message

from fedpft_flower.config import FedPFTError
from fedpft_flower.delta import apply_delta
from fedpft_flower.ledger import message_bytes
from fedpft_flower.refusals import one_line_errors, tell
from fedpft_flower.store import Store
from fedpft_flower.wire import (
    CONFIG,
    PACKAGE,
    arrays_of,
    config_of,
    reply,
    unpack_tensors,
)

MAX_INSTALL_MB = 20_000  # of a node that does not say otherwise


def largest_install(context: Context) -> float:
    """Return how large an install this node takes, in MB.

    Raises:
        FedPFTError: its config says no size.
    """
    said = context.node_config.get("max-install-mb", MAX_INSTALL_MB)
    if isinstance(said, str) or not said > 0:  # also true for NaN
        raise FedPFTError(
            f"this node's config has max-install-mb = {said!r}; give megabytes"
        )
    return float(said)


@one_line_errors
def install(message: Message, context: Context) -> Message:
    """Keep a sub-FM on disk: a whole one, or the changes of one that is there."""
    most, size = largest_install(context), sum(message_bytes(message).values())
    if size > most * 1e6:
        raise FedPFTError(
            f"the sub-FM has {size / 1e6:.0f} MB, this node takes max-install-mb = "
            f"{most:g}; raise it in the node's config, or let the server keep less"
        )
    request, store = config_of(message), Store()
    wanted, base = request["sub-fm"], request["base"]
    received = unpack_tensors(arrays_of(message), request["bit-cast"])
    text, installed = request[PACKAGE], True
    if base:
        held = store.get(base)
        installed = held is not None
        if held is not None:
            received, text = apply_delta(held[0], received), held[1]
    if installed:
        store.put(wanted, received, text)
        what = "changes of the sub-FM" if base else "the sub-FM"
        tell(context, "run %d: installed %s, %.1f MB", context.run_id, what, size / 1e6)
    return reply(message, {CONFIG: ConfigRecord({"installed": installed})})
