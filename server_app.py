"""FedPFT-Flower: the ServerApp, which owns the foundation model."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpft_flower.app import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federated fine-tuning."""
    serve(grid, context)
