"""Implementations of the operators in gptvq.ops; `reference` defines what the others must compute."""
