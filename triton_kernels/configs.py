"""Launch configurations: block sizes, warps and stages of every kernel, as data."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Block sizes by the names of the kernel's parameters; warps of a program; stages of software pipelines."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks)
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}"


def _config(num_warps: int, num_stages: int = 2, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), num_warps, num_stages)


#: kernel and variant -> the configurations worth trying, the default first.  Architectures that a name does not mention share one list.
TABLE: dict[str, dict[str, list[Config]]] = {
    "vq_gemv M=1": {"any": [_config(4, R=16, C=64), _config(8, R=16, C=128), _config(4, R=16, C=32), _config(2, R=16, C=32),
                            _config(4, R=32, C=32)]},
    "vq_gemv M=2": {"any": [_config(4, R=16, C=64), _config(4, R=16, C=32), _config(2, R=16, C=16)]},
    "vq_gemv M=4": {"any": [_config(4, R=16, C=32), _config(2, R=16, C=16), _config(4, R=32, C=16)]},
    "vq_gemv M=8": {"any": [_config(4, R=16, C=32), _config(2, R=16, C=16), _config(4, R=32, C=16)]},
    "vq_gemm M=16": {"any": [_config(4, 3, R=32, M=16, COLS=128), _config(4, 3, R=64, M=16, COLS=64), _config(4, 2, R=32, M=16, COLS=256)]},
    "vq_gemm M=32": {"any": [_config(4, 3, R=32, M=32, COLS=128), _config(4, 3, R=64, M=32, COLS=64)]},
    "vq_gemm M=64": {"any": [_config(4, 3, R=64, M=64, COLS=64), _config(4, 3, R=32, M=64, COLS=64), _config(8, 3, R=128, M=64, COLS=64)]},
    "dequantize": {"any": [_config(4, R=16, N=32), _config(4, R=16, N=64), _config(8, R=32, N=64)]},
    "decode": {"any": [_config(4, R=16, N=64)]},
    "assign": {"any": [_config(4, R=16)]},
    "column_block K<=16": {"any": [_config(4, R=32), _config(4, R=16), _config(8, R=32)]},
    "column_block K<=256": {"any": [_config(4, R=16), _config(8, R=16), _config(8, R=32)]},
    "descent_block K<=16": {"any": [_config(4, R=32), _config(4, R=16), _config(8, R=32)]},
    "descent_block K<=256": {"any": [_config(4, R=16), _config(8, R=16), _config(8, R=32)]},
    "quadratic_features": {"any": [_config(4, BN=256)]},
    "em K<=16": {"any": [_config(4, BN=512, BM=128), _config(4, BN=256, BM=64), _config(8, BN=1024, BM=128)]},
    "em K<=64": {"any": [_config(4, BN=512, BM=64), _config(8, BN=1024, BM=64)]},
    "em K<=256": {"any": [_config(8, BN=1024, BM=32), _config(8, BN=1024, BM=64)]},
    "collect K<=16": {"any": [_config(4, BN=128)]},
    "collect K<=64": {"any": [_config(4, BN=64)]},
    "collect K<=256": {"any": [_config(8, BN=32)]},
}


def candidates(name: str, arch: str) -> list[Config]:
    """Configurations of a kernel on an architecture, "sm_80" or "sm_90"; the first is the default."""
    lists = TABLE[name]
    return lists.get(arch) or lists["any"]


def default(name: str, arch: str) -> Config:
    return candidates(name, arch)[0]
