"""report.html: what a quantization run did, for people; one file that shows the same anywhere and for ever."""
from __future__ import annotations

import contextlib
import math
import os
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .bands import expected, larger, preset_of
from .code_use import CodeUse, code_use
from .errors import ConfigError
from .page_style import FRAME, STYLE
from .plots import Axis, Point, columns, scatter, shares
from .report import Report, clock, size
from .solver import LayerRecord
from .verify import own_report

PAGE = "report.html"
WORST = 8                   # layers that are named with a remedy


def write_page(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Writes the page of a checkpoint folder to `out` (default report.html in it) and returns its path.

    Raises FormatError for a damaged checkpoint and ConfigError for an unfinished one, one that transformers wrote, and where the file
    cannot be written.
    """
    folder = Path(folder)
    path = Path(out) if out is not None else folder / PAGE
    text = page(own_report(folder), code_use(folder))
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); name another file") from error
    return path


def page(report: Report, use: dict[str, CodeUse]) -> str:
    """The whole page; `use` may lack layers, whose codes are then not shown."""
    sections = [_head(report), _size(report), _errors(report), _codes(report, use), _time(report), _notes(report), _loading(),
                _table(report, use)]
    return FRAME.format(title=escape(f"{report.model_name}, quantized"), style=STYLE, body="\n".join(filter(None, sections)))


# ---- sections
def _head(report: Report) -> str:
    config = report.config
    presets = sorted({preset_of(layer.spec) or "own format" for layer in report.layers})
    before, after = report.dense_bytes + report.other_bytes, report.packed_bytes + report.other_bytes
    snr = [layer.snr_db for layer in report.layers]
    tiles = [(f"{report.bits_per_value:.3f}", "bits per quantized weight", f"before: {_dense_bits(report):.0f}"),
             (size(after), "whole model", f"before: {size(before)}"),
             (size(report.packed_bytes), "its linears", f"{report.dense_bytes / max(report.packed_bytes, 1):.2f} times smaller"),
             (f"{100 * report.mean_error:.2f} %", "mean layer error", f"median {_median(snr):.1f} dB"),
             (clock(report.seconds), "to quantize", f"{len(report.layers)} linears"),
             (str(len(report.warnings)), "warnings", f"{sum(1 for layer in report.layers if layer.repair)} layers repaired")]
    check = report.to_dict().get("check") or {}
    if "kl" in check:
        tiles.append((f"{check['kl']:.4f}", "nats from the dense model", f"same token {100 * check.get('same_token', math.nan):.1f} %"))
    text = "".join(f"<div class='tile'><b>{escape(value)}</b><span>{escape(what)}</span><small>{escape(more)}</small></div>"
                   for value, what, more in tiles)
    return (f"<h1>{escape(report.model_name)}</h1><p class='soft'>quantized by gptvq {escape(str(report.environment.get('gptvq', '')))}: "
            f"{escape(', '.join(presets))}, method {escape(config.recipe.method)}</p><div class='tiles'>{text}</div>")


def _size(report: Report) -> str:
    parts = {"idx": 0, "codebooks": 0, "scales": 0}
    for layer in report.layers:
        for name, (shape, dtype) in layer.spec.buffer_shapes().items():
            kind = {"idx": "idx", "cb": "codebooks", "cb_u": "codebooks", "cb_v": "codebooks"}.get(name, "scales")
            parts[kind] += math.prod(shape) * (2 if dtype.endswith("float16") else 1)
    dense, other = report.dense_bytes, report.other_bytes
    bars = shares([("before", size(dense + other), [("old", dense), ("rest", other)]),
                   ("now", size(sum(parts.values()) + other),
                    [("one", parts["idx"]), ("two", parts["codebooks"]), ("three", parts["scales"]), ("rest", other)])])
    key = "".join(f"<span><i class='{kind}'></i>{name} {size(count)}</span>" for kind, name, count in (
        ("old", "the linears before", dense), ("one", "indices", parts["idx"]), ("two", "codebooks", parts["codebooks"]),
        ("three", "scales", parts["scales"]),
        ("rest", "left as they were (embeddings, norms, head)", other)))
    return _section("Size", "On disk and in memory alike; every byte is counted, padding and codebooks too.",
                    f"<div class='shares'>{bars}<div class='key'>{key}</div></div>")


def _errors(report: Report) -> str:
    method = report.config.recipe.method
    bands = {layer.name: _band(layer, method) for layer in report.layers}
    level = Axis.over([layer.snr_db for layer in report.layers] + [edge for band in bands.values() if band for edge in band], 4)
    panels = _panels(report.layers, lambda layer, x: Point(
        x, layer.snr_db, f"{layer.name}: {layer.snr_db:.2f} dB, error {100 * layer.error:.3f} %", bands[layer.name]), level, "SNR, dB")
    low = sorted((layer for layer in report.layers if bands[layer.name] and layer.snr_db < bands[layer.name][0]),
                 key=lambda layer: layer.snr_db - bands[layer.name][0])
    if not any(bands.values()):
        verdict = "<p>No band is drawn: this format or method is none of the presets that were measured.</p>"
    elif not low:
        verdict = "<p>No layer lies below its band.</p>"
    else:
        lines = "".join(f"<li><code>{escape(layer.name)}</code>: {layer.snr_db:.1f} dB, expected from {bands[layer.name][0]:.1f} dB</li>"
                        for layer in low[:WORST])
        some = f", the furthest {WORST} of them" if len(low) > WORST else ""
        verdict = f"<p>{len(low)} of {len(report.layers)} layers lie below their band (red){some}:</p><ul>{lines}</ul>"
        verdict += _remedy(low[0], report)
    return _section("Error of every layer",
                    "How much of what a layer computes on the calibration text survives: signal to noise in decibels, 20 dB being an error of "
                    "1 %. Shaded: the range measured on layers of SmolLM2-135M for the same preset; a guide, not a limit.",
                    f"<div class='plots'>{panels}</div>{verdict}")


def _band(layer: LayerRecord, method: str) -> tuple[float, float] | None:
    """Without tokens, as of an embedding, no input counts more than others: the errors that were measured are not those to expect."""
    return expected(layer.spec, method) if layer.tokens else None


def _remedy(layer: LayerRecord, report: Report) -> str:
    better = larger(layer.spec)
    if report.config.head and block_and_kind(layer.name)[0] is None:        # rules are about the blocks
        more = f"<code>--head {better}</code> gives it one bit more" if better else "without <code>--head</code> it stays dense"
        return f"<p>More calibration text may help; <code>{escape(layer.name)}</code> is packed by <code>--head</code>: {more}.</p>"
    if better is None:
        return "<p>No preset of these dimensions has more bits; a rule <code>--rule 'LAYER=keep'</code> leaves one dense.</p>"
    return (f"<p>More calibration text may help; a rule such as <code>--rule '{escape(layer.name)}={better}'</code> gives a layer one "
            "bit more.</p>")


def _codes(report: Report, use: dict[str, CodeUse]) -> str:
    layers = [layer for layer in report.layers if layer.name in use]
    if not layers:
        return ""
    filled = {layer.name: 100 * use[layer.name].entropy / use[layer.name].bits for layer in layers}
    level = Axis(min(90.0, *filled.values()) - 1, 100.5)
    panels = _panels(layers, lambda layer, x: Point(
        x, filled[layer.name], f"{layer.name}: {use[layer.name].entropy:.3f} of {use[layer.name].bits} bits"), level, "% of index bits", 100.0)
    charts = []
    for bits in sorted({use[layer.name].bits for layer in layers}):
        same = [use[layer.name].ranked for layer in layers if use[layer.name].bits == bits]
        mean = [statistics.fmean(values) for values in zip(*same)]
        charts.append(columns(f"{len(mean)} centroids" + (", signs aside" if len(mean) < 1 << bits else ""), mean, 1 / len(mean), "centroid, by use", "share of vectors"))
    unused = statistics.fmean(use[layer.name].unused for layer in layers)
    cut = sum(use[layer.name].rows < layer.rows for layer in layers)
    counted = f" Of {cut} large layers only the first rows were counted." if cut else ""
    return _section("Codebooks and indices",
                    "What the indices tell: the entropy of the codes within each codebook, as a share of the bits that are stored for "
                    f"them. 100 % means that all centroids are used alike; what is missing, an entropy coder could save. "
                    f"{100 * unused:.2f} % of all centroids are taken by no vector.{counted}",
                    f"<div class='plots'>{panels}</div><h3>Use of the centroids of a codebook, the most used first; mean of the layers</h3>"
                    f"<div class='plots'>{''.join(charts)}</div>")


def _time(report: Report) -> str:
    rows = [(stage, clock(seconds), [("one", seconds)]) for stage, seconds in report.stages.items()]
    rest = report.seconds - sum(report.stages.values())
    if rows and rest > 0.005 * report.seconds:
        rows.append(("everything else", clock(rest), [("rest", rest)]))
    place = report.environment
    machine = [place.get("processor", ""), f"{place.get('cores', '')} cores", f"{place.get('threads', '')} threads", place.get("gpu", "")]
    facts = {"peak memory of the process": size(place["peak_memory"]) if place.get("peak_memory") else "not recorded",
             "machine": ", ".join(filter(None, machine)),
             "versions": ", ".join(f"{name} {place[name]}" for name in ("python", "torch", "transformers", "gptvq") if name in place)}
    bars = f"<div class='shares'>{shares(rows)}</div>" if rows else ""
    return _section("Time and memory", "Of the run that made this checkpoint.", bars + _facts(facts))


def _notes(report: Report) -> str:
    warnings = "".join(f"<li class='warning'>{escape(warning)}</li>" for warning in report.warnings) or "<li>No warnings.</li>"
    repairs = "".join(f"<li><code>{escape(layer.name)}</code>: {escape(layer.repair)}</li>" for layer in report.layers if layer.repair)
    calibration = {name.replace("_", " "): str(value) for name, value in report.calibration.items()}
    rules = "; ".join(f"{pattern} = {change or 'keep'}" for pattern, change in report.config.rules)
    recipe = ", ".join(f"{name} {value}" for name, value in report.config.to_dict()["recipe"].items())
    settings = {"rules": rules or "none", "head": report.config.head or "left as it was", "seed": str(report.config.seed), "recipe": recipe}
    return _section("Repairs and warnings", "What did not go as usual; nothing is repaired in silence.",
                    f"<ul>{warnings}{repairs or '<li>No Hessian needed a repair.</li>'}</ul>"
                    f"<h3>Calibration and settings</h3>{_facts({**calibration, **settings})}")


def _loading() -> str:
    python = ("import gptvq\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
              "model = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\ntokenizer = AutoTokenizer.from_pretrained(\"FOLDER\")")
    shell = ("gptvq chat FOLDER\ngptvq eval FOLDER --text test.txt\n"
             "gptvq export FOLDER --dense OUT        # for tools that know nothing of gptvq")
    return _section("How to load it", "FOLDER is the one that holds this file.", f"<pre>{escape(python)}</pre><pre>{escape(shell)}</pre>")


def _table(report: Report, use: dict[str, CodeUse]) -> str:
    head = ("linear", "shape", "format", "bytes", "bits/value", "error %", "SNR dB", "code entropy", "tokens", "seconds")
    rows = []
    for layer in report.layers:
        band, codes = _band(layer, report.config.recipe.method), use.get(layer.name)
        layout = preset_of(layer.spec) or layer.spec.label
        cells = (layer.name, f"{layer.rows} x {layer.cols}", layout, f"{layer.nbytes:,}", f"{layer.bits_per_value:.3f}",
                 f"{100 * layer.error:.3f}", f"{layer.snr_db:.2f}", f"{codes.entropy:.3f} / {codes.bits}" if codes else "", f"{layer.tokens:,}",
                 f"{layer.seconds:.1f}")
        low = " class='low'" if band and layer.snr_db < band[0] else ""
        rows.append(f"<tr{low}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    table = f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(rows)}</table>"
    return _section("Every layer", "", f"<details><summary>{len(rows)} linears</summary><div class='wide'>{table}</div></details>")


# ---- pieces
def _panels(layers: Sequence[LayerRecord], point, y: Axis, y_name: str, line: float | None = None) -> str:
    """A scatter plot over the blocks for each kind of linear, in the order of their first appearance."""
    kinds: dict[str, list[Point]] = {}
    for i, layer in enumerate(layers):
        block, kind = block_and_kind(layer.name)
        kinds.setdefault(kind, []).append(point(layer, float(i if block is None else block)))
    x = Axis.over([p.x for points in kinds.values() for p in points])
    return "".join(scatter(kind, points, x, y, "block", y_name, line) for kind, points in kinds.items())


def block_and_kind(name: str) -> tuple[int | None, str]:
    """"model.layers.3.mlp.experts.0.up_proj" -> (3, "mlp.experts.up_proj"): the first number in a name is its block's."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found is None:
        return None, name
    return int(found[1]), re.sub(r"(^|\.)\d+(?=\.|$)", "", name[found.end():]) or name


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{body}</section>"


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return f"<div class='wide' style='margin-top:12px'><table class='facts'>{rows}</table></div>"


def _dense_bits(report: Report) -> float:
    return 8 * report.dense_bytes / report.weights if report.weights else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
