"""What scripts/demo --refresh draws: KL against size, and which bits each layer got. One SVG, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# A colour-blind safe scale from few bits (dark, hurts) to many (light).
BIT_COLOURS = {2: "#3b0f70", 3: "#8c2981", 4: "#de4968", 5: "#fb8861", 6: "#fec287", 8: "#fcfdbf"}
INK, GREY, UNIFORM, MIX = "#1a1a1a", "#8a8a8a", "#4c72b0", "#c44e00"
WIDTH, HEIGHT = 1080, 430


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(words)}</text>'


@dataclass(frozen=True)
class Point:
    """One build: bits per weight, KL and its standard error, and whether a search found it."""

    label: str
    bpw: float
    kl: float
    error: float
    found: bool


def draw_frontier(points: Sequence[Point]) -> list[str]:
    """KL (logarithmic) against bits per weight."""
    left, right, top, bottom = 70.0, 500.0, 60.0, 370.0
    low = math.floor(math.log10(min(point.kl - point.error for point in points)) * 4) / 4
    high = math.ceil(math.log10(max(point.kl + point.error for point in points)) * 4) / 4
    first = math.floor(2 * min(point.bpw for point in points)) / 2
    last = math.ceil(2 * max(point.bpw for point in points)) / 2

    def x(bpw: float) -> float:
        return left + (bpw - first) / (last - first) * (right - left)

    def y(kl: float) -> float:
        return bottom - (math.log10(kl) - low) / (high - low) * (bottom - top)

    out = [
        text(left, 28, "KL(base || build) against size", 15),
        text(left, 45, "nats per token, log scale", 11, colour=GREY),
    ]
    for value in (factor * 10.0**exponent for exponent in range(-4, 2) for factor in (1, 2, 3, 5)):
        if low <= math.log10(value) <= high:
            out.append(f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e4e4e4"/>')
            out.append(text(left - 8, y(value) + 4, f"{value:g}", 11, "end", GREY))
    for half in range(round(2 * first), round(2 * last) + 1):
        out.append(text(x(half / 2), bottom + 18, f"{half / 2:g}", 11, "middle", GREY))
    out.append(text((left + right) / 2, bottom + 38, "bits per weight over quantized modules", 12, "middle"))
    under = 0.0  # where the last label ends
    for point in sorted(points, key=lambda point: -point.kl):
        colour, across, up = (MIX if point.found else UNIFORM), x(point.bpw), y(point.kl)
        span = f'y1="{y(max(point.kl - point.error, 10**low)):.1f}" y2="{y(point.kl + point.error):.1f}"'
        out.append(f'<line x1="{across:.1f}" x2="{across:.1f}" {span} stroke="{colour}" stroke-width="1.5"/>')
        out.append(
            f'<path d="M {across:.1f} {up - 7:.1f} l 7 7 l -7 7 l -7 -7 z" fill="{colour}"/>'
            if point.found
            else f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5" fill="{colour}"/>'
        )
        at = (across + 11, "start") if point.bpw < (first + last) / 2 else (across - 11, "end")
        under = max(up + 4, under + 14)
        out.append(text(at[0], under, f"{point.label}: {point.kl:.3f}", 11, at[1], colour))
    return out


def draw_bits(title: str, bits: Mapping[tuple[int, str], int]) -> list[str]:
    """How many bits each kind of module got in each layer."""
    left, top, cell = 640.0, 60.0, 13.0  # a cell's width
    out = [text(560, 28, f"Where the bits of {title} went", 15), text(560, 45, "one column a layer", 11, colour=GREY)]
    kinds = list(dict.fromkeys(kind for _, kind in bits))
    layers = sorted({layer for layer, _ in bits})
    height = min(44.0, 250.0 / len(kinds))
    for row, kind in enumerate(kinds):
        y = top + row * (height + 4)
        out.append(text(left - 8, y + height / 2 + 4, kind, 11, "end", GREY))
        for layer in layers:
            value = bits.get((layer, kind))
            if value is not None:
                out.append(
                    f'<rect x="{left + layer * cell:.1f}" y="{y:.1f}" width="{cell - 1}" height="{height:.1f}" '
                    f'fill="{BIT_COLOURS.get(value, GREY)}" stroke="#c8c8c8" stroke-width="0.5">'
                    f"<title>layer {layer}, {escape(kind)}: {value} bits</title></rect>"
                )
    bottom = top + len(kinds) * (height + 4)
    for layer in layers[::5]:
        out.append(text(left + (layer + 0.5) * cell, bottom + 12, str(layer), 10, "middle", GREY))
    for place, (value, colour) in enumerate(BIT_COLOURS.items()):
        at = 560 + 68 * place
        out.append(f'<rect x="{at}" y="{bottom + 30}" width="14" height="14" fill="{colour}" stroke="#c8c8c8"/>')
        out.append(text(at + 19, bottom + 41, f"{value} bits", 11))
    return out


def draw(builds: Sequence[tuple[str, Mapping[str, Any]]], stages: Path) -> str:
    """Builds by name, as `model_diff --json` has them with their size, and the recipe that a model_auto chose, from
    what its stages left: an SVG."""
    from recompile.costs import load_profile
    from recompile.recipe.recipe import load_recipe

    points = [
        Point(label, report["bpw"], report["kl"]["mean"], report["kl"]["std_error"], label.startswith("mix"))
        for label, report in builds
    ]
    header = load_profile(stages / "profile.jsonl").header
    recipe = load_recipe(stages / "overrides.yaml")
    by_dir = {candidate.model_dir: int(float(candidate.label)) for candidate in header.candidates}
    bits = {}
    for group in header.groups:
        directory = recipe.source_dir(f"{group.modules[0]}.weight")
        kind = group.name.split(".", 3)[3].replace("_proj", "").replace("self_attn.", "").replace("mlp.", "")
        assert group.layer is not None, "the demo profiles layers only"
        bits[(group.layer, kind)] = by_dir[directory] if directory else int(float(header.base))
    body = "\n".join([*draw_frontier(points), *draw_bits("the mix", bits)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img" '
        f'aria-label="KL against bits per weight, and the bits of every layer">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
