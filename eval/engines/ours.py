"""Our own forward pass beside an engine: several runs over the same rows, of which only normed states are kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recompile.checkpoint.checkpoint import WeightSource
from recompile.formats.cache_types import CacheFormat
from recompile.merge.overlay import Overlay
from recompile.model.activations import QuantizedInputs
from recompile.model.devices import batch_rows
from recompile.model.kv_cache import SimulatedCache
from recompile.model.stream import LayeredModel, check_same_skeleton


@dataclass(frozen=True)
class OwnRun:
    """One checkpoint in one dtype (None: float32 on a CPU).

    quantized_inputs: as its schemes say, of an Overlay; cache: through which it attends
    """

    source: WeightSource
    dtype: torch.dtype | None = None
    quantized_inputs: bool = False
    cache: CacheFormat | None = None


def _attending(cache: SimulatedCache | None, layer: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext() if cache is None else cache.of_layer(layer)


class OwnRuns:
    """Runs streamed layer by layer over all rows; `with runs: runs.logits(...)` holds every run's head.

    ids: int64 [rows, tokens]; first, last: the positions first <= i < last are kept
    """

    def __init__(self, runs: Sequence[OwnRun], ids: Tensor, first: int, last: int, device: str = "cpu") -> None:
        self.models = tuple(LayeredModel.of(run.source, dtype=run.dtype, device=device) for run in runs)
        for model in self.models[:-1]:
            check_same_skeleton(self.models[-1], model)
        self.first, self.last = first, last
        self.states = tuple(self._run(run, model, ids) for run, model in zip(runs, self.models, strict=True))

    def _run(self, run: OwnRun, model: LayeredModel, ids: Tensor) -> Tensor:
        """[rows, kept positions, hidden] after the last norm."""
        if run.quantized_inputs:
            model.model.set_experts_implementation("eager")  # one linear call an expert, which QuantizedInputs sees
        cache = SimulatedCache.of(run.cache, model.model.config.model_type) if run.cache is not None else None
        with torch.inference_mode():
            batch = batch_rows(model.device, ids.shape[1])
            states = list(model.embed(ids, batch))
            for index in range(model.depth):
                with model.layer(index) as layer, self._inputs(run, model, index), _attending(cache, layer):
                    states = [model.run_layer(index, state, n * batch) for n, state in enumerate(states)]
            with model.norm_loaded() as norm:
                return torch.cat([norm(state[:, self.first : self.last]) for state in states])

    @staticmethod
    def _inputs(run: OwnRun, model: LayeredModel, index: int) -> AbstractContextManager[Any]:
        """What a loaded layer runs under: its inputs quantized, or as they are."""
        if not run.quantized_inputs:
            return nullcontext()
        assert isinstance(run.source, Overlay), "only a mix of checkpoints says how inputs are quantized"
        return QuantizedInputs(model, run.source, index)

    def __enter__(self) -> OwnRuns:
        self._heads = ExitStack()
        for model in self.models:
            self._heads.enter_context(model.head_loaded())
        return self

    def __exit__(self, *_: object) -> None:
        self._heads.close()

    def logits(self, run: int, row: int, start: int, stop: int) -> Tensor:
        """float32 [positions, vocab] on the CPU; positions count from the first kept one."""
        with torch.inference_mode():
            state = self.states[run][row : row + 1, start:stop]
            return self.models[run].logits(state)[0].float().cpu()
