"""Models that are no sequence of layers, each run once: all between the embedding and the head is one block.

Layers that run several times a token, a head that reads several of them, states with places that are no tokens: the
model's own forward does all that, with what its embedding gave in the place of that embedding. Such a model is not
streamed: the weights of the block are in memory together. Its state is what enters the block, or what leaves it, and
the token ids, for masks and positions that are made of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recompile.errors import UnsupportedError
from recompile.model.own_forward import (
    PROBE_ROWS,
    PROBE_TOKENS,
    Follow,
    Reached,
    Structure,
    name_of,
    patched,
    result_of,
    run_own,
    storage_of,
    unwritten_zeros,
    zeros_outside,
)
from recompile.model.states import join_values, pieces_of, split_values

NOTHING = "\n"  # the name of no module


class Part(nn.Module):
    """A module without some that are in it, under the same names and with the same weights."""

    def __init__(self, whole: nn.Module, without: frozenset[nn.Module]) -> None:
        super().__init__()
        self._parameters, self._buffers = whole._parameters, whole._buffers  # the tables themselves, not copies
        for name, child in whole.named_children():
            if child not in without:
                inside = any(module in without for module in child.modules())
                self._modules[name] = Part(child, without) if inside else child


@dataclass(frozen=True)
class Block(Structure):
    """A model as one block. `base` is the module that it lies in, its result what the head takes.

    embedding: the module whose result enters; entering: its shape beyond the rows, at PROBE_TOKENS tokens
    leaving: width of what the head takes; unread: modules in `base` that do not run on text
    """

    embedding: str
    leaving: int
    unread: tuple[str, ...]

    def part_of(self, model: nn.Module) -> Part:
        """What is loaded and run as the one layer."""
        left = (*self.unread, self.embedding)
        return Part(model.get_submodule(self.base), frozenset(map(model.get_submodule, left)))


@torch.no_grad()
def find_block(model: nn.Module, runner: nn.Module, stack_name: str, device: torch.device) -> Block:
    """From one run on weights of zero. Raises UnsupportedError, in one sentence, for a model that is no such block."""
    what = type(model).__name__
    base_name = _base_of(model, runner, stack_name)
    if base_name is None:
        raise UnsupportedError(f"{what} has no base model under its head; not supported")
    base, embedding = model.get_submodule(base_name), model.get_input_embeddings()  # type: ignore[operator]
    if not any(module is embedding for module in base.modules()):
        raise UnsupportedError(f"{what} embeds tokens outside of its base model; not supported")
    entered: list[Tensor] = []
    left: list[Tensor] = []
    read: set[str] = set()

    def embed(*args: Any, **kwargs: Any) -> Any:
        out = type(embedding).forward(embedding, *args, **kwargs)
        entered.append(out)
        return out

    def run_base(*args: Any, **kwargs: Any) -> Any:
        out = type(base).forward(base, *args, **kwargs)
        left.append(result_of(out))
        read.update(follow.take())
        return out

    ids = torch.arange(PROBE_ROWS * PROBE_TOKENS, device=device).reshape(PROBE_ROWS, PROBE_TOKENS)
    with ExitStack() as stack:
        follow = Follow(stack.enter_context(zeros_in(model, base_name, device)))
        stack.enter_context(patched([embedding, base], [embed, run_base]))
        with follow:
            run_own(runner, ids)
    if len(entered) != 1 or len(left) != 1:
        raise UnsupportedError(
            f"{what} embeds tokens {len(entered)} times and runs {len(left)} base models; not supported"
        )
    if entered[0].dim() < 2 or len(entered[0]) != PROBE_ROWS or left[0].shape[:-1] != ids.shape:
        shapes = f"{list(entered[0].shape)} enters, {list(left[0].shape)} leaves"
        raise UnsupportedError(f"{what}: its states are not one a row and token ({shapes}); not supported")
    name = name_of(model, embedding)
    return Block(
        before=tuple(sorted(found for found in read if found.startswith(f"{name}."))),
        after=(),
        head=tuple(sorted(follow.take())),
        base=base_name,
        norm="",
        ran=(0,),
        ports=(),
        hidden_shape=tuple(entered[0].shape),
        extras=0,
        embedding=name,
        leaving=left[0].shape[-1],
        unread=tuple(
            f"{base_name}.{child}"
            for child, module in base.named_children()
            if any(True for _ in module.parameters())
            and not any(found.startswith(f"{base_name}.{child}.") for found in read)
        ),
    )


def _base_of(model: nn.Module, runner: nn.Module, stack_name: str) -> str | None:
    """The outermost module under the head that holds the layers."""
    prefix = name_of(model, runner)
    names = (f"{prefix}.{name}" if prefix else name for name, _ in runner.named_children())
    return next((name for name in names if stack_name.startswith(f"{name}.")), None)


@contextmanager
def zeros_in(model: nn.Module, base: str, device: torch.device) -> Iterator[dict[int, str]]:
    """Inside, zeros stand for every weight that is not loaded, those of the base with memory of their own; yields their
    storages and names. A CPU gives memory to none of them that are not written to."""
    with zeros_outside(model, NOTHING, device) as found:
        names = {name: storage for storage, name in found.items()}
        for prefix, module in model.get_submodule(base).named_modules(prefix=base):
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for leaf, value in table.items():
                    name = f"{prefix}.{leaf}"
                    if value is None or name not in names or isinstance(module, nn.Embedding):
                        continue
                    zero = unwritten_zeros(value.shape, value.dtype, device)
                    table[leaf] = nn.Parameter(zero, requires_grad=False) if isinstance(value, nn.Parameter) else zero
                    found.pop(names[name], None)  # whose tensor is gone, so that others may be where it was
                    found[storage_of(zero)] = name
        yield found


@dataclass
class BlockLayout:
    """States of rows of one length: the columns of what enters the block or leaves it, then those of the ids.

    entering: shape of one row of what enters
    """

    block: Block
    model: nn.Module
    runner: Any
    dtype: torch.dtype
    tokens: int
    entering: tuple[int, ...]
    seeded: bool | None = None  # whether it draws the same random numbers in every run; None: it has drawn none so far
    is_plain = False

    @property
    def hidden_width(self) -> int:
        return max(-(-math.prod(self.entering) // self.tokens), self.block.leaving)

    @property
    def _ids_columns(self) -> int:
        return pieces_of(torch.int64, self.dtype)

    @property
    def width(self) -> int:
        return self.hidden_width + self._ids_columns

    def hidden_of(self, state: Tensor) -> Tensor:
        """What the head takes [rows, tokens, width], of a state that leaves the block."""
        return state[..., : self.block.leaving]

    def first(self, runner: Any, layers: Any, ids: Tensor) -> Tensor:
        """The state of rows [rows, tokens]. What the embedding reads must be loaded."""
        flat = _embedded(self.block, self.model, runner, ids).flatten(1)
        flat = nn.functional.pad(flat, (0, self.tokens * self.hidden_width - flat.shape[1]))
        hidden = flat.unflatten(1, (self.tokens, self.hidden_width)).to(self.dtype)
        return torch.cat((hidden, split_values(ids, self._ids_columns, self.dtype).transpose(1, 2)), -1)

    def run(self, index: int, layer: nn.Module, state: Tensor) -> Tensor:
        """The loaded block on a state, [rows, tokens, width]; so is what leaves it."""
        columns = state[..., self.hidden_width :]
        ids = join_values(columns.transpose(1, 2), torch.int64, self.dtype)
        flat = state[..., : self.hidden_width].flatten(1)[:, : math.prod(self.entering)]
        entering = flat.unflatten(1, self.entering)
        before = torch.get_rng_state()
        out = self._result(entering, ids)
        after = torch.get_rng_state()
        if not torch.equal(before, after):
            self._check_seeded(entering, ids, after)
            torch.set_rng_state(before)
        padded = nn.functional.pad(out, (0, self.hidden_width - self.block.leaving))
        return torch.cat((padded.to(self.dtype), columns), -1)

    def _result(self, entering: Tensor, ids: Tensor) -> Tensor:
        """What the loaded block gives the head."""
        embedding, base = (self.model.get_submodule(name) for name in (self.block.embedding, self.block.base))
        found: list[Tensor] = []

        def run_base(*args: Any, **kwargs: Any) -> Any:
            found.append(result_of(type(base).forward(base, *args, **kwargs)))
            raise Reached

        with (
            zeros_outside(self.model, NOTHING, ids.device),
            gradients_of_all_runs(),
            patched([embedding, base], [lambda *args, **kwargs: entering, run_base]),
            contextlib.suppress(Reached),
        ):
            run_own(self.runner, ids)
        return found[0]

    @torch.no_grad()
    def _check_seeded(self, entering: Tensor, ids: Tensor, after: Tensor) -> None:
        """Raise UnsupportedError for a model whose numbers are others in every run: one that sets a seed of its own
        leaves torch's generator in the same state wherever it was."""
        if self.seeded is None:
            self._result(entering, ids)
            self.seeded = torch.equal(after, torch.get_rng_state())
        if not self.seeded:
            raise UnsupportedError(
                f"{type(self.model).__name__} draws other random numbers in every run; not supported"
            )


@contextmanager
def gradients_of_all_runs() -> Iterator[None]:
    """Inside, where gradients are wanted, a forward that trains on its last rounds alone gives those of all."""
    if not torch.is_grad_enabled():
        yield
        return
    before: Callable[..., Any] = torch.no_grad
    torch.no_grad = contextlib.nullcontext  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.no_grad = before  # type: ignore[misc,assignment]


@torch.no_grad()
def record_block(block: Block, model: nn.Module, runner: Any, ids: Tensor, dtype: torch.dtype) -> BlockLayout:
    """For rows as long as ids, [1, tokens]. What the embedding reads must be loaded."""
    entering = _embedded(block, model, runner, ids)
    return BlockLayout(block, model, runner, dtype, ids.shape[1], tuple(entering.shape[1:]))


def _embedded(block: Block, model: nn.Module, runner: Any, ids: Tensor) -> Tensor:
    """What the embedding gives, called as the model's own forward calls it."""
    embedding = model.get_submodule(block.embedding)
    found: list[Tensor] = []

    def embed(*args: Any, **kwargs: Any) -> Any:
        found.append(type(embedding).forward(embedding, *args, **kwargs))
        raise Reached

    with zeros_outside(model, NOTHING, ids.device), patched([embedding], [embed]), contextlib.suppress(Reached):
        run_own(runner, ids)
    return found[0]
