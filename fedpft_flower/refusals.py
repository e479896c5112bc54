"""Refuse a message at a node, in one line."""

from flwr.app import Error, Message

from fedpft_flower.config import one_line

REFUSED = 2  # Flower's error code for a ClientApp that raised; its reason says more
# With differential privacy, where a reason may quote a row or tell of one.
UNTOLD = "this node cannot take part; with privacy.mechanism only its own log says why"


def refusal(message: Message, reason: str) -> Message:
    """Return the reply that refuses a message, with the reason as one line."""
    return Message(Error(REFUSED, one_line(reason)), reply_to=message)
