"""Deploy FedPFT-Flower; docs/deployment.md is the guide."""
