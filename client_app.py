"""FedPFT-Flower: the ClientApp, which owns the data."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpft_flower import client
from fedpft_flower.codec import codec_mod

app = ClientApp(mods=[codec_mod])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Introduce this node."""
    return client.hello(message, context)


@app.query("install")
def install(message: Message, context: Context) -> Message:
    """Install the sub-FM."""
    return client.install(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter on this node's rows."""
    return client.train(message, context)
