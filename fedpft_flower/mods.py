"""Wrap a ClientApp's handlers: its adapter's codec outermost, clipping around training.

What these need is imported where it is needed: before its first message a node, and
Flower's simulation before it starts Ray, load this.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp.mod import fixedclipping_mod
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from fedpft_flower.refusals import UNTOLD, refusal

logger = logging.getLogger(__name__)

ClientCall = Callable[[Message, Context], Message]


def codec_of(message: Message) -> str:
    """Return the codec that a message says its adapter travels in."""
    if message.has_error():
        return "fp32"
    for record in message.content.config_records.values():
        if "codec" in record:
            return str(record["codec"])
    return "fp32"


def codec_mod(message: Message, context: Context, call_next: ClientCall) -> Message:
    """Decode an adapter before the handler, and encode that of its reply (a mod)."""
    codec = codec_of(message)
    if codec == "fp32":
        return call_next(message, context)
    from fedpft_flower.codec import decode_arrays, encode_arrays, recode

    try:
        message.content = recode(message.content, codec, decode_arrays)
    except Exception as error:  # a hostile message may raise anything
        reason = f"the received adapter cannot be decoded ({error}); mend the server"
        return refusal(message, reason)
    reply = call_next(message, context)
    if not reply.has_error():
        reply.content = recode(reply.content, codec, encode_arrays)
    return reply


def clipping_mod(message: Message, context: Context, call_next: ClientCall) -> Message:
    """Clip the adapter of a reply where the run says that clients do so (a mod).

    Flower's own mod does it. Within the codec's it sees float32.
    """
    if context.run_config.get("privacy.mechanism") != "client":
        return call_next(message, context)
    # The run's owner promised this bound to all clients; a message cannot raise it.
    promised = context.run_config.get("privacy.clipping-norm")
    records = message.content.config_records.values()
    if [record.get(KEY_CLIPPING_NORM) for record in records] != [promised]:
        return refusal(message, f"{KEY_CLIPPING_NORM} is not the run's {promised}")
    trained = call_next(message, context)
    if trained.has_error() or not trained.content.array_records:
        return trained  # without an adapter: the node has lost its sub-FM
    try:
        return fixedclipping_mod(message, context, lambda *_: trained)
    except ZeroDivisionError:  # Flower divides by the norm of the update
        logger.error("training did not move the adapter; raise train.lr")
        return refusal(message, UNTOLD)  # whether it moved depends on the rows
