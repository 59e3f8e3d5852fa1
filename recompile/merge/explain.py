"""An overlay as a table for people: which source every module comes from, and which line of the recipe decided."""

from __future__ import annotations

from collections.abc import Sequence

from recompile.checkpoint.module_names import role_of
from recompile.io.report import format_columns
from recompile.io.sizes import format_bytes
from recompile.merge.left_dense import known_roles
from recompile.merge.overlay import Overlay, Placement
from recompile.merge.write_plan import natural_key

LONG_TABLE = 60  # modules; a longer table is folded over layers


def resolved_table(overlay: Overlay, *, every: bool = False) -> str:
    """Module, source, bits and the line that decided, for every weight; folded over layers where that is long."""
    placements = sorted(overlay.placements.values(), key=lambda p: natural_key(p.module))
    shown = [p for p in placements if every or p.source is not None or _is_weight(p)]
    if every or len(shown) <= LONG_TABLE:
        rows = [(p.module, _source(p), f"{p.stored.bits_per_weight:.3f}", _decided(overlay, p)) for p in shown]
        text = format_columns(rows, ("module", "source", "bits", "decided by"), right=(2,))
    else:
        folded: dict[tuple[str, str, str, str], list[str]] = {}
        for p in shown:
            bits = f"{p.stored.bits_per_weight:.2f}"
            key = (_template(p.module), _source(p), bits, _decided(overlay, p))
            folded.setdefault(key, []).append(p.module)
        rows5 = [
            (fold_modules(names), str(len(names)), source, bits, decided)
            for (_, source, bits, decided), names in folded.items()
        ]
        text = format_columns(rows5, ("module", "modules", "source", "bits", "decided by"), right=(1, 3))
    names = {p.module for p in shown}
    rest = [p for p in placements if p.module not in names]
    if rest:
        size = sum(p.stored.size_bytes for p in rest)
        text += f"\n{len(rest)} other modules (norms and the like) from the base, {format_bytes(size)}"
    return text


def reached_aside(overlay: Overlay) -> list[str]:
    """What lines of a recipe take beside the text model: modules of a tower or of an MTP layer, with the line."""
    if overlay.recipe is None:
        return []
    roles = known_roles(overlay)
    found: dict[tuple[int, str, str], list[str]] = {}
    for placement in overlay.placements.values():
        part = roles[placement.module].part
        if placement.override is not None and part in ("tower", "mtp"):
            found.setdefault((placement.override.line, placement.override.key, part), []).append(placement.module)
    what = {"tower": "a vision or audio tower", "mtp": "an MTP layer"}
    return [
        f'{overlay.recipe.name}:{line}: "{key}" reaches into {what[part]}: {names[0]}'
        + (f" and {len(names) - 1} more modules" if len(names) > 1 else "")
        for (line, key, part), names in sorted(found.items())
    ]


def _is_weight(placement: Placement) -> bool:
    stored = placement.stored
    return (
        stored.is_quantized or role_of(stored.name) != "layer" or (stored.shape is not None and len(stored.shape) > 1)
    )


def _source(placement: Placement) -> str:
    return placement.source if placement.source is not None else "(base)"


def _decided(overlay: Overlay, placement: Placement) -> str:
    if placement.override is None or overlay.recipe is None:
        return "-"
    return f'{overlay.recipe.name}:{placement.override.line} "{placement.override.key}"'


def _template(module: str) -> str:
    return ".".join("#" if word.isdigit() else word for word in module.split("."))


def fold_modules(modules: Sequence[str]) -> str:
    """model.layers.{0-3,5}.mlp.up_proj; numbers after the first become * where they differ."""
    columns = list(zip(*(module.split(".") for module in modules), strict=True))
    words = []
    first = True
    for column in columns:
        values = list(dict.fromkeys(column))
        if len(values) == 1:
            words.append(values[0])
        elif first:
            words.append("{" + _ranges([int(value) for value in values]) + "}")
        else:
            words.append("*")
        first = first and not column[0].isdigit()
    return ".".join(words)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
