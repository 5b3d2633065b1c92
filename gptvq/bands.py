"""What to expect of a layer: the signal-to-noise ratios measured for each preset."""
from __future__ import annotations

import functools

from .config import PRESETS, VQConfig
from .spec import QuantSpec

#: method -> preset -> (least, most) SNR in dB of eight layers of SmolLM2-135M (bench/results/quality-layers*.json), rounded outwards.
BANDS: dict[str, dict[str, tuple[float, float]]] = {
    "gptvq": {
        "1d-2.125": (12.5, 18.8), "2d-2.125": (13.2, 19.2), "4d-2.125": (13.9, 19.8),
        "1d-2.25": (12.9, 19.3), "2d-2.25": (13.6, 19.8), "4d-2.25": (14.2, 20.0),
        "1d-3.125": (17.8, 24.1), "2d-3.125": (18.7, 24.6), "4d-3.125": (19.3, 25.0), "1d-4.125": (22.9, 29.1),
        "2d-4.125": (23.7, 29.3),
        "1d-2.125-s64": (12.4, 18.9), "2d-2.125-s64": (13.3, 19.7), "1d-2.25-s64": (12.6, 19.1), "2d-2.25-s64": (13.5, 20.0),
        "4d-2.125-s64": (14.1, 20.6), "4d-2.25-s64": (14.3, 20.8), "1d-3.125-s64": (18.1, 24.6), "2d-3.125-s64": (19.1, 25.5),
        "4d-3.125-s64": (19.7, 26.2), "1d-4.125-s64": (23.9, 30.3), "2d-4.125-s64": (24.8, 31.2),
    },
    "paper": {
        "1d-2.125": (8.7, 17.4), "2d-2.125": (10.0, 18.2), "4d-2.125": (13.2, 19.0),
        "1d-2.25": (11.6, 17.7), "2d-2.25": (12.5, 18.8), "4d-2.25": (13.4, 19.2),
        "1d-3.125": (10.4, 22.9), "2d-3.125": (17.8, 23.7), "4d-3.125": (18.4, 23.9), "1d-4.125": (10.7, 27.6),
        "2d-4.125": (22.4, 27.8),
        "1d-2.125-s64": (11.0, 16.9), "2d-2.125-s64": (12.3, 18.7), "1d-2.25-s64": (11.2, 17.3), "2d-2.25-s64": (12.5, 18.8),
        "4d-2.125-s64": (13.3, 19.6), "4d-2.25-s64": (13.5, 19.8), "1d-3.125-s64": (17.0, 23.5), "2d-3.125-s64": (18.3, 24.6),
        "4d-3.125-s64": (19.0, 25.3), "1d-4.125-s64": (21.1, 29.2), "2d-4.125-s64": (24.2, 30.2),
    },
}


@functools.lru_cache(maxsize=1024)
def preset_of(spec: QuantSpec) -> str | None:
    """The preset that gives a layer of this size this very format."""
    return next((label for label in PRESETS if VQConfig.preset(label).spec(spec.rows, spec.cols) == spec), None)


def expected(spec: QuantSpec, method: str) -> tuple[float, float] | None:
    """(least, most) SNR in dB to expect of a layer, or None where nothing was measured for its format."""
    return BANDS.get(method, {}).get(preset_of(spec) or "")


def larger(spec: QuantSpec) -> str | None:
    """The preset of the same dimension with one index bit more, for a layer that turned out too bad."""
    return next((label for label in PRESETS if label.startswith(f"{spec.dim}d-{spec.index_bits + 1}.125") and "-s" not in label), None)
