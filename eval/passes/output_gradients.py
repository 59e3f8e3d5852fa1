"""One streamed backward pass that measures E[g g^T] at the output of every linear map, for two-sided rounding.

Labels are drawn from the model's own distribution (`eval.passes.fisher`), so that g g^T averages to the map's own block
of the Fisher matrix, not to that of the text. Every eighth row is kept apart: rounding is judged by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from eval.passes.adjoint import AdjointPass, LayerBackward, LayerForward, PassPlan, plan_pass
from eval.passes.fisher import DRAWS, FisherCotangents
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import ROUTERS, ProfileGroup
from recompile.errors import RecompileError
from recompile.model.stream import LayeredModel, sketch_dtype
from recompile.quantize.output_statistics import GradientSums, StatisticsWriter, StoredStatistics

HELD_OUT_EVERY = 8  # rows 7, 15, ...; with fewer rows the last one
MOMENT_ROWS = 1024  # of a second moment, that are multiplied at a time
SAMPLES = 2  # of a token. Another draw costs a backward pass and no forward one; a token's draws are independent
WIDEST = 16384  # outputs: beyond it a matrix is larger than what it would gain is worth, 2 GiB for both shares


@dataclass(frozen=True)
class GradientOptions:
    """How gradients at the outputs of maps are drawn."""

    samples: int = SAMPLES
    seed: int = 0
    dtype: torch.dtype | None = None  # None: bfloat16 where the device multiplies it fast
    device: str = "cpu"
    max_memory_bytes: int | None = None


@dataclass(frozen=True)
class GradientsProgress:
    """A layer of the pass is done; total: layers forward and backward."""

    done: int
    total: int
    text: str


@dataclass
class _Sums:
    """Of one module while its layer runs."""

    sums: tuple[Tensor, Tensor]
    tokens: list[int] = field(default_factory=lambda: [0, 0])


@dataclass
class OutputGradients:
    """Collects g g^T of every wanted module; handed to `AdjointPass.observe`."""

    held_out: frozenset[int]  # numbers of rows
    counted: Tensor | None = None  # bool [rows, tokens], the places that are meant; None: all
    found: dict[str, _Sums] = field(default_factory=dict)

    def see(self, shares: list[tuple[str, slice]], adjoints: Tensor, rows: slice) -> None:
        """shares: modules, each with its part of the outputs; adjoints: [samples, (rows, tokens | tokens), out] of one
        call for these rows of the pass."""
        count = rows.stop - rows.start
        for module, part in shares:
            g = adjoints[..., part].reshape(len(adjoints), count, -1, part.stop - part.start)
            if module not in self.found:
                size = g.shape[-1]
                self.found[module] = _Sums((_zeros(size, g), _zeros(size, g)))
            mine = self.found[module]
            apart = [row for row in range(count) if rows.start + row in self.held_out]
            together = [row for row in range(count) if rows.start + row not in self.held_out]
            for share, chosen in enumerate((together, apart)):
                if chosen:
                    flat = self._meant(g[:, chosen], [rows.start + row for row in chosen])
                    _add_second_moment(mine.sums[share], flat)
                    mine.tokens[share] += len(flat)

    def _meant(self, g: Tensor, rows: list[int]) -> Tensor:
        """[samples, rows, tokens, out] -> [tokens that count, out]; experts are given some tokens of a row, and those
        that do not count add next to nothing to them."""
        if self.counted is None or g.shape[2] != self.counted.shape[1]:
            return g.flatten(0, 2)
        return g[:, self.counted[rows].to(g.device)].flatten(0, 1)

    def take(self) -> dict[str, GradientSums]:
        """What was found since it was last asked."""
        found = {name: GradientSums(*mine.sums, *mine.tokens) for name, mine in self.found.items()}
        self.found = {}
        return found


def _zeros(size: int, like: Tensor) -> Tensor:
    return like.new_zeros(size, size, dtype=torch.float32)


def _add_second_moment(into: Tensor, g: Tensor) -> None:
    """Add the sum of g g^T of g [tokens, out] to `into`, [out, out] float32.

    bfloat16 is multiplied as such: it rounds what is added by 2^-9 of each entry, as it has rounded g, and draws leave
    far more in doubt. float16 has no room for squares of gradients.
    """
    if g.dtype != torch.bfloat16:
        wide = g.float()
        into.addmm_(wide.t(), wide)
        return
    for start in range(0, g.shape[1], MOMENT_ROWS):  # no second matrix of that size beside it
        part = slice(start, start + MOMENT_ROWS)
        into[part] += g[:, part].t() @ g


def held_out_rows(rows: int) -> frozenset[int]:
    """Raises RecompileError for a single row, which cannot be shared out."""
    if rows < 2:
        raise RecompileError(f"{{rows}} {rows}: gradients for two-sided rounding need at least 2 rows, one to judge by")
    return frozenset(range(HELD_OUT_EVERY - 1, rows, HELD_OUT_EVERY)) or frozenset({rows - 1})


def measure_outputs(
    base: Checkpoint,
    ids: Tensor,
    path: Path,
    options: GradientOptions | None = None,
    *,
    rows_sha256: str = "",
    counted: Tensor | None = None,
) -> Iterator[PassPlan | GradientsProgress | StoredStatistics]:
    """Measure all linear maps of the layers of `base` on rows ids, int64 [rows, tokens], into the directory `path`.

    counted: bool [rows, tokens], the places that labels are drawn at, and whose gradients count; None: all.

    Yields the plan, a GradientsProgress a layer and direction, and last the StoredStatistics. Routers, and maps with
    more than WIDEST outputs, are left out. Raises RecompileError where the memory cap cannot be kept.
    """
    wanted = options or GradientOptions()
    held_out = held_out_rows(len(ids))
    model = LayeredModel.of(base, dtype=wanted.dtype or sketch_dtype(wanted.device), device=wanted.device)
    groups = [
        ProfileGroup(name, (name,), base.modules[name].numel, {}, index)
        for index in range(model.depth)
        for name in model.modules_of_layer(index)
        if _is_wanted(base, name)
    ]
    largest = max(
        sum(2 * 4 * (base.modules[g.modules[0]].shape or (0,))[0] ** 2 for g in groups if g.layer == index)
        for index in range(model.depth)
    )
    rows, tokens = ids.shape
    plan = plan_pass(model, groups, 0, rows, tokens, wanted.samples, wanted.max_memory_bytes, making=2 * largest)
    yield plan
    collector = OutputGradients(held_out, counted)
    swaps = AdjointPass(model, base, {}, groups, plan, path.parent, observe=collector.see)
    cotangents = FisherCotangents(model, {}, (), wanted.samples, wanted.seed, counted=counted)
    made_of = {
        "base": base.identity,
        "rows": rows_sha256,
        "row_shape": [rows, tokens],
        "samples": wanted.samples,
        "draws": DRAWS,
        "seed": wanted.seed,
        "dtype": str(model.dtype),
    }
    writer = StatisticsWriter(path, made_of)
    done, total = 0, 2 * model.depth
    for event in swaps.run(ids, cotangents):
        if isinstance(event, LayerForward):
            done += 1
            yield GradientsProgress(done, total, f"forward {event.layer}")
        elif isinstance(event, LayerBackward) and event.layer is not None:
            writer.add(event.layer, collector.take())
            done += 1
            yield GradientsProgress(done, total, f"backward {event.layer}")
    yield writer.finish()


def _is_wanted(base: Checkpoint, name: str) -> bool:
    stored = base.modules.get(name)
    shape = stored.shape if stored is not None else None
    if shape is None or len(shape) != 2 or name.rpartition(".")[2] in ROUTERS:
        return False
    return shape[0] <= WIDEST
