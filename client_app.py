"""FedPFT-Flower: the ClientApp, which owns the data.

In deployment every message runs in a new process, so each handler imports its module
itself: a node that introduces itself waits for neither PyTorch models nor PEFT.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpft_flower.mods import clipping_mod, codec_mod

app = ClientApp(mods=[codec_mod])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Introduce this node."""
    from fedpft_flower import node

    return node.hello(message, context)


@app.query("install")
def install(message: Message, context: Context) -> Message:
    """Install the sub-FM."""
    from fedpft_flower import install

    return install.install(message, context)


@app.train(mods=[clipping_mod])
def train(message: Message, context: Context) -> Message:
    """Train the adapter on this node's rows."""
    from fedpft_flower import client

    return client.train(message, context)
