"""Draw what scripts/demo found: KL against size, and which bits each layer got. Writes one SVG, no plotting library.

.venv/bin/python scripts/draw_demo.py demo -o recipes/smollm2-demo.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A colour-blind safe scale from few bits (dark, hurts) to many (light); text on each stays readable.
BIT_COLOURS = {2: "#3b0f70", 3: "#b63679", 4: "#fb8861", 6: "#fcfdbf"}
INK, GREY, UNIFORM, MIX = "#1a1a1a", "#8a8a8a", "#4c72b0", "#c44e00"
WIDTH, HEIGHT = 1080, 430


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(words)}</text>'


def draw_frontier(points: list[tuple[str, float, float, float, bool]]) -> list[str]:
    """KL (logarithmic) against bits per weight; points are (label, bpw, KL, standard error, is a mix)."""
    left, right, top, bottom = 70.0, 500.0, 60.0, 370.0
    low = math.floor(math.log10(min(kl - error for _, _, kl, error, _ in points)) * 2) / 2
    high = math.ceil(math.log10(max(kl for _, _, kl, _, _ in points)) * 2) / 2
    first, last = 2.0, 6.5

    def x(bpw: float) -> float:
        return left + (bpw - first) / (last - first) * (right - left)

    def y(kl: float) -> float:
        return bottom - (math.log10(kl) - low) / (high - low) * (bottom - top)

    out = [
        text(left, 28, "KL(base || build) against size", 15),
        text(left, 45, "nats per token, log scale", 11, colour=GREY),
    ]
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 3):
            value = factor * 10.0**exponent
            if low <= math.log10(value) <= high:
                out.append(f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e4e4e4"/>')
                out.append(text(left - 8, y(value) + 4, f"{value:g}", 11, "end", GREY))
    for bpw in range(2, 7):
        out.append(text(x(bpw), bottom + 18, f"{bpw}", 11, "middle", GREY))
    out.append(text((left + right) / 2, bottom + 38, "bits per weight over quantized modules", 12, "middle"))
    line = " ".join(f"{x(bpw):.1f},{y(kl):.1f}" for _, bpw, kl, _, mix in sorted(points, key=lambda p: p[1]) if not mix)
    out.append(f'<polyline points="{line}" fill="none" stroke="{UNIFORM}" stroke-width="1.5"/>')
    last_mix = (math.inf, 0.0)  # its size, and where its name stands
    for label, bpw, kl, error, mix in sorted(points, key=lambda point: (round(point[1], 1), -point[2])):
        colour = MIX if mix else UNIFORM
        span = f'y1="{y(max(kl - error, 10**low)):.1f}" y2="{y(kl + error):.1f}"'
        out.append(f'<line x1="{x(bpw):.1f}" x2="{x(bpw):.1f}" {span} stroke="{colour}" stroke-width="1.5"/>')
        shape = (
            f'<path d="M {x(bpw):.1f} {y(kl) - 7:.1f} l 7 7 l -7 7 l -7 -7 z" fill="{colour}"/>'
            if mix
            else f'<circle cx="{x(bpw):.1f}" cy="{y(kl):.1f}" r="5" fill="{colour}"/>'
        )
        out.append(shape)
        at = (x(bpw) - 11, "end") if mix else (x(bpw) + 10, "start")
        below = y(kl) + (14 if mix else -6)
        if mix and abs(bpw - last_mix[0]) < 0.3:  # names of mixes of one size stand below each other
            below = max(below, last_mix[1] + 14)
        last_mix = (bpw, below) if mix else last_mix
        out.append(text(at[0], below, f"{label}: {kl:.3f}", 11, at[1], colour))
    return out


def draw_bits(recipes: list[tuple[str, dict[tuple[int, str], int]]]) -> list[str]:
    """Which source each group of each layer comes from, one strip of rows a recipe."""
    left, top, cell = 640.0, 60.0, 13.0
    out = [text(560, 28, "Where the bits went", 15), text(560, 45, "one column a layer", 11, colour=GREY)]
    for title, bits in recipes:
        kinds = list(dict.fromkeys(kind for _, kind in bits))
        layers = sorted({layer for layer, _ in bits})
        out.append(text(560, top + 10, title, 12))
        for row, kind in enumerate(kinds):
            out.append(text(left - 8, top + 32 + row * (cell + 5), kind, 11, "end", GREY))
            for layer in layers:
                value = bits.get((layer, kind))
                if value is not None:
                    out.append(
                        f'<rect x="{left + layer * cell:.1f}" y="{top + 22 + row * (cell + 5):.1f}" width="{cell - 1}" '
                        f'height="{cell}" fill="{BIT_COLOURS.get(value, GREY)}" stroke="#c8c8c8" stroke-width="0.5">'
                        f"<title>layer {layer}, {escape(kind)}: {value} bits</title></rect>"
                    )
        for layer in layers[::5]:
            out.append(
                text(left + (layer + 0.5) * cell, top + 34 + len(kinds) * (cell + 5), str(layer), 10, "middle", GREY)
            )
        top += 60 + len(kinds) * (cell + 5)
    at = left
    for value, colour in BIT_COLOURS.items():
        out.append(f'<rect x="{at}" y="{HEIGHT - 42}" width="14" height="14" fill="{colour}" stroke="#c8c8c8"/>')
        out.append(text(at + 19, HEIGHT - 31, f"{value} bits", 11))
        at += 85
    return out


@click.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo.svg"), show_default=True)
def main(work: Path, out: Path) -> None:
    """Draw the results in WORK, the directory of scripts/demo."""
    from recompile.costs import load_profile
    from recompile.recipe.recipe import load_recipe

    points = []
    for report in json.loads((work / "comparison.json").read_text())["reports"]:
        name = Path(report["candidate"]).name
        mix = not name.removesuffix("bpw").isdecimal()
        label = {"hand.yaml": "by hand"}.get(name, name.replace("mix-", "mix ").replace("bpw-healed", " healed"))
        label = label.removesuffix("bpw") if mix else f"uniform {name[:-3]}-bit"
        points.append((label, report["bpw"], report["kl"]["mean"], report["kl"]["std_error"], mix))
    header = load_profile(work / "profile.jsonl").header
    recipes = []
    for path in sorted(work.glob("*bpw.yaml")):
        recipe = load_recipe(path)
        by_dir = {candidate.model_dir: int(float(candidate.label)) for candidate in header.candidates}
        bits = {}
        for group in header.groups:
            directory = recipe.source_dir(f"{group.modules[0]}.weight_packed")
            kind = group.name.split(".", 3)[3].replace("_proj", "").replace("self_attn.", "").replace("mlp.", "")
            assert group.layer is not None, "the demo profiles layers only"
            bits[(group.layer, kind)] = by_dir[directory] if directory else int(float(header.base))
        recipes.append((f"{path.stem.removesuffix('bpw')} bits per weight", bits))
    body = "\n".join([*draw_frontier(points), *draw_bits(recipes)])
    picture = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img" '
        f'aria-label="KL against bits per weight, and the bits of every layer">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
    out.write_text(picture, encoding="utf-8")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
