"""Charts of the HTML report as inline SVG and CSS; colours are the page's variables, and text is escaped here."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 320, 180
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 24


@dataclass(frozen=True)
class Point:
    """A dot with its text, and the (least, most) to expect at its place."""

    x: float
    y: float
    text: str
    band: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    least: float
    most: float

    @classmethod
    def over(cls, values: Sequence[float], least_span: float = 1.0) -> Axis:
        """Around all finite `values`, with a margin of a twentieth."""
        finite = [v for v in values if math.isfinite(v)] or [0.0]
        low, high = min(finite), max(finite)
        margin = max((high - low) / 20, (least_span - (high - low)) / 2, 1e-9)
        return cls(low - margin, high + margin)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers inside the axis."""
        rough = (self.most - self.least) / about
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        first = math.ceil(self.least / step)
        return [i * step for i in range(first, math.floor(self.most / step) + 1)]


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis, x_name: str, y_name: str, line: float | None = None) -> str:
    """A panel of dots; their bands as a shaded strip behind them, `line` as a dashed level."""
    def at_x(value: float) -> float:
        return LEFT + (value - x.least) / (x.most - x.least) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        value = min(max(value, y.least), y.most)
        return HEIGHT - BOTTOM - (value - y.least) / (y.most - y.least) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(x, y, at_x, at_y, x_name)]
    half = (WIDTH - LEFT - RIGHT) / max(x.most - x.least, 1) / 2
    for place, (low, high) in sorted({(p.x, p.band) for p in points if p.band}):
        left, right = max(at_x(place) - half, LEFT), min(at_x(place) + half, WIDTH - RIGHT)
        parts.append(f'<rect class="band" x="{left:.2f}" y="{at_y(high):.1f}" width="{right - left + 0.05:.2f}" '
                     f'height="{max(at_y(low) - at_y(high), 0):.1f}"/>')
    if line is not None:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(line):.1f}" y2="{at_y(line):.1f}"/>')
    for p in points:
        if math.isfinite(p.y):
            kind = "dot low" if p.band and p.y < p.band[0] else "dot"
            parts.append(f'<circle class="{kind}" cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="2.6"><title>{escape(p.text)}</title></circle>')
    return _figure(title, y_name, parts)


def columns(title: str, heights: Sequence[float], level: float, x_name: str, y_name: str) -> str:
    """Bars side by side, numbered from 1, and a dashed level."""
    y = Axis(0.0, max([*heights, level]) * 1.05 or 1.0)
    x = Axis(0.5, len(heights) + 0.5)
    scale, full = (HEIGHT - TOP - BOTTOM) / y.most, (WIDTH - LEFT - RIGHT) / len(heights)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - value * scale

    parts = [_grid(x, y, lambda v: LEFT + (v - 0.5) * full, at_y, x_name, lambda v: f"{100 * v:g} %")]
    gap = min(full / 5, 2)
    for i, value in enumerate(heights):
        parts.append(f'<rect class="bar" x="{LEFT + i * full + gap / 2:.2f}" y="{at_y(value):.1f}" width="{full - gap:.2f}" '
                     f'height="{value * scale:.1f}"><title>{i + 1}: {100 * value:.2f} %</title></rect>')
    parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(level):.1f}" y2="{at_y(level):.1f}"/>')
    return _figure(title, y_name, parts)


def shares(rows: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]) -> str:
    """Bars of parts that lie one after the other: (label, text at the end, [(class, size)]); the longest fills the width."""
    longest = max((sum(size for _, size in parts) for _, _, parts in rows), default=0) or 1
    lines = []
    for label, text, parts in rows:
        pieces = "".join(f'<i class="{kind}" style="width:{100 * size / longest:.3f}%"></i>' for kind, size in parts if size)
        lines.append(f'<div class="share"><span>{escape(label)}</span><b>{pieces}</b><em>{escape(text)}</em></div>')
    return "\n".join(lines)


def _grid(x: Axis, y: Axis, at_x, at_y, x_name: str, y_text=lambda v: f"{v:g}") -> str:
    parts = []
    for value in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(value):.1f}" y2="{at_y(value):.1f}"/>'
                     f'<text x="{LEFT - 4}" y="{at_y(value) + 3.5:.1f}" text-anchor="end">{y_text(round(value, 9))}</text>')
    ticks = [v for v in x.ticks(5) if v == int(v)]
    for value in ticks:
        parts.append(f'<text x="{at_x(value):.1f}" y="{HEIGHT - BOTTOM + 12}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def _figure(title: str, y_name: str, parts: Sequence[str]) -> str:
    name = escape(f"{title}: {y_name}")
    return (f'<figure><figcaption>{escape(title)}<small>{escape(y_name)}</small></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>')
