"""The CUDA kernels that solve: codebooks, a block of columns, coordinate descent."""
from .reference import column_block, descent_block, fit  # noqa: F401
