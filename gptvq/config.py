"""What the user asks for (VQConfig) and how a layer is solved (Recipe); what a layer gets is a spec.QuantSpec."""
from __future__ import annotations

import dataclasses
import fnmatch
import math
from dataclasses import dataclass, field

from .errors import ConfigError
from .spec import SCALE_BLOCKS, TILE_ROWS, QuantSpec, known_fields

METHODS = ("gptvq", "paper")
ORDERS = ("importance", "sequential")
TOKEN_WEIGHTS = ("", "loss")

# label -> (dim, index bits per weight, weights per codebook); method.md's table, "-sN" doubles the group and adds scales.
_PRESETS = {
    "1d-2.125": (1, 2, 256), "2d-2.125": (2, 2, 2048), "4d-2.125": (4, 2, 65536),
    "1d-2.25": (1, 2, 128), "2d-2.25": (2, 2, 1024), "4d-2.25": (4, 2, 32768),
    "1d-3.125": (1, 3, 512), "2d-3.125": (2, 3, 8192), "4d-3.125": (4, 3, 65536),
    "1d-4.125": (1, 4, 1024), "2d-4.125": (2, 4, 32768),
}
#: How the inputs of a packed linear enter the kernels: as 16-bit integers, 8-bit integers, or as they are in float32.
ACTIVATIONS = ("a16", "a8", "fp32")
PRESETS = tuple(_PRESETS) + tuple(f"{p}-s64" for p in _PRESETS)
DEFAULT_PRESET = "2d-2.25-s64"                   # smaller than the published 2d-2.25, with less error (docs/quality.md)


@dataclass(frozen=True)
class Recipe:
    """How the solver reaches a spec.  The defaults are the recipe that measured best; `method="paper"` is arXiv 2402.15319."""

    method: str = "gptvq"
    order: str = "importance"       # of the columns: by descending diag H, or "sequential" from left to right
    damp: float = 0.01              # of mean diag H, added to the diagonal
    shrink: float = 0.1             # of each input's own diag H, added to it where errors are propagated: correlations count for less
    em_iterations: int = 50
    em_starts: int = 8              # seedings tried for each codebook
    passes: int = 3                 # full quantisation passes; codebooks are fixed after the first
    sweeps: int = 2                 # coordinate-descent sweeps over all indices
    cg_iterations: int = 4          # of a codebook update; half of it between the first stage and the last
    block_cols: int = 128           # lazy-update block
    compensate: float = 1.0         # share of the quantized model's drift so far that a layer makes up for; 0: none, its own weight
    ridge: float = 0.3              # as `shrink`, where a layer makes up for drift
    token_weights: str = ""         # how much a token counts in the Hessians: all the same, or by the "loss" gradient at the outputs
    distill: int = 0                # times that the codebooks of each block learn through the calibration samples, towards the dense block's output
    dtype: str = "float32"          # of the solver's arithmetic: float32 or float64

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {METHODS}, got {self.method!r}")
        if self.order not in ORDERS:
            raise ConfigError(f"order must be one of {ORDERS}, got {self.order!r}")
        if self.dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype must be float32 or float64, got {self.dtype!r}")
        if not (isinstance(self.damp, (int, float)) and math.isfinite(self.damp) and self.damp > 0):
            raise ConfigError(f"damp must be a positive number, got {self.damp!r}")
        for name in ("shrink", "ridge"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")
        if self.token_weights not in TOKEN_WEIGHTS:
            raise ConfigError(f"token_weights must be one of {TOKEN_WEIGHTS}, got {self.token_weights!r}")
        for name, least in (("em_iterations", 1), ("em_starts", 1), ("passes", 1), ("sweeps", 0), ("cg_iterations", 0), ("block_cols", 4),
                            ("distill", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
        if not (isinstance(self.compensate, (int, float)) and 0 <= self.compensate <= 1):
            raise ConfigError(f"compensate must be a number from 0 to 1, got {self.compensate!r}")
        if self.block_cols % 4:
            raise ConfigError(f"block_cols must be a multiple of 4, got {self.block_cols}")
        if self.token_weights and not self.compensate:
            raise ConfigError(f"token_weights={self.token_weights!r} needs compensate above 0: tokens are weighed where the two models are compared")
        if self.distill and not self.compensate:
            raise ConfigError(f"distill={self.distill} needs compensate above 0: the dense model's hidden states are kept only then")
        if self.method == "paper" and (self.order, self.passes, self.sweeps, self.compensate, self.shrink) != ("sequential", 1, 0, 0, 0):
            raise ConfigError('method="paper" is one sequential pass without sweeps, compensation or shrinkage: use Recipe.paper()')

    @classmethod
    def paper(cls, **changes) -> Recipe:
        """The published procedure: damping 0.01, up to 100 EM iterations, one left-to-right pass, 25 Adam steps."""
        return cls(**{"method": "paper", "order": "sequential", "damp": 0.01, "em_iterations": 100, "em_starts": 1, "passes": 1,
                      "sweeps": 0, "compensate": 0, "shrink": 0, **changes})


@dataclass(frozen=True)
class VQConfig:
    """What the user asks for, for every linear: format, recipe and per-layer exceptions.

    `group_size` weights share one codebook; the group's rows and columns are chosen to fit each layer unless
    `group_rows` and `group_cols` are given.  `rules` is a sequence of (pattern, change): layers whose name matches the
    shell pattern take `change`, a dict of settings, a preset's name, or None to leave the layer as it is; the first match counts.
    `head` is the preset of the output head (lm_head) and of the embedding, tied or not; "" leaves them as they are.
    The fields' own defaults are the published 2d-2.25; where no configuration is given at all, DEFAULT_PRESET is used.
    """

    dim: int = 2
    index_bits: int = 2
    group_size: int = 1024
    group_rows: int | None = None
    group_cols: int | None = None
    scale_block: int = 0
    svd_rank: int = 0
    rules: tuple[tuple[str, str | dict | None], ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0                   # picks the calibration samples; the solver itself draws no random number
    head: str = ""

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple((str(p), c) for p, c in self.rules))
        if (self.group_rows is None) != (self.group_cols is None):
            raise ConfigError("group_rows and group_cols go together: give both, or neither and group_size")
        if type(self.group_size) is not int or self.group_size < 1:
            raise ConfigError(f"group_size must be a positive integer, got {self.group_size!r}")
        if type(self.seed) is not int or not -(1 << 63) <= self.seed < 1 << 64:         # what a generator takes
            raise ConfigError(f"seed must be an integer from -2^63 to 2^64 - 1, got {self.seed!r}")
        self.spec(4096, 4096)       # proves that the settings fit together
        for pattern, change in self.rules:
            if change is not None:
                self._changed(change, f"rule for {pattern!r}").spec(4096, 4096)
        if self.head:
            VQConfig.preset(self.head)

    @classmethod
    def preset(cls, label: str, method: str = "gptvq", **changes) -> VQConfig:
        """Settings of a published size, for instance "2d-2.25" or "2d-3.125-s64" (64-column block scales).

        `method="paper"` solves it by the published procedure; `changes` override single settings.
        """
        base, mark, scale = label.partition("-s")
        if base not in _PRESETS or mark and scale not in map(str, SCALE_BLOCKS):
            raise ConfigError(f"unknown preset {label!r}; presets: {', '.join(PRESETS)}")
        dim, bits, size = _PRESETS[base]
        recipe = Recipe.paper() if method == "paper" else Recipe(method=method)
        return cls(**{"dim": dim, "index_bits": bits, "group_size": size * (2 if scale else 1),
                      "scale_block": int(scale or 0), "recipe": recipe, **known_fields(cls, changes)})

    def spec(self, rows: int, cols: int, name: str = "weight") -> QuantSpec:
        """The format of one [rows, cols] layer; raises ConfigError naming it where no legal one exists."""
        try:
            if self.group_rows is not None:
                group_rows, group_cols = self.group_rows, self.group_cols
            else:
                group_rows, group_cols = group_shape(self.group_size, max(rows, 1), max(cols, 1), self.scale_block)
            return QuantSpec(rows, cols, self.dim, self.index_bits, min(group_rows, rows),
                             min(group_cols, -(-cols // 4) * 4), self.scale_block, self.svd_rank)
        except ConfigError as error:
            raise ConfigError(f"{name} [{rows}, {cols}]: {error}") from None

    def rule(self, name: str) -> tuple[str, str | dict | None] | None:
        """The first rule that matches the layer, if any."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(name, rule[0])), None)

    def resolve(self, shapes: dict[str, tuple[int, int]]) -> dict[str, QuantSpec]:
        """{layer: spec} for {layer: (rows, cols)}; layers that a rule leaves alone are absent."""
        specs = {}
        for name, (rows, cols) in shapes.items():
            change = (self.rule(name) or ("", {}))[1]
            if change is not None:
                specs[name] = self._changed(change, name).spec(rows, cols, name)
        if not specs:
            why = " and every one is excluded by a rule" if shapes else "; need a decoder-only model whose linears are not packed yet"
            raise ConfigError(f"nothing to quantize: {len(shapes)} linear layers found{why}")
        for pattern, _ in self.rules:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in shapes):
                raise ConfigError(f"rule {pattern!r} matches no layer; layers are named like {next(iter(shapes))!r}")
        return specs

    def _changed(self, change, where: str) -> VQConfig:
        if isinstance(change, str):
            return VQConfig.preset(change)
        if not isinstance(change, dict) or not set(change) <= {"dim", "index_bits", "group_size", "group_rows", "group_cols",
                                                               "scale_block", "svd_rank"}:
            raise ConfigError(f"{where}: expected a preset name, None, or a dict of format settings, got {change!r}")
        return dataclasses.replace(self, rules=(), head="", **change)

    def to_dict(self) -> dict:
        values = dataclasses.asdict(self)
        values["rules"] = [list(rule) for rule in self.rules]
        if not self.head:                   # so that a job without one is the job that it was before heads could be packed
            del values["head"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> VQConfig:
        values = dict(known_fields(cls, values))
        if "recipe" in values:
            values["recipe"] = Recipe(**known_fields(Recipe, values["recipe"]))
        if "rules" in values:
            values["rules"] = tuple(tuple(rule) for rule in values["rules"])
        return cls(**values)


def group_shape(size: int, rows: int, cols: int, scale_block: int = 0) -> tuple[int, int]:
    """(rows, columns) of the group nearest to `size` weights in a [rows, cols] layer; of equals the widest.

    Columns: a multiple of 32 up to 256 that divides `cols` and cuts no scale block; where there is none, 256 with a
    narrower last strip. Rows: powers of two up to a tile; above, whole tiles that share the layer's rows out evenly, lest
    a short last group pay for a whole codebook.
    """
    widths = [c for c in range(256, 31, -32) if cols % c == 0 and c % (scale_block or 32) == 0 and (c <= size or c == 32)]
    shapes = [(_group_height(size / c, rows), c) for c in widths or [min(256, -(-cols // 4) * 4)]]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * shape[1] / size)))


def _group_height(target: float, rows: int) -> int:
    if target < TILE_ROWS:
        return min(rows, 2 ** max(0, round(math.log2(target))))
    groups = max(1, round(rows / target))
    return min(rows, -(-rows // (groups * TILE_ROWS)) * TILE_ROWS)
