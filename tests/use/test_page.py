"""report.html: complete, self-contained, safe against names, and what a real browser makes of it."""
import json
import math
import re
import shutil
import statistics
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from gptvq import cli
from gptvq.bands import BANDS, expected, larger, preset_of
from gptvq.code_use import code_use, count, first_rows
from gptvq.config import PRESETS, VQConfig
from gptvq.errors import ConfigError, FormatError
from gptvq.page import block_and_kind, page, write_page
from gptvq.plots import Axis, columns, shares
from gptvq.report import Report
from gptvq.solver import LayerRecord
from gptvq.spec import QuantSpec

ROOT = Path(__file__).parents[2]
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
EVIL = "x</title><script>alert(1)</script>&\"'"


@pytest.fixture(scope="module")
def packed(my_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "out"
    words = ["quantize", my_model, out, "--calibration", my_model.parent / "calibration.txt", "--samples", 3, "--sequence-length", 64,
             "--preset", "2d-3.125", "--rule", "*.down_proj=2d-2.25"]
    assert cli.main([str(w) for w in words]) == 0
    return out


def made_up(name="tiny", layer="model.layers.0.mlp.up_proj", error=0.02, **changes):
    layers = [LayerRecord(layer, VQConfig.preset("2d-2.25").spec(64, 96), error, repair=EVIL, tokens=5),
              LayerRecord("head", QuantSpec(8, 8, 1, 2, 4, 4), 1e-9)]
    return Report(**{"model_name": name, "config": VQConfig.preset("2d-2.25"), "layers": layers, "calibration": {"source": EVIL},
                     "dense_bytes": 12288, "other_bytes": 500, "seconds": 3.0, "stages": {"solve": 1.0}, "warnings": [EVIL], **changes})


class Strict(HTMLParser):
    """Fails on tags that do not close in order; keeps the tags and the text."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_page_of_a_checkpoint_shows_every_layer(packed):
    text = (packed / "report.html").read_text()                     # `gptvq quantize` wrote it
    found, report = Strict(text), Report.load(packed)
    dots = [attrs for tag, attrs in found.tags if tag == "circle"]
    assert len(dots) == 2 * len(report.layers) == 28
    for layer in report.layers:
        assert found.words.count(layer.name) >= 3                    # two plots and the table
    for part in (f"{report.bits_per_value:.3f}", "64 centroids", "16 centroids", "No warnings", "from_pretrained", "peak memory", "solve",
                 report.calibration["sha256"]):
        assert part in found.words, part
    assert re.search(r"peak memory of the process\d+\.\d [MG]B", found.words)


def test_nothing_is_loaded_and_no_script_runs(packed):
    found = Strict((packed / "report.html").read_text())
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in found.tags}
    assert not any(name in ("src", "href", "srcset") or name.startswith("on") for _, attrs in found.tags for name in attrs)
    text = (packed / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text


def test_names_are_text():
    found = Strict(page(made_up(EVIL, EVIL), {}))
    assert "script" not in {tag for tag, _ in found.tags} and found.words.count("<script>alert(1)</script>") >= 5


@pytest.mark.parametrize("report", [made_up(layers=[]), made_up(error=math.nan), made_up(error=math.inf),
                                    made_up(stages={}, seconds=0.0, environment={}), made_up(dense_bytes=0, other_bytes=0)])
def test_odd_reports_make_a_page(report):
    Strict(page(report, {}))


def test_a_report_that_was_checked_says_so(monkeypatch):
    report = made_up()
    values = report.to_dict() | {"check": {"kl": 0.1234, "same_token": 0.5}}
    monkeypatch.setattr(Report, "to_dict", lambda self: values)
    assert "0.1234" in page(report, {}) and "50.0 %" in page(report, {})


def test_layers_below_their_band_are_named_with_a_remedy():
    text = Strict(page(made_up(error=0.06), {})).words               # 12.2 dB
    assert "1 of 2 layers lie below their band" in text and "--rule 'model.layers.0.mlp.up_proj=2d-3.125'" in text
    assert "No layer lies below" in Strict(page(made_up(error=0.03), {})).words
    report = made_up(error=0.06)
    report.layers[0].tokens = 0                                     # as an embedding, which no tokens weigh
    text = page(report, {})
    assert "lie below" not in Strict(text).words and "class='low'" not in text
    for preset, says in (("2d-2.25", "--head 2d-3.125 gives it one bit more"), ("2d-4.125", "without --head it stays dense")):
        head = LayerRecord("lm_head", VQConfig.preset(preset).spec(64, 96), 0.5, tokens=5)
        found = Strict(page(made_up(config=VQConfig.preset("2d-2.25", head=preset), layers=[head]), {}))
        assert says in found.words and "--rule '" not in found.words and f"head{preset}" in found.words


def test_write_and_refuse(packed, tmp_path, capsys):
    assert write_page(packed, tmp_path / "a.html") == tmp_path / "a.html" and [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert cli.main(["inspect", str(packed), "--html", str(tmp_path / "b.html")]) == 0 and str(tmp_path / "b.html") in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(packed, tmp_path / "absent" / "a.html")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="cannot be written"):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_page(packed, tmp_path / "full.html")
    assert not list(tmp_path.glob("full*"))
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="model.safetensors"):
        write_page(tmp_path / "copy")


def test_a_new_report_takes_the_old_page_away(tmp_path):
    (tmp_path / "report.html").write_text("of another model")
    made_up().save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "times.json"]


# ---- numbers
@pytest.mark.parametrize("spec", [QuantSpec(40, 50, 2, 2, 16, 32), QuantSpec(33, 21, 1, 3, 5, 8), QuantSpec(16, 36, 4, 2, 16, 36),
                                  QuantSpec(20, 36, 4, 3, 10, 36)])
def test_use_against_a_plain_count(spec):
    torch.manual_seed(1)
    codes = torch.randint(0, spec.codewords, (spec.rows, spec.vectors)) // 2
    signs = (torch.rand(spec.rows, spec.vectors, spec.signs) < 0.3).long()
    groups, negative = {}, {}
    for i in range(spec.rows):
        for v in range(spec.vectors):
            groups.setdefault((i // spec.group_rows, v * spec.dim // spec.group_cols), []).append(int(codes[i, v]))
            negative.setdefault((i // spec.group_rows, v * spec.dim // spec.group_cols), []).append(signs[i, v].tolist())
    shares_ = [np.bincount(g, minlength=spec.codewords) / len(g) for g in groups.values()]
    weight = np.array([len(g) for g in groups.values()]) / codes.numel()
    entropy = sum(w * -sum(p * math.log2(p) for p in s if p) for w, s in zip(weight, shares_))
    for w, each in zip(weight, negative.values()):
        entropy -= w * sum(p * math.log2(p) for share in np.mean(each, 0) for p in (share, 1 - share) if p)
    codes += (signs << torch.arange(8, 8 + spec.signs)).sum(-1)
    use = count(codes.to(getattr(torch, spec.code_dtype)), spec)
    assert use.entropy == pytest.approx(entropy, abs=1e-5) and use.bits == spec.code_bits and use.rows == spec.rows
    assert use.unused == pytest.approx(np.mean([(s == 0).mean() for s in shares_]))
    assert use.ranked == pytest.approx(sum(w * np.sort(s)[::-1] for w, s in zip(weight, shares_)).tolist(), abs=1e-6)


def test_large_layers_are_counted_in_part(packed, monkeypatch):
    whole = code_use(packed)
    monkeypatch.setattr("gptvq.code_use.VECTORS", 600)
    part = code_use(packed)
    name = "model.layers.0.mlp.up_proj"                              # 96 x 64: 512 vectors in a tile
    assert part.keys() == whole.keys() and (part[name].rows, whole[name].rows) == (16, 96)
    assert first_rows(QuantSpec(8, 4096, 2, 2, 8, 64)).rows == 8
    assert all(0 < use.entropy <= use.bits and sum(use.ranked) == pytest.approx(1, abs=1e-5) for use in whole.values())


def test_bands_are_those_of_the_result_files():
    files = ("quality-layers", "quality-layers-4d-2.125-s64", "quality-layers-signed", "quality-layers-gptvq")
    rows = [row for file in files for row in json.loads((ROOT / f"bench/results/{file}.json").read_text())["rows"]]
    latest = {(row["method"], row["preset"], row["layer"]): row for row in rows if row["method"] in BANDS and row.get("shape")}
    found = {}
    for row in latest.values():
        found.setdefault((row["method"], row["preset"]), []).append(-10 * math.log10(row["error_calibration"]))
    assert set(found) == {(method, preset) for method, presets in BANDS.items() for preset in presets} and set(BANDS["gptvq"]) == set(PRESETS)
    for (method, preset), values in found.items():
        low, high = BANDS[method][preset]
        assert len(values) == 8 and 0 <= min(values) - low <= 0.1 + 1e-9 and 0 <= high - max(values) <= 0.1 + 1e-9


def test_expectations():
    spec = VQConfig.preset("2d-2.25").spec(576, 1536)
    assert preset_of(spec) == "2d-2.25" and expected(spec, "gptvq") == BANDS["gptvq"]["2d-2.25"] and larger(spec) == "2d-3.125"
    odd = QuantSpec(8, 8, 1, 4, 4, 4)
    assert preset_of(odd) is None and expected(odd, "gptvq") is None and larger(odd) is None


@pytest.mark.parametrize("name, found", [("model.layers.3.mlp.experts.0.up_proj", (3, "mlp.experts.up_proj")), ("lm_head", (None, "lm_head")),
                                         ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")), ("0", (0, "0")), ("blocks.7", (7, "blocks.7"))])
def test_block_and_kind(name, found):
    assert block_and_kind(name) == found


def test_charts_keep_to_their_frames():
    for low, high in ((0.0, 1.0), (-3.0, 29.0), (1e-9, 2e-9), (5.0, 5.0), (-1e6, 1e6)):
        axis = Axis.over([low, high], 0)
        assert axis.least <= low <= high <= axis.most and 1 <= len(axis.ticks()) <= 10
        assert all(axis.least <= tick <= axis.most for tick in axis.ticks())
    bars = re.findall(r'<rect class="bar" [^>]*height="([\d.]+)"', columns("t", [0.5, 0.3, 0.2], 1 / 3, "x", "y"))
    assert len(bars) == 3 and float(bars[0]) / float(bars[2]) == pytest.approx(2.5, rel=0.01)
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", shares([("a", "", [("one", 3), ("two", 1)]), ("b", "", [("one", 2)])]))]
    assert widths == [75, 25, 50] and statistics.fmean(widths) == 50


# ---- a browser
def first_pixel(png: bytes) -> tuple[int, int, int]:
    """RGB of the top left corner: no filter changes it."""
    data, at = b"", 8
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at:at + 4]), png[at + 4:at + 8]
        data += png[at + 8:at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    return tuple(zlib.decompressobj().decompress(data, 4)[1:])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
@pytest.mark.parametrize("scheme, corner", [(1, (0xF7, 0xF7, 0xF5)), (0, (0x14, 0x16, 0x1A))], ids=["light", "dark"])
def test_a_browser_draws_it(packed, tmp_path, scheme, corner):
    shot = tmp_path / "shot.png"
    run = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,1400",
                          f"--user-data-dir={tmp_path}", f"--blink-settings=preferredColorScheme={scheme}",
                          *(["--force-dark-mode"] if scheme == 0 else []), f"--screenshot={shot}", (packed / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and shot.exists(), run.stderr[-2000:]
    assert first_pixel(shot.read_bytes()) == corner and len(shot.read_bytes()) > 30_000
