"""Refuse a message at a node, in one line, read why one was refused, tell of others."""

import functools
import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message

from fedpft_flower.config import FedPFTError, OwnRowsError, one_line

logger = logging.getLogger(__name__)

REFUSED = 2  # Flower's error code for a ClientApp that raised; its reason says more
_EXPIRED = {3, 4}  # its codes for a message and a reply that lived too long
# With differential privacy, where a reason may quote a row or tell of one.
UNTOLD = "this node cannot take part; with privacy.mechanism only its own log says why"

Handler = Callable[[Message, Context], Message]


def refusal(message: Message, reason: str) -> Message:
    """Return the reply that refuses a message, with the reason as one line."""
    return Message(Error(REFUSED, one_line(reason)), reply_to=message)


def last_line(reason: str | None) -> str:
    """Return the last line of an error's reason, which may be a whole traceback."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "unknown error"


def one_line_errors(handler: Handler) -> Handler:
    """Reply with one clear line where the user can mend what went wrong."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        told = ""  # where it is not the whole reason
        try:
            return handler(message, context)
        except FedPFTError as error:
            reason = str(error)
            if isinstance(error, OwnRowsError) and "data-path" in context.node_config:
                told = error.told
        except Exception as error:  # a hostile message may raise anything
            logger.exception("a message could not be handled")
            kind, name = message.metadata.message_type, type(error).__name__
            cannot = f"a {kind} message cannot be handled ({name}"
            reason = f"{cannot}: {last_line(str(error))}); see this node's log"
            if "data-path" in context.node_config:  # it may quote a row
                told = f"{cannot}); see this node's log"
        logger.error("%s", one_line(reason))
        if context.run_config.get("privacy.mechanism", "none") != "none":
            told = UNTOLD
        site, told = context.node_config.get("site"), told or reason
        return refusal(message, f"{site}: {told}" if site else told)

    return handle


def tell(context: Context, text: str, *values: object) -> None:
    """Say in this node's own log what it did, if its rows are its own.

    Virtual clients do not: a machine has many, and the run tells of each of them.
    """
    if "data-path" in context.node_config:
        # Its logger has a handler in every process that Flower starts.
        logging.getLogger("flwr").info(text, *values)


def is_silence(reply: Message) -> bool:
    """Tell whether a reply is Flower's word that none came from the node."""
    return reply.has_error() and reply.error.code in _EXPIRED


def reason_of(reply: Message, name: str) -> str:
    """Return in one line why a reply is an error.

    Args:
        reply: an error.
        name: of its node, which may say it itself.
    """
    if is_silence(reply):
        return (
            "no reply in time (timeout-seconds), or the node is gone, or its reply was "
            "lost on the way"
        )
    return last_line(reply.error.reason).removeprefix(f"{name}: ")
