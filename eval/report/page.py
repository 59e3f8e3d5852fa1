"""ReportData -> one HTML file that needs nothing beside it: no network, no second file.

The numbers travel as gzipped JSON in base64, so that no name in a profile can be markup; plotly.js travels the same way
(4.8 MB become 2 MB) and is unpacked once the first screen is there.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from importlib import resources
from typing import Any

import numpy as np

import recompile
from eval.report.data import ReportData
from recompile.costs import Candidate, Profile
from recompile.errors import RecompileError
from recompile.io.report import role_in_words
from recompile.recipe.recipe import Source, dump_recipe

ROWS_EMBEDDED_UP_TO = 100_000  # numbers: 0.8 MB; beyond, the page shows no standard error of sums
SCRIPTS = ("solver.js", "recipe.js", "charts.js", "details.js", "explorer.js")


def render(data: ReportData) -> str:
    """The page. Raises RecompileError where plotly is not installed."""
    page = _file("page.html")
    parts = {
        "title": escape(f"{data.title}: recipe report"),
        "style": _file("style.css"),
        "data": _packed(json.dumps(page_data(data), ensure_ascii=False, allow_nan=False)),
        "plotly": _packed(_plotly()),
        "scripts": "\n".join(f"<script>\n{_file(name)}</script>" for name in SCRIPTS),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    return page


def page_data(data: ReportData) -> dict[str, Any]:
    """What the scripts read. Arrays over options are in the order of the groups and of each group's `bits`."""
    header = data.profile.header
    labels = [candidate.label for candidate in header.candidates]
    names = {group.name: number for number, group in enumerate(header.groups)}
    return {
        "version": recompile.__version__,
        "title": data.title,
        "profile_name": data.profile_name,
        "header": _header(data.profile),
        "candidates": [_candidate(candidate) for candidate in header.candidates],
        "groups": {
            "name": [group.name for group in header.groups],
            "modules": [None if group.modules == (group.name,) else group.modules for group in header.groups],
            "weights": [group.weights for group in header.groups],
            "layer": [group.layer for group in header.groups],
        },
        **_options(data.profile, labels),
        "measured": [
            {
                **_finite({key: value for key, value in asdict(one).items() if key != "choice"}),
                "choice": _choice(one.choice, names, labels),
            }
            for one in data.measured
        ],
        "presets": [
            {
                **_finite({key: value for key, value in asdict(one).items() if key != "choice"}),
                "bpw": data.bpw(one.bits),
                "total_bytes": data.total_bytes(one.bits),
                "choice": _choice(one.choice, names, labels),
            }
            for one in data.presets
        ],
        "builds": [asdict(build) for build in data.builds],
        "start_bits": data.start_bits,
        "notes": list(data.notes),
    }


def _header(profile: Profile) -> dict[str, Any]:
    header = profile.header
    keep = ("method", "context", "level", "reference", "base", "rows", "row_tokens", "rows_sha256")
    return {
        **{key: getattr(header, key) for key in keep},
        "rows_source": header.rows_source + role_in_words(header.rows_role, header.positions),
        "dtype": header.dtype,
        "device": header.device,
        "versions": dict(header.versions),
        "fixed_bits": header.fixed_bits,
        "other_bits": header.other_bits,
        "counted_weights": profile.counted_weights,
        "other_weights": header.other_weights,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "label": candidate.label,
        "dir": candidate.model_dir,
        "made": candidate.spec is not None,
        "source_line": _source_line(_source_of(candidate)),
        "id_yaml": _id_yaml(_source_of(candidate)),
        "base_lines": _base_lines(candidate),
        "fingerprint": candidate.fingerprint,
    }


def _options(profile: Profile, labels: list[str]) -> dict[str, Any]:
    """What every candidate of every group costs. first: of each group, the place of its first option in the others."""
    header = profile.header
    control = profile.control.kl_rows if profile.control is not None else (0.0,) * header.rows
    first, source, bits, cost, error = [0], [], [], [], []
    few = sum(len(group.bits) for group in header.groups) * header.rows <= ROWS_EMBEDDED_UP_TO
    rows: list[float] | None = [] if few else None
    for group in header.groups:
        for label, stored in group.bits.items():
            found = profile.cost(group.name, label)
            source.append(labels.index(label))
            bits.append(stored)
            cost.append(found.kl_nats if found is not None else math.nan)
            error.append(found.std_error if found is not None else math.nan)
            if rows is not None:
                measured = profile.measurements.get((group.name, label))
                values = measured.kl_rows if measured is not None else control
                rows += [value - zero for value, zero in zip(values, control, strict=True)]
        first.append(len(source))
    return {
        "first": _array(first, "<i4"),
        "source": _array(source, "<i4"),
        "bits": _array(bits, "<f8"),  # whole numbers below 2^53
        "cost": _array(cost, "<f8"),
        "std_error": _array(error, "<f4"),
        "rows": _array(rows, "<f8") if rows is not None else None,
        "control_rows": list(control),
    }


def _choice(choice: Any, names: dict[str, int], labels: list[str]) -> str | None:
    if choice is None:
        return None
    numbers = [0] * len(names)
    for group, label in choice.items():
        numbers[names[group]] = labels.index(label)
    return _array(numbers, "<i4")


def _array(values: Iterable[float], kind: str) -> str:
    return base64.b64encode(np.array(list(values), dtype=kind).tobytes()).decode()


def _finite(value: Any) -> Any:
    """Numbers that are not finite become null, which the page shows as "not measured" or "equal"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _source_of(candidate: Candidate) -> Source:
    return Source(candidate.id, candidate.model_dir, spec=candidate.spec)


def _base_lines(candidate: Candidate) -> list[str]:
    """`base:` of a recipe over this candidate."""
    from recompile.recipe.recipe import Recipe

    base = candidate.model_dir if candidate.spec is None else dict(candidate.spec)
    return dump_recipe(Recipe((), (), base=base)).splitlines()[2:]


def _source_line(source: Source) -> str:
    """The line of `sources:` as dump_recipe writes it: YAML of ids and directories is spelled in one place."""
    from recompile.recipe.recipe import Recipe

    return dump_recipe(Recipe((source,), ())).splitlines()[1]


def _id_yaml(source: Source) -> str:
    from recompile.recipe.recipe import Override, Recipe

    line = dump_recipe(Recipe((source,), (Override("x", source.id),))).splitlines()[3]
    return line.partition(", source: ")[2].removesuffix("}")


def _file(name: str) -> str:
    return resources.files("eval.report").joinpath(name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RecompileError(
            "the report draws with plotly, which is not installed: pip install 'recompile[report]'"
        ) from error
    return str(get_plotlyjs())
