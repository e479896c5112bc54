"""Send every training message back at once, without importing anything large."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Reply with what came."""
    return Message(message.content, reply_to=message)
