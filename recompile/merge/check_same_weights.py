"""Were the variants of an overlay made from the same weights? Blocks of rows are decoded and correlated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, StoredModule, TensorInfo
from recompile.checkpoint.coupled_modules import read_scaled_sets
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.errors import CheckpointError, MismatchError
from recompile.formats import FLOAT_DTYPES, FORMATS, mlx_config
from recompile.merge.overlay import Overlay, Placement
from recompile.merge.write_plan import natural_key

if TYPE_CHECKING:
    from torch import Tensor

# A block of a weight and of the same weight quantized twice, independently, to 2 bits still correlate at about 0.75
# (1 bit: 0.6); blocks of unrelated weights within 0.02 of zero, as they have thousands of elements. Anything between
# tells the two apart; 0.9, which suits 3 bits and more, would refuse honest 2-bit variants.
MIN_CORRELATION = 0.5

PROBED_MODULES = 24

BLOCK_ROWS = 128  # one rotation block of EXL3, four words of packed zero points, four paddings of EXL2

# Unquantized tensors pass through bfloat16 or float16 on their way (2^-8 relative covers one rounding to either and
# back), and through float16 as 1 + w in some converters (2^-11 of a value below 2).
NORM_RELATIVE, NORM_ABSOLUTE = 2.0**-8, 2.0**-10


@dataclass(frozen=True)
class ProbeReport:
    """What `check_same_weights` compared. Correlations are of a block of rows, source against base."""

    unquantized_tensors: int
    modules: tuple[str, ...]
    correlations: tuple[float, ...]

    @property
    def lowest(self) -> tuple[str, float] | None:
        """The module with the lowest correlation, and that correlation."""
        if not self.modules:
            return None
        return min(zip(self.modules, self.correlations, strict=True), key=lambda pair: pair[1])


def check_same_weights(overlay: Overlay, sample: int = PROBED_MODULES) -> ProbeReport:
    """Cheap evidence that the sources that an overlay takes modules from were made from the base's weights.

    Vectors that both store unquantized (norms) must agree within the rounding of 16-bit floats; of at most `sample`
    overridden modules, spread over depth, kind and source, a block of rows must correlate with the base's. This catches
    another model, another random start, torn or permuted weights; it does not tell a fine-tune with the same norms from
    its original. Modules that cannot be decoded here are left out, and those between which scales were moved (AWQ and
    SmoothQuant variants of model_quantize), which `build_overlay` keeps together.

    Raises MismatchError with the module and the figure, CheckpointError for values that are not finite.
    """
    used: dict[str, Checkpoint] = {}
    for placement in overlay.placements.values():
        if placement.source is not None:
            used.setdefault(placement.source, placement.checkpoint)
    compared = sum(_check_unquantized(overlay.base, source, label) for label, source in used.items())
    names, correlations = [], []
    for placement in _sampled(overlay, sample):
        figure = _correlation(overlay.base, placement.checkpoint, str(placement.source), placement.stored)
        if figure is None:
            continue
        if figure < MIN_CORRELATION:
            raise MismatchError(
                f"{placement.source}: {placement.module} was not made from the weights of {overlay.base.label}: the "
                f"correlation of a block of its rows with the base's is {figure:.3f}, wanted above {MIN_CORRELATION}; "
                f"use variants of one model ({{probe=False}} skips this check)"
            )
        names.append(placement.module)
        correlations.append(figure)
    return ProbeReport(compared, tuple(names), tuple(correlations))


def check_made_of(
    build: Checkpoint, base: Checkpoint, left_out: Collection[str] = (), sample: int = PROBED_MODULES
) -> None:
    """Raise MismatchError unless a build's quantized weights are those of the base, as far as a block of rows of at
    most `sample` of them tells. left_out: modules that the two store in another order."""
    scaled = _scaled_modules(base, build)
    found = [
        module
        for name, module in build.modules.items()
        if module.is_quantized and name in base.modules and name not in scaled and name not in left_out
    ]
    found = [module for module in found if _can_probe(module) and _can_probe(base.modules[module.name])]
    for module in found[:: max(1, -(-len(found) // sample))]:
        figure = _correlation(base, build, build.label, module)
        if figure is not None and figure < MIN_CORRELATION:
            raise MismatchError(
                f"{build.label}: {module.name} was not made from the weights of {base.label}: the correlation of a "
                f"block of its rows with the base's is {figure:.3f}, wanted above {MIN_CORRELATION}; name the model "
                f"that it was made of"
            )


def _check_unquantized(base: Checkpoint, source: Checkpoint, label: str) -> int:
    """Compare every vector that both store dense; returns how many."""
    compared = 0
    scaled = _scaled_modules(base, source)
    for name, module in base.modules.items():
        other = source.modules.get(name)
        if other is None or other is module or module.is_quantized or other.is_quantized or name in scaled:
            continue
        left = module.parts.get("weight") or module.parts.get("")
        right = other.parts.get("weight") or other.parts.get("")
        if left is None or right is None or left.shape != right.shape or len(left.shape) != 1:
            continue
        if left.dtype not in FLOAT_DTYPES or right.dtype not in FLOAT_DTYPES:
            continue
        want = base.restore(left.name, read_tensor(left)).double()
        have = source.restore(right.name, read_tensor(right)).double()
        _check_finite(want, base.label, left.name)
        _check_finite(have, label, right.name)
        apart = (want - have).abs()
        rounded = want.abs() + (1 if mlx_config.adds_one(base.config, left.name) else 0)  # what a file of MLX's holds
        beyond = apart > NORM_RELATIVE * rounded + NORM_ABSOLUTE
        if bool(beyond.any()):
            raise MismatchError(
                f"{label}: {right.name} differs from {base.label}'s by up to {float(apart.max()):.3g} (in "
                f"{int(beyond.sum())} of {want.numel()} values by more than rounding), and both store it unquantized; "
                f"they are not builds of the same weights, or one has scales moved into its norms, as AWQ and "
                f"SmoothQuant do, and its modules fit no other build ({{probe=False}} skips this check)"
            )
        compared += 1
    return compared


def _scaled_modules(*checkpoints: Checkpoint) -> frozenset[str]:
    """Modules whose stored weights are scaled against the original's."""
    sets = (entry for checkpoint in checkpoints for entry in read_scaled_sets(checkpoint.path))
    return frozenset(name for entry in sets for name in entry.members)


def _check_finite(value: Tensor, label: str, tensor: str) -> None:
    if not bool(value.isfinite().all()):
        raise CheckpointError(f"{label}: {tensor} holds NaN or infinite values; this checkpoint is damaged")


def _sampled(overlay: Overlay, sample: int) -> list[Placement]:
    """At most about `sample` overridden modules: evenly from each source's, sorted by kind and then depth."""
    by_source: dict[str, list[Placement]] = {}
    scaled = _scaled_modules(*overlay.checkpoints)
    for placement in overlay.placements.values():
        base = overlay.base.modules.get(placement.module)
        if placement.source is None or base is None or placement.module in scaled:
            continue
        if _can_probe(base) and _can_probe(placement.stored):
            by_source.setdefault(placement.source, []).append(placement)
    chosen = []
    for placements in by_source.values():
        placements.sort(key=lambda p: (p.module.rpartition(".")[2], natural_key(p.module)))
        count = min(len(placements), max(1, sample // len(by_source)))
        chosen += [placements[(2 * number + 1) * len(placements) // (2 * count)] for number in range(count)]
    return chosen


def _can_probe(module: StoredModule) -> bool:
    return module.shape is not None and len(module.shape) == 2 and FORMATS[module.format].runnable


def _correlation(base: Checkpoint, source: Checkpoint, label: str, theirs: StoredModule) -> float | None:
    """Pearson correlation of one block of rows of a module; None where one of the two is constant."""
    ours = base.modules[theirs.name]
    assert ours.shape is not None, ours.name
    assert theirs.shape is not None, theirs.name
    common = min(ours.shape[0], theirs.shape[0])
    first = max(0, common - BLOCK_ROWS) // 2 // BLOCK_ROWS * BLOCK_ROWS
    columns = min(ours.shape[1], theirs.shape[1])
    rows = min(BLOCK_ROWS, common - first)
    want = row_block(base, ours, first)[:rows, :columns].double()
    have = row_block(source, theirs, first)[:rows, :columns].double()
    _check_finite(want, base.label, ours.name)
    _check_finite(have, label, theirs.name)
    want, have = want - want.mean(), have - have.mean()
    scale = float(want.norm() * have.norm())
    return float((want * have).sum()) / scale if scale > 0 else None


def row_block(checkpoint: Checkpoint, module: StoredModule, first: int) -> Tensor:
    """Rows first .. first+BLOCK_ROWS (fewer at the end) of a module's dense weight, [rows, in], decoding little more.

    first: a multiple of BLOCK_ROWS. Raises FormatError as decoding does.
    """
    assert module.shape is not None, module.name
    last = min(first + BLOCK_ROWS, module.shape[0])
    parts = module.parts
    if isinstance(checkpoint, GgufCheckpoint):
        place = checkpoint.places.get(module.dense_name)
        if place is not None and place.moves_rows:  # rows stand in another order in the file
            return checkpoint.load(module.dense_name)[first:last]
        if module.is_quantized:
            return checkpoint.decode(module, {"weight": read_tensor(_rows_of(parts["weight"], first, last))})
    if not module.is_quantized and parts["weight"].is_scattered:
        return read_tensor(parts["weight"])[first:last]
    if not module.is_quantized:
        return read_tensor(_rows_of(parts["weight"], first, last))
    code = FORMATS[module.format].load_code()
    if hasattr(code, "rows_to_read"):
        import torch

        taken = {
            part: read_tensor(_rows_of(parts[part], *rows))
            for part, rows in code.rows_to_read(checkpoint.scheme(module), parts, first, last).items()
        }
        taken["weight_shape"] = torch.tensor([last - first, module.shape[1]])
        return checkpoint.decode(module, taken)
    whole = {part: read_tensor(info) for part, info in parts.items() if part != "bias"}
    if not hasattr(code, "take_rows"):
        return checkpoint.decode(module, whole)[first:last]
    return checkpoint.decode(module, code.take_rows(whole, first, last))


def _rows_of(info: TensorInfo, first: int, last: int) -> TensorInfo:
    """The header of rows first..last of a stored tensor."""
    row_bytes = info.size_bytes // max(1, info.shape[0])
    last = min(last, info.shape[0])
    return TensorInfo(
        info.name,
        info.dtype,
        (last - first, *info.shape[1:]),
        info.path,
        info.offset + first * row_bytes,
        (last - first) * row_bytes,
    )
