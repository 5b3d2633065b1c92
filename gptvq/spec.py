"""QuantSpec: the storage format of one layer."""
from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from .errors import ConfigError

LAYOUT_VERSION = 1
TILE_ROWS, BLOCK_COLS = 16, 32
#: (dim, index bits per weight) -> index bits per vector; only formats that every backend decodes are legal.
FORMATS = {(1, 2): 2, (1, 3): 3, (1, 4): 4, (2, 2): 4, (2, 3): 6, (2, 4): 8, (4, 2): 8, (4, 3): 12}
#: Formats whose codes hold a sign for each weight of a vector, above the number of its centroid, which holds absolute values.
SIGNED = ((4, 3),)
SCALE_BLOCKS = (16, 32, 64)


@dataclass(frozen=True)
class QuantSpec:
    """Storage format of one [rows, cols] weight; every instance is legal and has a decoder.

    `group_rows` x `group_cols` weights share one codebook of int8 centroids, 2**(dim * index_bits) of them, or 256 under all changes
    of sign (dim=4, index_bits=3); the last group of a row or column may be smaller.  `scale_block` consecutive weights of a row share
    a 4-bit scale (0: no scales).
    `svd_rank` > 0 stores the 1D codebooks as a product of that rank.  `key`: the fields as text, for operators of PyTorch: at one text
    graphs of torch.compile look faster, on each call, than at eight numbers.
    """

    rows: int
    cols: int
    dim: int
    index_bits: int
    group_rows: int
    group_cols: int
    scale_block: int = 0
    svd_rank: int = 0

    def __setstate__(self, state: dict) -> None:        # pickles of older versions lack the key
        self.__dict__.update(state)
        object.__setattr__(self, "key", ",".join(map(str, self.to_dict().values())))

    def __post_init__(self):
        self.__setstate__({})
        for name, value in self.to_dict().items():
            least = 0 if name in ("scale_block", "svd_rank") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
                raise ConfigError(f"{name} must be an integer >= {least} below 2**31, got {value!r}")
        if (self.dim, self.index_bits) not in FORMATS:
            raise ConfigError(f"no kernel decodes dim={self.dim} with index_bits={self.index_bits}; legal (dim, index_bits): "
                              f"{sorted(FORMATS)}")
        if self.group_cols % self.dim:
            raise ConfigError(f"group_cols={self.group_cols} must be a multiple of dim={self.dim}: a vector may not span two groups")
        if self.scale_block and self.scale_block not in SCALE_BLOCKS:
            raise ConfigError(f"scale_block must be 0 (none) or one of {SCALE_BLOCKS}, got {self.scale_block!r}")
        if self.scale_block and self.strips > 1 and self.group_cols % self.scale_block:
            raise ConfigError(f"group_cols={self.group_cols} must be a multiple of scale_block={self.scale_block}: "
                              "a scale may not span two groups")
        if self.svd_rank and (self.dim != 1 or not 0 < self.svd_rank < self.codewords):
            raise ConfigError(f"svd_rank={self.svd_rank} needs dim=1 and a rank below the {self.codewords} centroids, got dim={self.dim}")

    # ---- derived sizes
    @property
    def signs(self) -> int:
        """Sign bits per vector: dim in the signed formats, else 0."""
        return self.dim if (self.dim, self.index_bits) in SIGNED else 0

    @property
    def codewords(self) -> int:
        """K: centroids per codebook that are stored."""
        return 1 << (self.code_bits - self.signs)

    @property
    def code_bits(self) -> int:
        """Index bits per vector: log2 K, and the signs."""
        return FORMATS[self.dim, self.index_bits]

    @property
    def least_entry(self) -> int:
        """Of a codebook.  Those of the signed formats hold absolute values of 1 to 127: kernels negate four bytes at a time."""
        return 1 if self.signs else -127

    @property
    def code_dtype(self) -> str:
        """Of unpacked codes: "uint8", or "int16" with the number of a centroid in the lowest 8 bits and the signs above."""
        return "int16" if self.signs else "uint8"

    @property
    def vectors(self) -> int:
        """Vectors per row; the last one is padded where dim does not divide cols."""
        return -(-self.cols // self.dim)

    @property
    def row_groups(self) -> int:
        return -(-self.rows // self.group_rows)

    @property
    def strips(self) -> int:
        return -(-self.cols // self.group_cols)

    @property
    def scale_blocks(self) -> int:
        """Scale blocks per row (0 without block scales)."""
        return -(-self.cols // self.scale_block) if self.scale_block else 0

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def blocks(self) -> int:
        return -(-self.cols // BLOCK_COLS)

    @property
    def block_bytes(self) -> int:
        """Bytes of indices per 16 x 32 block: 128, 192 or 256."""
        return TILE_ROWS * BLOCK_COLS // self.dim * self.code_bits // 8

    def buffer_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """{buffer name: (shape, dtype name)} of the packed form."""
        shapes = {"idx": ((self.tiles, self.blocks, self.block_bytes), "uint8")}
        if self.svd_rank:
            shapes["cb_u"] = ((self.row_groups, self.strips, self.svd_rank), "int8")
            shapes["cb_v"] = ((self.svd_rank, self.codewords), "float16")
        else:
            shapes["cb"] = ((self.row_groups, self.strips, self.dim, self.codewords), "int8")
        shapes["gs"] = ((self.row_groups, self.strips), "bfloat16")
        if self.scale_block:
            shapes["sc"] = ((self.tiles, -(-self.scale_blocks // 2), TILE_ROWS), "uint8")
            shapes["sz"] = ((self.scale_blocks, 2), "float16")
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes of all packed buffers, padding included."""
        size = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2}
        return sum(math.prod(shape) * size[dtype] for shape, dtype in self.buffer_shapes().values())

    @property
    def bits_per_value(self) -> float:
        """Stored bits per weight: indices, codebooks, their scales, block scales, and padding."""
        return 8 * self.nbytes / (self.rows * self.cols)

    @property
    def paper_bits_per_value(self) -> float:
        """The paper's count, log2(K)/d + K d 8 / l + 4 / N_s, and a bit per weight for signs, for comparison with published tables."""
        table = self.svd_rank or self.codewords * self.dim
        return (self.index_bits + table * 8 / (self.group_rows * self.group_cols)
                + (4 / self.scale_block if self.scale_block else 0))

    @property
    def form(self) -> str:
        """For instance "2D K16", or "4D +-K256" of a signed format."""
        return f"{self.dim}D {'+-' if self.signs else ''}K{self.codewords}"

    @property
    def label(self) -> str:
        """For instance "2d K16 s64"."""
        return self.form.replace("D", "d") + (f" s{self.scale_block}" if self.scale_block else "") + (
            f" svd{self.svd_rank}" if self.svd_rank else "")

    def to_dict(self) -> dict:
        # dataclasses.asdict makes deep copies, which torch.compile cannot follow on Python 3.10.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict) -> QuantSpec:
        return cls(**known_fields(cls, values))

    @classmethod
    @functools.lru_cache(maxsize=None)
    def from_key(cls, key: str) -> QuantSpec:
        """The same object for the same text."""
        try:
            return cls(*map(int, key.split(",")))
        except ConfigError:                                 # which says what is wrong with the fields
            raise
        except (TypeError, ValueError):
            raise ConfigError(f"spec: got {key!r}, need the `key` of a QuantSpec") from None


def known_fields(cls, values: dict) -> dict:
    """`values` if every key is a field of the dataclass `cls`; raises ConfigError naming the others."""
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigError(f"unknown {cls.__name__} setting {', '.join(map(repr, unknown))}; known: {', '.join(names)}")
    return values
