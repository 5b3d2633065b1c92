"""bench.switches: recipes by their settings, texts side by side, a file that is added to."""
import pytest
from bench_runs import bench

from bench import runner, switches
from gptvq.config import Recipe
from gptvq.errors import ConfigError


def test_recipes_are_read():
    assert switches.recipe_of("damp=0.5,passes=1,order=sequential") == Recipe(damp=0.5, passes=1, order="sequential")
    assert switches.recipe_of("") == Recipe() and switches.recipe_of("paper") == Recipe.paper()
    for wrong, named in (("damping=1", "damping=1.*one of method"), ("damp", "NAME=VALUE"), ("damp=much", "a number"), ("passes=0", "passes must"),
                         ("passes=1.5", "a number")):
        with pytest.raises(ConfigError, match=named):
            switches.recipe_of(wrong)


def test_a_run(my_model, tmp_path, capsys):
    out, texts = tmp_path / "switches.json", [my_model.parent / name for name in ("test.txt", "calibration.txt")]
    options = ["--model", my_model, "--calibration", my_model.parent / "calibration.txt", "--texts", ",".join(map(str, texts)), "--samples", "4",
               "--sequence-length", "64", "--window", "64", "--windows", "2", "--json", out]
    assert bench(switches, *options, "--recipes", "ridge=1,passes=1", "--recipes", "passes=1") == 0
    rows = runner.load(out)["rows"]
    assert [(row["preset"], row["recipe"]) for row in rows] == [(None, "dense"), ("2d-2.25-s64", "ridge=1,passes=1"), ("2d-2.25-s64", "passes=1")]
    assert all(set(row["perplexity"]) == {"test", "calibration"} for row in rows)
    assert rows[1]["perplexity"] != rows[2]["perplexity"] and rows[0]["perplexity"]["test"] > 1
    assert bench(switches, *options, "--recipes", "passes=1", "--recipes", "compensate=0,passes=1") == 0
    again = runner.load(out)["rows"]
    assert again[:3] == rows and [row["recipe"] for row in again[3:]] == ["compensate=0,passes=1"]
    printed = capsys.readouterr().out
    assert bench(switches, "--table", out) == 0 and printed.endswith(capsys.readouterr().out)
    assert bench(switches, *options, "--windows", "1") == 1 and "windows differ" in capsys.readouterr().err
    assert bench(switches, *options, "--texts", f"{texts[0]},{texts[0]}") == 1 and "different names" in capsys.readouterr().err
    assert bench(switches, *options, "--texts", "none.txt") == 1 and "--texts: got none.txt" in capsys.readouterr().err
