"""Clip at the client how far training moved an adapter, by Flower's own mod.

It wraps the train handler alone, inside the codec's mod, so it sees float32.
"""

import logging

from flwr.app import Context, Error, Message
from flwr.clientapp.mod import fixedclipping_mod
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from fedpft_flower.codec import REFUSED, UNTOLD, ClientCall

logger = logging.getLogger(__name__)


def clipping_mod(message: Message, context: Context, call_next: ClientCall) -> Message:
    """Clip the adapter of a reply where the run says that clients do so (a mod)."""
    if context.run_config.get("privacy.mechanism") != "client":
        return call_next(message, context)
    # The run's owner promised this bound to all clients; a message cannot raise it.
    promised = context.run_config.get("privacy.clipping-norm")
    records = message.content.config_records.values()
    if [record.get(KEY_CLIPPING_NORM) for record in records] != [promised]:
        return _refusal(message, f"{KEY_CLIPPING_NORM} is not the run's {promised}")
    trained = call_next(message, context)
    if trained.has_error() or not trained.content.array_records:
        return trained  # without an adapter: the node has lost its sub-FM
    try:
        return fixedclipping_mod(message, context, lambda *_: trained)
    except ZeroDivisionError:  # Flower divides by the norm of the update
        logger.error("training did not move the adapter; raise train.lr")
        return _refusal(message, UNTOLD)  # whether it moved depends on the rows


def _refusal(message: Message, reason: str) -> Message:
    return Message(Error(REFUSED, reason), reply_to=message)
