"""Measurements: `python -m bench.NAME --help`, from the project's root; result files go to bench/results."""
