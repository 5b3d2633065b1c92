"""Spending a budget on layers: against every possible choice, and what a configuration made of it says."""
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq import mixed
from gptvq.config import VQConfig
from gptvq.errors import ConfigError

SHAPES = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in (("q", (64, 64)), ("up", (192, 64)), ("down", (64, 192)))}


def brute_force(sizes, errors, budget):
    """The least summed error of all choices within the budget."""
    return min(sum(e[j] for e, j in zip(errors, picked)) for picked in itertools.product(*(range(len(row)) for row in sizes))
               if sum(row[j] for row, j in zip(sizes, picked)) <= budget)


layers = st.lists(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=300)
@given(layers=layers, share=st.floats(0, 1), scale=st.sampled_from([1, 7, 1000]))
def test_no_choice_within_the_budget_is_better(layers, share, scale):
    sizes, errors = ([[choice[k] * (scale if k == 0 else 1) for choice in row] for row in layers] for k in (0, 1))
    least, most = (sum(map(pick, sizes)) for pick in (min, max))
    budget = least + int(share * (most - least))
    picked = mixed.choose(sizes, errors, budget)
    assert sum(row[j] for row, j in zip(sizes, picked)) <= budget
    assert sum(e[j] for e, j in zip(errors, picked)) == pytest.approx(brute_force(sizes, errors, budget), abs=1e-12)


@settings(max_examples=200)
@given(layers=layers, share=st.floats(0, 1))
def test_with_too_many_layers_one_choice_is_lost_at_most(layers, share):
    """The greedy way: never over the budget, nothing left that would buy an improvement, at most one layer's gain from the optimum."""
    sizes, errors = ([[choice[k] for choice in row] for row in layers] for k in (0, 1))
    least, most = (sum(map(pick, sizes)) for pick in (min, max))
    budget = least + int(share * (most - least))
    picked = mixed._greedy(sizes, errors, budget)
    left, total = budget - sum(row[j] for row, j in zip(sizes, picked)), sum(e[j] for e, j in zip(errors, picked))
    assert left >= 0 and total <= brute_force(sizes, errors, budget) + max(max(e) - min(e) for e in errors) + 1e-12
    assert not any(row[k] - row[j] <= left and e[k] < e[j] for row, e, j in zip(sizes, errors, picked) for k in range(len(row)))


def test_sizes_too_many_to_count_take_the_greedy_way(monkeypatch):
    sizes, errors = [[1000, 2001, 3003], [500, 911, 1207], [10, 20, 30]], [[0.9, 0.3, 0.1], [0.5, 0.2, 0.15], [0.1, 0.05, 0.0]]
    exact = mixed.choose(sizes, errors, 4500)
    monkeypatch.setattr(mixed, "_exact", None)
    monkeypatch.setattr(mixed, "_MOST_SIZES", 10)
    assert mixed.choose(sizes, errors, 4500) == exact


def test_a_budget_below_everything_is_refused():
    with pytest.raises(ConfigError, match="got 9 bytes, need at least 10"):
        mixed.choose([[10, 20]], [[1.0, 0.5]], 9)


# ---- configurations

def made_up(choices):
    """Errors and shares: the more bits the less, and layers of block 0 suffer most."""
    return ({name: {preset: 4.0 ** -spec.index_bits for preset, spec in specs.items()} for name, specs in choices.items()},
            {name: 3.0 if ".0." in name else 1.0 for name in choices})


@pytest.mark.parametrize("bits", [2.3, 2.5, 3.0, 3.7, 4.1])
def test_the_configuration_meets_the_budget(bits):
    config = VQConfig.preset("2d-2.25", seed=3)
    choices = mixed.candidates(config, mixed.CANDIDATES[::2], SHAPES)          # all of different sizes
    budget = int(bits * sum(r * c for r, c in SHAPES.values()) / 8)
    found = mixed.within_budget(config, choices, *made_up(choices), budget)
    specs = VQConfig.from_dict(json.loads(json.dumps(found.to_dict()))).resolve(SHAPES)
    spent = sum(spec.nbytes for spec in specs.values())
    cheapest = min(b - a for options in choices.values() for a, b in itertools.pairwise(sorted(s.nbytes for s in options.values())))
    assert budget - 3 * cheapest < spent <= budget and found.seed == 3
    assert all(spec in choices[name].values() for name, spec in specs.items())
    bits_of = {i: sum(specs[name].index_bits for name in specs if f".{i}." in name) for i in range(3)}
    assert bits_of[0] >= max(bits_of[1], bits_of[2])


@pytest.mark.parametrize("dear", ["model.layers.0.q", "model.layers.2.q"])
def test_the_layer_that_the_loss_feels_gets_the_bits(dear):
    """Of layers of one size the one whose share times error is largest; layers without a share count 1."""
    shapes = {name: shape for name, shape in SHAPES.items() if name.endswith(".q")}
    choices = mixed.candidates(VQConfig(), ("2d-2.25-s64", "2d-4.125-s64"), shapes)
    low, high = (spec.nbytes for spec in choices[dear].values())
    errors = {name: {"2d-2.25-s64": 0.1, "2d-4.125-s64": 0.01} for name in shapes}
    for errors, shares in ((errors, {dear: 2.0, "model.layers.1.q": 0.5}),
                           ({**errors, "model.layers.1.q": {"2d-2.25-s64": 0.15, "2d-4.125-s64": 0.01}}, {dear: 4.0}),
                           (errors, {name: 0.5 for name in shapes if name != dear})):
        specs = mixed.within_budget(VQConfig(), choices, errors, shares, 2 * low + high).resolve(shapes)
        assert [name for name, spec in specs.items() if spec.index_bits == 4] == [dear]


def test_rules_of_the_user_stand():
    config = VQConfig.preset("2d-2.25", rules=(("*.1.up", None), ("*.2.q", "1d-4.125"), ("*.2.up", {"scale_block": 16})))
    choices = mixed.candidates(config, mixed.CANDIDATES, SHAPES)
    assert "model.layers.1.up" not in choices and list(choices["model.layers.2.q"]) == [None] and list(choices["model.layers.0.q"]) == list(mixed.CANDIDATES)
    budget = sum(max(spec.nbytes for spec in specs.values()) for specs in choices.values())
    specs = mixed.within_budget(config, choices, *made_up(choices), budget).resolve(SHAPES)
    before = config.resolve(SHAPES)
    assert set(specs) == set(before) and all(specs[name] == before[name] for name in ("model.layers.2.q", "model.layers.2.up"))
    assert all(spec.index_bits == 4 for name, spec in specs.items() if name not in ("model.layers.2.q", "model.layers.2.up"))


def test_targets_out_of_reach_name_both_limits():
    choices = mixed.candidates(VQConfig(), mixed.CANDIDATES, SHAPES)
    weights = sum(r * c for r, c in SHAPES.values())
    least, most = (sum(pick(s.nbytes for s in specs.values()) for specs in choices.values()) for pick in (min, max))
    for budget in (least - 1, most + 1):
        with pytest.raises(ConfigError) as caught:
            mixed.check_budget(choices, budget, 10**6)
        for part in (f"{budget:,} bytes", f"{least:,} bytes", f"{most:,} bytes", f"{8 * least / weights:.4f}"):
            assert part in str(caught.value)
    mixed.check_budget(choices, least, 0)
    mixed.check_budget(choices, most, 0)


def test_presets_that_fit_no_layer_are_an_error():
    with pytest.raises(ConfigError, match="unknown preset '9d-1'"):
        mixed.candidates(VQConfig(), ("2d-2.25", "9d-1"), SHAPES)
    with pytest.raises(ConfigError, match="presets: got none"):
        mixed.candidates(VQConfig(), (), SHAPES)
