"""Measure FedPFT-Flower; run each module by `python -m` at the root of the checkout."""
