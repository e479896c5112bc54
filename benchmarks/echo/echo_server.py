"""Time exchanges with all nodes, through Flower's grid and this package's, in turns."""

import json
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedpft_flower.grid import CountingGrid
from fedpft_flower.ledger import Ledger
from fedpft_flower.wire import ARRAYS, TRAIN

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Print the seconds of every exchange as one line of JSON."""
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(1.0)
    grids = {"Flower": grid, "FedPFT": CountingGrid(grid, Ledger())}
    exchange(grid, nodes)  # the first one brings the app to the nodes
    seconds: dict[str, list[float]] = {name: [] for name in grids}
    for _ in range(int(context.run_config["exchanges"])):
        for name, chosen in grids.items():
            seconds[name].append(exchange(chosen, nodes))
    print(f"seconds: {json.dumps(seconds)}", flush=True)


def exchange(grid: Grid, nodes: list[int]) -> float:
    """Send one message to every node and return the seconds until all replied."""
    content = RecordDict({ARRAYS: ArrayRecord({"x": Array(np.zeros(1))})})
    messages = [Message(content, dst_node_id=n, message_type=TRAIN) for n in nodes]
    began = time.monotonic()
    replies = list(grid.send_and_receive(messages, timeout=120.0))
    took = time.monotonic() - began
    if len(replies) != len(nodes) or any(reply.has_error() for reply in replies):
        raise RuntimeError("an echo is missing")
    return took
