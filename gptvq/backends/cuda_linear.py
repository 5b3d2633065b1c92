"""y = W x by CUDA kernels that read the packed weight."""
from .reference import linear, prepare_linear  # noqa: F401
