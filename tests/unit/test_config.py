"""Formats, presets, bits per value by hand, rules, and every refusal."""
import dataclasses
import json

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq.config import PRESETS, Recipe, VQConfig, group_shape
from gptvq.errors import ConfigError, GptvqError
from gptvq.spec import FORMATS, QuantSpec

# label: (dim, K, weights per codebook, the same with 64-column block scales)
TABLE = {"1d-2.125": (1, 4, 256, 512), "2d-2.125": (2, 16, 2048, 4096), "4d-2.125": (4, 256, 65536, 131072),
         "1d-2.25": (1, 4, 128, 256), "2d-2.25": (2, 16, 1024, 2048), "4d-2.25": (4, 256, 32768, 65536),
         "1d-3.125": (1, 8, 512, 1024), "2d-3.125": (2, 64, 8192, 16384), "4d-3.125": (4, 256, 65536, 131072),
         "1d-4.125": (1, 16, 1024, 2048), "2d-4.125": (2, 256, 32768, 65536)}
DIVISIBLE = [(4096, 4096), (11264, 4096), (4096, 11264), (1024, 1024)]


@pytest.mark.parametrize("rows, cols", DIVISIBLE)
@pytest.mark.parametrize("label", TABLE)
def test_presets_hit_their_label(label, rows, cols):
    dim, k, size, _ = TABLE[label]
    spec = VQConfig.preset(label).spec(rows, cols)
    assert (spec.dim, spec.codewords, spec.group_rows * spec.group_cols, spec.scale_block) == (dim, k, size, 0)
    assert rows % spec.group_rows == 0 and cols % spec.group_cols == 0
    assert spec.paper_bits_per_value == float(label[3:])
    want = oracle.bits_per_value(rows, cols, dim, k, spec.group_rows, spec.group_cols) + spec.signs / dim
    assert spec.bits_per_value == pytest.approx(want, 1e-12)
    assert spec.bits_per_value == pytest.approx(float(label[3:]) + 16 / size, 1e-12)


@pytest.mark.parametrize("rows, cols", DIVISIBLE)
@pytest.mark.parametrize("label", TABLE)
def test_presets_with_scales(label, rows, cols):
    dim, k, _, size = TABLE[label]
    spec = VQConfig.preset(label + "-s64").spec(rows, cols)
    assert (spec.dim, spec.codewords, spec.group_rows * spec.group_cols, spec.scale_block) == (dim, k, size, 64)
    want = oracle.bits_per_value(rows, cols, dim, k, spec.group_rows, spec.group_cols, 64) + spec.signs / dim
    assert spec.bits_per_value == pytest.approx(want, 1e-12)
    assert spec.paper_bits_per_value == pytest.approx(want - 16 / size - 32 / (rows * 64), 1e-12)
    assert abs(spec.paper_bits_per_value - float(label[3:])) <= 0.0625


def test_every_preset_is_in_the_table():
    assert set(PRESETS) == set(TABLE) | {label + "-s64" for label in TABLE}


def test_bits_per_value_of_one_spec_in_plain_numbers():
    """256 x 512, 2D K16, groups 8 x 128, scales per 32: indices, 128 codebooks of 32 bytes, their bf16, codes, (z, a)."""
    spec = QuantSpec(256, 512, 2, 2, 8, 128, 32)
    nbytes = 256 * 512 // 4 + 128 * 32 + 128 * 2 + 256 * 16 // 2 + 16 * 4
    assert spec.nbytes == nbytes == 39232
    assert spec.bits_per_value == 8 * 39232 / (256 * 512)


def test_svd_specs_count_their_factors():
    spec = QuantSpec(256, 256, 1, 3, 2, 256, 0, 4)
    assert spec.nbytes == 256 * 256 * 3 // 8 + 128 * 4 + 4 * 8 * 2 + 128 * 2
    assert spec.paper_bits_per_value == 3 + 4 * 8 / 512


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PRESETS), st.integers(1, 3000), st.integers(1, 5000))
def test_every_preset_fits_every_layer(label, rows, cols):
    spec = VQConfig.preset(label).spec(rows, cols)
    assert spec.row_groups * spec.group_rows >= rows > (spec.row_groups - 1) * spec.group_rows
    assert spec.strips * spec.group_cols >= cols > (spec.strips - 1) * spec.group_cols
    assert spec.vectors * spec.dim - cols in range(spec.dim)
    assert spec.nbytes > 0 and spec.bits_per_value >= spec.index_bits


@pytest.mark.parametrize("rows, cols", [(576, 576), (192, 576), (1536, 576), (576, 1536), (960, 2560), (896, 4864)])
@pytest.mark.parametrize("label", PRESETS)
def test_groups_suit_real_layers(label, rows, cols):
    """No ragged strip, no cut scale block, heights that tiles of 16 rows share, and about the size that was asked for."""
    config = VQConfig.preset(label)
    height, width = group_shape(config.group_size, rows, cols, config.scale_block)
    assert cols % width == 0 and width % (config.scale_block or 32) == 0 and width <= 256
    assert height in (1, 2, 4, 8) or height % 16 == 0
    assert -(-rows // height) * height - rows < 16 * -(-rows // height)
    size = min(config.group_size, rows * width)
    assert 2 / 3 <= height * width / size <= 1.75
    if size == config.group_size:
        assert config.spec(rows, cols).paper_bits_per_value <= float(label[3:].removesuffix("-s64")) + 0.05


def test_groups_where_nothing_divides():
    assert group_shape(1024, 64, 50)[1] == 52           # one strip, its width a multiple of 4
    assert group_shape(1024, 64, 1000) == (4, 256)      # a narrower last strip
    assert VQConfig.preset("2d-2.25-s64").spec(10, 96).strips == 1      # 64 does not divide 96, so no strip ends there
    assert VQConfig.preset("4d-2.25").spec(3, 8).row_groups == 1        # a group larger than the layer


# ---- JSON

CONFIGS = [VQConfig(), *(VQConfig.preset(p) for p in PRESETS), VQConfig.preset("1d-3.125", svd_rank=4, seed=3),
           VQConfig(group_rows=16, group_cols=128, rules=(("*.o_proj", None), ("*.down", "2d-4.125"), ("a*", {"dim": 1}))),
           VQConfig(recipe=Recipe.paper(em_iterations=7)),
           VQConfig(recipe=Recipe(order="sequential", damp=1, dtype="float64"))]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip_is_identity(config):
    text = json.dumps(config.to_dict())
    again = VQConfig.from_dict(json.loads(text))
    assert again == config and json.dumps(again.to_dict()) == text
    spec = config.spec(48, 96)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("values, named", [
    ({"dims": 2}, "'dims'"), ({"dim": 2, "recipe": {"pases": 1}}, "'pases'"),
    ({"rules": [["*", {"bits": 2}]]}, "'bits'"), ({"rules": [["*", {"recipe": {}}]]}, "recipe")])
def test_unknown_keys_are_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=named):
        VQConfig.from_dict(values)
    with pytest.raises(ConfigError, match="'extra'"):
        QuantSpec.from_dict({**VQConfig().spec(8, 8).to_dict(), "extra": 1})


# ---- refusals

@pytest.mark.parametrize("values, named", [
    ({"dim": 3}, "dim=3"), ({"dim": 4, "index_bits": 4}, "index_bits=4"), ({"index_bits": 8}, "index_bits=8"),
    ({"dim": 2.0}, "2.0"), ({"dim": [2]}, "dim must"), ({"scale_block": 16.0}, "16.0"),
    ({"dim": 1, "svd_rank": "2"}, "svd_rank must"),
    ({"index_bits": "2"}, "'2'"),
    ({"group_rows": 4}, "together"), ({"group_cols": 64}, "together"),
    ({"group_rows": 4, "group_cols": 33}, "multiple of dim"),
    ({"group_rows": 0, "group_cols": 32}, "group_rows must be an integer >= 1"), ({"group_rows": 1.5, "group_cols": 32}, "1.5"),
    ({"group_size": 0}, "group_size"), ({"group_size": "1024"}, "group_size"),
    ({"scale_block": 8}, "scale_block"), ({"scale_block": -16}, "scale_block"),
    ({"scale_block": 64, "group_rows": 8, "group_cols": 32}, "multiple of scale_block"),
    ({"svd_rank": 2}, "dim=1"), ({"dim": 1, "svd_rank": 4}, "svd_rank=4"), ({"dim": 1, "svd_rank": -1}, "svd_rank"),
    ({"seed": "0"}, "seed"), ({"seed": 10**23}, "seed must be an integer from"), ({"seed": True}, "seed"),
    ({"group_size": True}, "group_size"), ({"rules": (("*", "2d-9"),)}, "2d-9"), ({"rules": (("*", 5),)}, "5"),
    ({"rules": (("*", {"dim": 3}),)}, "dim=3"), ({"rules": (("*", {"group_rows": 4}),)}, "together")])
def test_contradictory_settings(values, named):
    with pytest.raises(ConfigError, match=named):
        VQConfig(**values)


@pytest.mark.parametrize("values, named", [
    ({"method": "gptq"}, "method"), ({"order": "random"}, "order"), ({"damp": 0}, "damp"), ({"damp": float("nan")}, "damp"),
    ({"damp": "0.1"}, "damp"), ({"ridge": -0.1}, "ridge"), ({"shrink": -1}, "shrink"), ({"shrink": "a"}, "shrink"), ({"ridge": float("inf")}, "ridge"), ({"em_iterations": 0}, "em_iterations"), ({"passes": 0}, "passes"),
    ({"sweeps": -1}, "sweeps"), ({"em_iterations": True}, "em_iterations must be an integer >= 1, got True"),
    ({"cg_iterations": 2.5}, "cg_iterations"), ({"block_cols": 6}, "block_cols"), ({"dtype": "float16"}, "dtype"),
    ({"compensate": -0.1}, "compensate"), ({"compensate": 1.5}, "compensate"), ({"compensate": float("nan")}, "compensate"),
    ({"method": "paper", "order": "sequential", "passes": 1, "sweeps": 0}, "compensation"), ({"compensate": "all"}, "compensate"),
    ({"method": "paper"}, "sequential"), ({"method": "paper", "order": "sequential"}, "one sequential pass")])
def test_bad_recipes(values, named):
    with pytest.raises(ConfigError, match=named):
        Recipe(**values)


@pytest.mark.parametrize("label", ["", "2d", "3d-2.25", "2d-2.25-s8", "2d-2.25-s", "2d-2.25-s64-s64", "4d-2.125-s48"])
def test_unknown_presets_list_the_known_ones(label):
    with pytest.raises(ConfigError, match="presets: 1d-2.125, "):
        VQConfig.preset(label)


def test_errors_name_the_layer():
    with pytest.raises(ConfigError, match=r"model\.7\.up \[0, 8\]: rows must be an integer >= 1 below 2..31, got 0"):
        VQConfig().spec(0, 8, "model.7.up")
    assert issubclass(ConfigError, GptvqError) and issubclass(ConfigError, ValueError)


def test_the_published_recipe():
    recipe = Recipe.paper()
    assert (recipe.damp, recipe.em_iterations, recipe.order, recipe.passes, recipe.sweeps) == (0.01, 100, "sequential", 1, 0)
    assert recipe.compensate == 0 and Recipe().compensate == 1
    assert Recipe() == Recipe("gptvq", "importance", 0.01, 0.1, 50, 8, 3, 2)


# ---- rules

SHAPES = {f"model.{i}.{n}": (64, 96) for i in range(2) for n in ("q", "o", "gate")}


def test_the_first_matching_rule_counts():
    rules = (("model.0.q", None), ("*.q", "2d-4.125"), ("*.q", None), ("*.gate", {"index_bits": 3}))
    config = VQConfig.preset("2d-2.25", rules=rules)
    specs = config.resolve(SHAPES)
    assert set(specs) == set(SHAPES) - {"model.0.q"}
    assert specs["model.1.q"] == VQConfig.preset("2d-4.125").spec(64, 96)
    assert specs["model.0.gate"] == dataclasses.replace(config, index_bits=3, rules=()).spec(64, 96)
    assert specs["model.1.o"] == VQConfig.preset("2d-2.25").spec(64, 96)


def test_rules_that_match_nothing_or_everything_are_errors():
    with pytest.raises(ConfigError, match=r"'\*\.down'.*model\.0\.q"):
        VQConfig(rules=(("*.down", None),)).resolve(SHAPES)
    with pytest.raises(ConfigError, match="6 linear layers.*excluded"):
        VQConfig(rules=(("*", None),)).resolve(SHAPES)
    with pytest.raises(ConfigError, match="0 linear layers"):
        VQConfig().resolve({})


def test_every_format_has_a_whole_number_of_bytes_per_block():
    assert {f: QuantSpec(16, 32, *f, 16, 32).block_bytes for f in FORMATS} == {
        (1, 2): 128, (1, 3): 192, (1, 4): 256, (2, 2): 128, (2, 3): 192, (2, 4): 256, (4, 2): 128, (4, 3): 192}
