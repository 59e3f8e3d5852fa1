"""Compensated rounding of GGUF types, see `compensated`: codes aim at the base's outputs.

Tensors are made in the order in which a layer calls their maps; each, once rounded, takes its place in the model that
gives the next ones their inputs. Left out, so that they aim at their own weights and count as unrounded: experts that
the Hugging Face checkpoint holds in one tensor, latent keys and values, weights of Conv1D.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.model.stream import LayeredModel
from recompile.quantize.calibrate import BATCH_TOKENS, InputStatistics
from recompile.quantize.compensated import ComparedPass, RoundedLayer
from recompile.quantize.gguf_rounding import Order

# Where tensors of a layer come in the order in which it calls their maps; others at 0.
PLACES = {r"_a(_mqa)?\.weight$": -1, r"(attn_output|attn_out|ssm_out|_o)\.": 1, r"ffn_(gate|up)": 2, r"ffn_down": 3}


def place_in_layer(tensor: str) -> tuple[int, bool]:
    """Where a GGUF tensor comes among those of its layer, shared experts last of a kind."""
    return next((place for name, place in PLACES.items() if re.search(name, tensor)), 0), "_shexp" in tensor


class ComparedInputsOfFile:
    """What the rounded part of the model gives every map, compared with the base. See InputHessians, whose place it
    takes; tensors are asked for in this order: the embedding, where it is not the head as well, a layer after another,
    each in the order of `place_in_layer`, the head (None) last."""

    compensates: bool = True

    def __init__(
        self,
        base: Checkpoint,
        ids: Tensor,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        counted: Tensor | None = None,
    ) -> None:
        self._base, self._about = base, (ids, max(1, BATCH_TOKENS // ids.shape[1]), counted)
        self._model = LayeredModel.of(base, dtype=dtype, device=device)
        self._model.model.set_experts_implementation("eager")
        self._head, self._embedding = (
            self._model.prefix_of(part) for part in (self._model.head, self._model.embedding)
        )
        self._tied = bool(base.config.get("tie_word_embeddings")) or f"{self._head}.weight" not in base.tensors
        self._outside: dict[str, Tensor] = {}  # a rounded embedding that is not the head
        self._at = -1
        self._states: list[Tensor] = []
        self._left: Iterator[InputStatistics] = iter(())
        self._found: dict[str, InputStatistics] = {}
        self._rounded: dict[str, Tensor] = {}

    def of(self, module: str, layer: int | None) -> Tensor | None:
        """[in, in] float32; None for a module that no token reached, or that no layer runs."""
        group = self._group(module, layer)
        return None if group is None else group.hessian

    def mean_squares_of(self, module: str, layer: int | None) -> Tensor | None:
        """[in] float32 on the CPU, up to a factor."""
        group = self._group(module, layer)
        return None if group is None or group.hessian is None else group.hessian.diagonal().cpu()

    @torch.inference_mode()
    def aimed(self, module: str, layer: int | None, rows: Tensor, order: Order) -> Tensor:
        """What to round in place of the rows of a map, both float32 [rows, columns] as GGUF has them."""
        group, weight = self._group(module, layer), self._weight(module, layer)
        if group is None or weight is None or order.rows is None:
            return rows
        weight = weight.to(self._model.device)
        moved = (group.aimed(module, weight) - weight).cpu()[order.rows[: len(rows)]]
        return rows + (moved if order.columns is None else moved[:, order.columns])

    @torch.inference_mode()
    def keep(self, module: str, layer: int | None, rows: Tensor, order: Order) -> None:
        """The rows of a map as they decode, float32 [rows, columns] as GGUF has them, from now on give inputs."""
        weight = self._weight(module, layer)
        if weight is None or order.rows is None:
            return
        if layer is not None:
            self._go_to(layer)
        elif module != self._embedding or self._at >= 0:
            return
        name, into = f"{module}.weight", self._outside if layer is None else self._rounded
        made = into.get(name, weight).clone()  # another tensor, for it tells that the weight is another
        index = order.rows[: len(rows)]
        if order.columns is None:
            made[index] = rows
        else:
            made[index[:, None], order.columns[None]] = rows
        into[name] = made

    def _weight(self, module: str, layer: int | None) -> Tensor | None:
        """float32 [out, in] as the model has it."""
        name = f"{module}.weight"
        if (layer is not None and layer >= self._model.depth) or not self._base.has(name):
            return None
        if layer is not None and self._model.is_turned(module):
            return None
        weight = self._base.load(name).float()
        return weight if weight.dim() == 2 else None

    @torch.inference_mode()
    def _group(self, module: str, layer: int | None) -> InputStatistics | None:
        if layer is not None and layer >= self._model.depth:
            return None
        if module == self._embedding and not self._tied:
            return None  # it has no inputs
        self._go_to(layer)
        while module not in self._found:
            group = next(self._left, None)
            if group is None:
                return None
            self._found |= dict.fromkeys(group.modules, group)
        return self._found[module]

    @torch.inference_mode()
    def _go_to(self, layer: int | None) -> None:
        wanted = self._model.depth if layer is None else layer
        if self._at < 0:
            ids, batch, counted = self._about
            self._states = list(self._model.embed(ids, batch, RoundedLayer(self._base, self._outside)))
            self._compared = ComparedPass(self._base, self._model, ids, batch, counted)
            self._enter(0)
        while self._at < wanted:
            self._compared.advance(self._at, self._states, RoundedLayer(self._base, self._rounded))
            self._enter(self._at + 1)

    def _enter(self, layer: int) -> None:
        self._at, self._found, self._rounded = layer, {}, {}
        if layer < self._model.depth:
            self._left = self._compared.groups(layer, self._states, lambda: RoundedLayer(self._base, self._rounded))
            return
        group = self._compared.of_head(self._states, self._head)
        group.modules += [self._embedding] if self._tied else []
        self._left = iter([group])
