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


#: kernel and variant -> architecture, or "any" for those not named -> the configurations worth trying, the default first.
TABLE: dict[str, dict[str, list[Config]]] = {
    "vq_gemv M=1": {"any": [_config(4, R=16, C=32), _config(4, R=16, C=64), _config(8, R=16, C=128), _config(2, R=16, C=32),
                            _config(4, R=32, C=32)]},
    "vq_gemv M=2": {"any": [_config(4, R=16, C=32), _config(4, R=16, C=64), _config(2, R=16, C=16)]},
    "vq_gemv M=4": {"any": [_config(8, R=16, C=64), _config(4, R=16, C=32), _config(4, R=16, C=64)]},
    "vq_gemv M=8": {"any": [_config(8, R=16, C=64), _config(4, R=16, C=32), _config(2, R=16, C=16), _config(4, R=32, C=16)]},
    "vq_gemv 3 words M=1": {"any": [_config(4, R=16, C=64), _config(4, R=16, C=32), _config(8, R=16, C=64)]},
    "vq_gemv 3 words M=2": {"any": [_config(4, R=16, C=32), _config(8, R=16, C=64)]},
    "vq_gemv 3 words M=4": {"any": [_config(8, R=16, C=64), _config(4, R=16, C=32)]},
    "vq_gemv 3 words M=8": {"any": [_config(4, R=16, C=32), _config(8, R=16, C=32)]},
    "vq_gemm M=16": {"any": [_config(4, 3, R=32, M=16, COLS=128), _config(4, 3, R=64, M=16, COLS=64), _config(4, R=32, M=16, COLS=256)]},
    "vq_gemm M=32": {"any": [_config(4, 3, R=32, M=32, COLS=128), _config(4, 3, R=64, M=32, COLS=64)]},
    "vq_gemm M=64": {"any": [_config(4, 3, R=64, M=64, COLS=64), _config(4, 3, R=32, M=64, COLS=64), _config(8, 3, R=128, M=64, COLS=64)]},
    "vq_gemm float32 M=16": {"any": [_config(4, R=32, M=16, COLS=64)]},
    "vq_gemm float32 M=32": {"any": [_config(4, R=32, M=32, COLS=32)]},
    "vq_gemm float32 M=64": {"any": [_config(8, R=32, M=64, COLS=32)]},
    "dequantize": {"any": [_config(4, R=16, N=32), _config(4, R=16, N=64), _config(8, R=32, N=64)]},
    "decode": {"any": [_config(4, R=16, N=64)]},
    "assign": {"any": [_config(4, R=16)]},
    "column_block K<=16": {"any": [_config(4, R=16)]},
    "column_block K<=64": {"any": [_config(8, R=16)]},
    "column_block K<=256": {"any": [_config(8, R=8)]},
    "descent_block K<=16": {"any": [_config(4, R=16)]},
    "descent_block K<=64": {"any": [_config(8, R=16)]},
    "descent_block K<=256": {"any": [_config(8, R=8)]},
    "quadratic_features": {"any": [_config(4, BN=256)]},
    "em K<=16": {"sm_80": [_config(4, 1, BN=512, BM=32, BC=16)], "any": [_config(4, BN=512, BM=32, BC=16)]},
    "em K<=64": {"sm_80": [_config(8, 1, BN=512, BM=32, BC=32)], "any": [_config(4, 1, BN=512, BM=32, BC=32)]},
    "em K<=256": {"any": [_config(8, 1, BN=1024, BM=32, BC=32)]},
    "collect K<=16": {"any": [_config(4, 1, BN=64)]},
    "collect K<=64": {"any": [_config(4, 1, BN=32)]},
    "collect K<=256": {"any": [_config(8, 1, BN=32)]},
}


def candidates(name: str, arch: str) -> list[Config]:
    """Configurations of a kernel on an architecture, "sm_80" or "sm_90"; the first is the default."""
    lists = TABLE[name]
    return lists.get(arch) or lists["any"]


def default(name: str, arch: str) -> Config:
    return candidates(name, arch)[0]
