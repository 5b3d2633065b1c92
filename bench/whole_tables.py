"""What bench.whole measured as tables and as a chart."""
from __future__ import annotations

import statistics
from pathlib import Path

from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.report import clock

from . import runner


def show(rows: list[dict]) -> str:
    """Markdown, one line per method and preset: means over the seeds, with half of the range where there are several; the least time.

    "x paper" divides by the published procedure's mean at the same preset.
    """
    lines = by_seed(rows)

    def mean(key: str, scale: float = 1, digits: int = 2, unit: str = ""):
        def text(line: list[dict]) -> str:
            values = [scale * row[key] for row in line if key in row]
            if not values:
                raise KeyError(key)
            spread = f" ± {(max(values) - min(values)) / 2:,.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):,.{digits}f}{spread}{unit}"
        return text

    def ratio(key: str):
        def text(line: list[dict]) -> str:
            paper = lines["paper", line[0]["preset"]]
            return "-" if paper is line else f"{statistics.mean(row[key] for row in line) / statistics.mean(row[key] for row in paper):.3f}"
        return text

    added = {"beside the linears": lambda line: f"+{line[0]['added_bytes'] / 1e6:.1f} MB" if line[0]["added_bytes"] else "-"}
    added = added if any(row.get("added_bytes") for row in rows) else {}
    speeds = {"tokens/s": mean("tokens_per_second", digits=0), "x dense tokens/s": mean("speedup")}
    speeds = speeds if any("speedup" in row for row in rows) else {}
    return runner.table(list(lines.values()), {
        "method": lambda line: line[0]["method"], "preset": lambda line: line[0]["preset"] or "", "format": lambda line: line[0]["format"],
        "bits per value": lambda line: f"{line[0]['bits_per_value']:.3f}",
        "layer error": mean("error_calibration", 100, unit=" %"), "held out": mean("error_heldout", 100, unit=" %"),
        "held out, x paper": ratio("error_heldout"), "perplexity": mean("text_perplexity"), "x paper": ratio("text_perplexity"),
        "second text": mean("second_perplexity"), "quantize": least_time,
        **speeds, **added})


def sizes(rows: list[dict]) -> str:
    """Markdown, one line per method and preset: what a user chooses by, the largest first; means over the seeds, and the least time."""
    lines, dense = by_seed(rows), next((row for row in rows if row["method"] == "dense" and row["operation"] == "whole"), None)
    if dense is None:
        raise ConfigError("--sizes: got no dense row of a whole model, need one; with --methods name dense too")

    def ratio(key: str):
        return lambda line: f"{statistics.mean(row[key] for row in line) / dense[key]:.2f}"

    def mean(key: str, digits: int):                        # a KeyError, which the table shows as "-", where no row has it
        return lambda line: f"{statistics.mean([row[key] for row in line if key in row] or [line[0][key]]):.{digits}f}"

    return runner.table(sorted(lines.values(), key=lambda line: -line[0]["bits_per_value"]), {
        "preset": lambda line: ", head ".join(filter(None, (line[0]["preset"] or "dense", line[0].get("head")))),
        "format": lambda line: line[0]["format"], "bits per weight": mean("bits_per_value", 3),
        "packed, MB": lambda line: f"{line[0]['linear_bytes'] / 1e6:.1f}", "perplexity": mean("text_perplexity", 2),
        "x dense": ratio("text_perplexity"), "second text, x dense": ratio("second_perplexity"),
        "tokens/s": mean("tokens_per_second", 0), "x dense tokens/s": mean("speedup", 2),
        "quantize": least_time})


def least_time(line: list[dict]) -> str:
    """To quantize, of the rows where nothing else ran; a KeyError, which the table shows as "-", where there are none."""
    return clock(min([row["quantize_seconds"] for row in line if "quantize_seconds" in row] or [line[0]["quantize_seconds"]]))


def by_seed(rows: list[dict]) -> dict[tuple[str, str | None], list[dict]]:
    """{(method, preset): the rows of its seeds}."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["preset"]), []).append(row)
    return lines


def plot(rows: list[dict], path: str) -> None:
    """Bits per value against the mean perplexity of both texts; each method's line joins what none of its own beats at no more bits."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise BackendUnavailable("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), (("text_perplexity", "text"), ("second_perplexity", "second text"))):
        dense = next((row[key] for row in rows if row["method"] == "dense"), None)
        if dense:
            axes.axhline(dense, color="black", linestyle=":", label="dense")
        for i, method in enumerate(m for m in dict.fromkeys(row["method"] for row in rows) if m != "dense"):
            points = sorted((line[0]["bits_per_value"], statistics.mean(row[key] for row in line))
                            for (made, _), line in by_seed(rows).items() if made == method and all(row[key] for row in line))
            if points:
                best = [point for n, point in enumerate(points) if all(point[1] < other[1] for other in points[:n])]
                axes.plot(*zip(*points), marker="os"[i // 10], linestyle="", color=f"C{i % 10}")
                axes.plot(*zip(*best), marker="os"[i // 10], color=f"C{i % 10}", label=method)
        axes.set(title=title, xlabel="bits per value", ylabel="perplexity", yscale="log", ylim=(0.9 * (dense or 1), 20 * (dense or 50)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    try:
        figure.savefig(Path(path), dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error})") from error
