"""ReportData -> still pictures for model cards, as SVG or PNG, drawn by matplotlib without a browser.

The same views as the page: one function a picture, each given an empty matplotlib figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eval.report.data import Measured, ReportData
from recompile.costs import ProfileGroup
from recompile.errors import OutputError, RecompileError
from recompile.io.files import write_with
from recompile.io.report import PICTURE_METADATA
from recompile.optimize.choose import make_problem, predict
from recompile.optimize.frontier import lagrangian_path
from recompile.optimize.greedy import solve_greedy

# Okabe and Ito's colours; cividis for amounts: both read the same with and without colour vision.
BLUE, ORANGE, GREEN, GREY, PINK = "#0072b2", "#d55e00", "#009e73", "#6b7280", "#d1266a"
LINES = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", ":", "-.", (0, (6, 2)), "-", "--")
KINDS = tuple(PICTURE_METADATA)
MOST_CACHE_NAMES = 12  # more caches than that are named only where no smaller one is as good


@dataclass(frozen=True)
class Picture:
    """A still picture: how it is called, how large it is, and what draws it."""

    name: str  # of the file, without its ending
    size: tuple[float, float]  # inches
    draw: Callable[[Any, ReportData], None]


def pictures(data: ReportData) -> list[Picture]:
    """What can be drawn of this data: views of measured builds only where there are some."""
    layers = len({group.layer for group in data.profile.header.groups})
    kinds = len({kind_of(group) for group in data.profile.header.groups})
    wide = (min(16.0, max(7.0, 3.2 + 0.26 * layers)), max(2.4, 1.5 + 0.3 * kinds))
    found = [
        Picture("frontier", (7.2, 4.4), draw_frontier),
        Picture("bit-map", wide, draw_bit_map),
        Picture("heat-map", wide, draw_heat_map),
    ]
    if any(one.predicted_kl_nats is not None for one in data.measured):
        found.append(Picture("predicted-measured", (5.2, 4.4), draw_trust))
    if any(one.histogram for one in data.measured):
        found.append(Picture("token-kl", (6.4, 4.0), draw_tokens))
    if data.measured:
        found.append(Picture("confidence", (6.4, 4.0), draw_confidence))
        found.append(Picture("drift", (9.6, 3.8), draw_drift))
    for name, slices in (("by-kind", "by_origin"), ("by-position", "by_position")):
        if any(getattr(one, slices) for one in data.measured):
            found.append(Picture(name, (6.4, 4.0), partial(draw_slices, slices=slices)))
    if any(one.cache_sweep for one in data.measured):
        found.append(Picture("kv-cache", (6.4, 4.0), draw_caches))
    if any(one.attribution for one in data.measured):
        found.append(Picture("attribution", (6.4, 4.0), draw_attribution))
    return found


def check_drawing() -> None:
    """Raises RecompileError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise RecompileError("matplotlib, which draws the pictures, is missing: pip install 'recompile[report]'")


def write_pictures(data: ReportData, directory: Path, kind: str) -> list[Path]:
    """Draw every picture into a directory, made if need be; kind: "png" or "svg". Returns the files.

    Raises RecompileError without matplotlib, OutputError where a file cannot be written.
    """
    assert kind in KINDS
    check_drawing()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    # text stays text, and the same data gives the same bytes; "$" in a name is no formula
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "recompile", "text.parse_math": False, "font.size": 10}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(settings):
            for picture in pictures(data):
                figure = Figure(figsize=picture.size, layout="constrained")
                FigureCanvasAgg(figure)
                picture.draw(figure, data)
                path = directory / f"{picture.name}.{kind}"
                write_with(path, partial(figure.savefig, format=kind, dpi=130, metadata=PICTURE_METADATA[kind]))
                written.append(path)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    return written


def shown_choice(data: ReportData) -> dict[str, str]:
    """The recipe of the bit map: what the explorer opens with, i.e. the greedy choice within `start_bits`."""
    return dict(solve_greedy(make_problem(data.profile), data.start_bits).choice)


def kind_of(group: ProfileGroup) -> str:
    """The row of a group in a map: its name below the layer, with experts together."""
    if group.layer is None:
        return group.name
    tail = group.name.partition(f".{group.layer}.")[2] or "whole layer"
    return ".".join("*" if word.isdigit() else word for word in tail.split("."))


def short(text: str, limit: int = 34) -> str:
    """A name that fits a label."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_frontier(figure: Any, data: ReportData) -> None:
    """KL (logarithmic) against bits per weight, total size on top."""
    axes = figure.subplots()
    control = data.profile.control.mean if data.profile.control is not None else 0.0
    points = lagrangian_path(make_problem(data.profile)).points
    line = [(data.bpw(point.bits), point.cost + control) for point in points if point.cost + control > 0]
    axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=2, label="best mixes, predicted")
    uniform = []
    for candidate in data.profile.header.candidates:
        choice = data.uniform(candidate.label)
        mean = predict(data.profile, choice)[0] if choice is not None else 0.0
        if choice is not None and mean > 0:
            uniform.append((data.bpw(data.bits_of(choice)), mean, candidate.label))
    uniform.sort()
    axes.plot(
        [bpw for bpw, _, _ in uniform],
        [kl for _, kl, _ in uniform],
        ":o",
        color=GREY,
        markerfacecolor="none",
        label="uniform, predicted",
    )
    for bpw, kl, label in uniform:
        axes.annotate(short(label, 16), (bpw, kl), xytext=(6, 5), textcoords="offset points", color=GREY)
    sized = [one for one in data.measured if one.bpw is not None and one.kl_nats > 0]
    for name, colour, marker, found in (
        ("uniform, measured", ORANGE, "s", [one for one in sized if one.uniform is not None]),
        ("mixes, measured", GREEN, "D", [one for one in sized if one.uniform is None]),
    ):
        if found:
            axes.errorbar(
                [one.bpw for one in found],
                [one.kl_nats for one in found],
                yerr=[_bar(one.std_error, one.kl_nats) for one in found],
                fmt=marker,
                color=colour,
                capsize=3,
                label=name,
            )
    for preset in data.presets:
        axes.plot([data.bpw(preset.bits)], [preset.predicted_kl_nats], "^", color=PINK, markerfacecolor="none")
        axes.annotate(short(preset.name, 20), (data.bpw(preset.bits), preset.predicted_kl_nats), color=PINK)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight over quantized modules")
    axes.set_ylabel("KL(reference || build), nats per token")
    weights, other = max(1, data.profile.counted_weights), data.profile.header.other_bits
    unit, name = (2**30, "GiB") if weights > 2e9 else (2**20, "MiB")
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda bpw: (bpw * weights + other) / 8 / unit,
            lambda size: (size * 8 * unit - other) / weights,
        ),
    )
    top.set_xlabel(f"size of all tensors, {name}")
    _calm(axes)
    axes.legend(frameon=False)


def draw_bit_map(figure: Any, data: ReportData) -> None:
    """Bits per weight that the recipe gives to every layer and kind of module."""
    choice = shown_choice(data)

    def width(groups: list[ProfileGroup]) -> float:
        return sum(group.bits[choice[group.name]] for group in groups) / max(1, sum(group.weights for group in groups))

    def label(groups: list[ProfileGroup]) -> str:
        sources = {choice[group.name] for group in groups}
        return sources.pop() if len(sources) == 1 else f"{width(groups):.1f}"

    groups = data.profile.header.groups
    ends = [group.bits[source] / max(1, group.weights) for group in groups for source in group.bits]
    bits = data.bits_of(choice)
    title = f"{short(data.title)}: sources at {data.bpw(bits):.2f} bits per weight, {_size(data.total_bytes(bits))}"
    _map(figure, data, width, label, title, "bits per weight", (min(ends), max(ends)), logarithmic=False)


def draw_heat_map(figure: Any, data: ReportData) -> None:
    """KL that a further million bits save, from the base to the next larger source (or between the two largest)."""
    low, high = _step(data)

    def saved(groups: list[ProfileGroup]) -> float:
        kl, bits = 0.0, 0
        for group in groups:
            cheap, expensive = data.profile.cost(group.name, low), data.profile.cost(group.name, high)
            if cheap is not None and expensive is not None and low in group.bits and high in group.bits:
                kl += cheap.kl_nats - expensive.kl_nats
                bits += group.bits[high] - group.bits[low]
        return 1e6 * kl / bits if bits else math.nan

    title = f"KL saved per Mbit from source {short(low, 16)} to {short(high, 16)}"
    _map(figure, data, saved, lambda groups: "", title, "nats per token per Mbit", None, logarithmic=True)


def draw_trust(figure: Any, data: ReportData) -> None:
    """Predicted against measured KL of everything that was run."""
    axes = figure.subplots()
    found = [one for one in data.measured if one.predicted_kl_nats is not None and one.predicted_kl_nats > 0]
    for name, colour, marker, some in (
        ("uniform builds", ORANGE, "s", [one for one in found if one.uniform is not None]),
        ("mixes", GREEN, "D", [one for one in found if one.uniform is None]),
    ):
        if some:
            axes.errorbar(
                [one.predicted_kl_nats for one in some],
                [one.kl_nats for one in some],
                xerr=[_bar(one.predicted_std_error, one.predicted_kl_nats or 0) for one in some],
                yerr=[_bar(one.std_error, one.kl_nats) for one in some],
                fmt=marker,
                color=colour,
                capsize=2,
                label=name,
            )
        for one in some:
            axes.annotate(
                short(one.name, 24),
                (one.predicted_kl_nats, one.kl_nats),
                xytext=(7, -11),
                textcoords="offset points",
                fontsize=8.5,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = [value for one in found for value in (one.predicted_kl_nats or 0, one.kl_nats) if value > 0]
    if values:
        ends = [min(values) / 1.6, max(values) * 1.6]
        axes.plot(ends, ends, "--", color=GREY, linewidth=1)
    axes.set_xlabel("predicted KL, nats per token")
    axes.set_ylabel("measured KL, nats per token")
    _calm(axes)
    axes.legend(frameon=False)


def draw_tokens(figure: Any, data: ReportData) -> None:
    """Share of tokens by their KL."""
    axes = figure.subplots()
    for number, one in enumerate(one for one in data.measured if one.histogram):
        histogram: Mapping[str, Any] = one.histogram or {}
        low, high = histogram["edges_log10"]
        counts = histogram["counts"]
        total = max(1, sum(counts) + histogram["below"] + histogram["above"])
        edges = [10 ** (low + (high - low) * place / len(counts)) for place in range(len(counts) + 1)]
        axes.stairs([100 * count / total for count in counts], edges, label=short(one.name), **_series(number))
    axes.set_xscale("log")
    axes.set_xlabel("KL of one token, nats")
    axes.set_ylabel("% of tokens per fifth of a decade")
    _calm(axes)
    axes.legend(frameon=False)


def draw_confidence(figure: Any, data: ReportData) -> None:
    """Mean KL by the reference's highest probability."""
    axes = figure.subplots()
    for number, one in enumerate(data.measured):
        bins = [bin for bin in one.confidence if bin["tokens"] and (bin["kl_mean"] or 0) > 0]
        places = [(bin["low"] + bin["high"]) / 2 for bin in bins]
        axes.plot(places, [bin["kl_mean"] for bin in bins], marker="o", label=short(one.name), **_series(number))
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("the reference's highest probability")
    axes.set_ylabel("mean KL, nats")
    _calm(axes)
    axes.legend(frameon=False)


def draw_drift(figure: Any, data: ReportData) -> None:
    """SQNR and cosine error of hidden states after every stage."""
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(data.measured):
        _stages(left, one, number, [stage.sqnr_db for stage in one.drift])
        _stages(right, one, number, [stage.cosine_error or None for stage in one.drift])
    right.set_yscale("log")
    left.set_ylabel("SQNR, dB (higher is better)")
    right.set_ylabel("cosine error (lower is better)")
    for axes in (left, right):
        axes.set_xlabel("stage: embedding, layers, norm")
        _calm(axes)
    left.legend(frameon=False)


def draw_slices(figure: Any, data: ReportData, slices: str) -> None:
    """KL by kind of text or length of context: `slices` names the field of Measured."""
    axes = figure.subplots()
    names = list(dict.fromkeys(str(part["name"]) for one in data.measured for part in getattr(one, slices)))
    for number, one in enumerate(one for one in data.measured if getattr(one, slices)):
        parts = {str(part["name"]): part["kl"] for part in getattr(one, slices)}
        places = [place for place, name in enumerate(names) if name in parts]
        found = [(parts[names[place]]["mean"], parts[names[place]]["std_error"]) for place in places]
        _with_bars(axes, one, number, places, found)
    axes.set_xticks(range(len(names)), [short(name, 16) for name in names])
    axes.set_ylabel("mean KL, nats per token")
    _calm(axes)
    axes.legend(frameon=False)


def draw_caches(figure: Any, data: ReportData) -> None:
    """KL with quantized keys and values by what a token of them takes."""
    axes = figure.subplots()
    for number, one in enumerate(one for one in data.measured if one.cache_sweep):
        points = sorted(one.cache_sweep, key=lambda point: point.bytes_per_token)
        places = [point.bytes_per_token for point in points]
        _with_bars(axes, one, number, places, [(point.kl, point.std_error) for point in points])
        cheapest = [min(point.kl for point in points[: n + 1]) for n in range(len(points))]
        for point, least in zip(points, cheapest, strict=True):
            if len(points) > MOST_CACHE_NAMES and point.kl > least:
                continue  # a smaller one is as good
            axes.annotate(short(point.name, 16), (point.bytes_per_token, point.kl), fontsize=8, color=GREY)
    axes.set_xlabel("KV cache, bytes per token of context")
    axes.set_ylabel("mean KL, nats per token")
    _calm(axes)
    axes.legend(frameon=False)


def draw_attribution(figure: Any, data: ReportData) -> None:
    """KL of every group's own error beside noise of the same size: what lies above the diagonal is worse than noise."""
    axes = figure.subplots()
    drawn = [one for one in data.measured if one.attribution]
    for number, one in enumerate(drawn):
        groups = [group for group in (one.attribution or {})["groups"] if group["kl"] > 0 and group["noise"]]
        across = [group["noise"] for group in groups]
        axes.scatter(across, [group["kl"] for group in groups], s=14, color=LINES[number % len(LINES)], alpha=0.7)
        axes.scatter([], [], color=LINES[number % len(LINES)], label=short(one.name))
        if across:
            ends = (min(across), max(across))
            axes.plot(ends, ends, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("KL of noise as large as the group's error, nats per token")
    axes.set_ylabel("KL of its own error")
    _calm(axes)
    axes.legend(frameon=False)


def _with_bars(
    axes: Any, one: Measured, number: int, places: Sequence[float], found: Sequence[tuple[float, float | None]]
) -> None:
    """A line of values with their standard errors."""
    values, bars = [value for value, _ in found], [_bar(error, value) for value, error in found]
    axes.errorbar(places, values, yerr=bars, marker="o", capsize=3, label=short(one.name), **_series(number))


def _stages(axes: Any, one: Measured, number: int, values: list[float | None]) -> None:
    kept = [(place, value) for place, value in enumerate(values) if value is not None]
    if kept:
        axes.plot([place for place, _ in kept], [value for _, value in kept], label=short(one.name), **_series(number))


# ---- parts -----------------------------------------------------------------------------------------------------------


def _map(
    figure: Any,
    data: ReportData,
    value: Callable[[list[ProfileGroup]], float],
    label: Callable[[list[ProfileGroup]], str],
    title: str,
    unit: str,
    ends: tuple[float, float] | None,
    logarithmic: bool,
) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    cells: dict[tuple[str, int | None], list[ProfileGroup]] = {}
    for group in data.profile.header.groups:
        cells.setdefault((kind_of(group), group.layer), []).append(group)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: math.inf if layer is None else layer)
    table = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), groups in cells.items():
        table[kinds.index(kind), layers.index(layer)] = value(groups)
    axes = figure.subplots()
    good = table[np.isfinite(table) & (table > 0)] if logarithmic else table[np.isfinite(table)]
    if logarithmic:
        high = float(good.max()) if good.size else 1.0
        norm: Any = LogNorm(max(float(good.min()) if good.size else 1e-4, high * 1e-4), high)
        table = np.where(table > 0, np.maximum(table, norm.vmin), np.nan)  # blank: not above zero, i.e. noise
    else:
        norm = Normalize(*(ends or (float(good.min()), float(good.max()))))
    image = axes.imshow(table, cmap="cividis", norm=norm, aspect="auto")
    for (kind, layer), groups in cells.items():
        text = label(groups)
        row, column = kinds.index(kind), layers.index(layer)
        if text and len(text) <= 3 and len(layers) <= 64:
            bright = norm(table[row, column]) > 0.55
            ink = "#111111" if bright else "#ffffff"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    axes.set_yticks(range(len(kinds)), [short(kind, 30) for kind in kinds])
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), ["–" if layer is None else str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=11)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)


def _step(data: ReportData) -> tuple[str, str]:
    """The base and the next more expensive source; the two most expensive where the base is the most expensive."""
    header = data.profile.header
    sizes = {
        candidate.label: sum(group.bits.get(candidate.label, 0) for group in header.groups)
        / max(1, sum(group.weights for group in header.groups if candidate.label in group.bits))
        for candidate in header.candidates
    }
    order = sorted(sizes, key=lambda label: sizes[label])
    place = min(order.index(header.base), max(0, len(order) - 2))
    return order[place], order[min(place + 1, len(order) - 1)]


def _bar(error: float | None, value: float) -> float:
    """Half a bar, kept above zero on a logarithmic axis."""
    return min(error, 0.95 * value) if error is not None and math.isfinite(error) else 0.0


def _series(number: int) -> dict[str, Any]:
    return {"color": LINES[number % len(LINES)], "linestyle": DASHES[number % len(DASHES)]}


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _calm(axes: Any) -> None:
    axes.grid(True, color="#e2e5ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
