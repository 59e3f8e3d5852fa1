"""A layer's attention through a cache that changes the keys and values that it is given: a quantized cache, simulated.

transformers' attention hands its keys (rotary embedding applied) and values to a Cache object and goes on with what
that returns. Here the object stores nothing: it returns them as the cache would give them back. So every architecture
attends in its own forward, and layers that hand keys to later ones (Gemma 3n and 4) hand on the stored ones. Modules
with other state (Mamba, linear attention, convolutions) get no cache and run as they do without one.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from recompile.errors import UnsupportedError
from recompile.formats.cache_types import CacheFormat
from recompile.formats.kv_cache import store, store_latent
from recompile.gguf.architectures import keys_are_interleaved

# What transformers' modules call the cache that they are given.
_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
# (module that attends, keys, values) -> both as they are read again
Storing: TypeAlias = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Held:
    """What one module stores of a token: values of keys and of values; window: tokens that it looks back at most."""

    keys: int
    values: int
    window: int | None
    is_latent: bool


@dataclass
class SimulatedCache:
    """What a model's caches hold and give back, layer by layer.

    stored_as: how an engine stores it; None where `storing` is something else
    """

    storing: Storing
    stored_as: CacheFormat | None = None
    _held: dict[tuple[nn.Module, nn.Module], _Held] = field(default_factory=dict)  # by layer and module

    @property
    def layers(self) -> int:
        """Layers that stored something."""
        return len({layer for layer, _ in self._held})

    @property
    def values_per_token(self) -> tuple[int, int]:
        """Of keys, of values, over all layers."""
        return sum(held.keys for held in self._held.values()), sum(held.values for held in self._held.values())

    def bytes_per_token(self) -> dict[int | None, float]:
        """Stored bytes a token of context, by the window of the layers that store them; None: layers without one."""
        assert self.stored_as is not None, "only of an engine's cache"
        found: dict[int | None, float] = {}
        for held in self._held.values():
            value_bits = 16.0 if held.is_latent else self.stored_as.value_bits
            bits = held.keys * self.stored_as.key_bits + held.values * value_bits
            found[held.window] = found.get(held.window, 0.0) + bits / 8
        return found

    @classmethod
    def of(cls, stored_as: CacheFormat, model_type: str) -> SimulatedCache:
        """One that stores as an engine does. Raises UnsupportedError and FormatError when a layer runs.

        model_type: of config.json; llama.cpp has the keys of some in an order of its own
        """
        interleaved = keys_are_interleaved(model_type)

        def storing(module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if hasattr(module, "kv_lora_rank"):
                return store_latent(keys, values, stored_as)
            if keys is values:
                raise UnsupportedError(
                    f"{{cache_quant}}: {type(module).__name__} keeps one tensor as keys and values, which is not "
                    f"simulated; leave {{cache_quant}} out"
                )
            return store(keys, values, stored_as, interleaved=interleaved)

        return cls(storing, stored_as)

    @contextmanager
    def of_layer(self, layer: nn.Module) -> Iterator[None]:
        """While this lasts, every run of `layer` attends through this cache."""
        handles = []
        for module in layer.modules():
            name = _argument_of(type(module).forward)
            if name is not None:
                handles.append(module.register_forward_pre_hook(self._hook(layer, name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: nn.Module, name: str) -> Any:
        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            place = list(inspect.signature(type(module).forward).parameters).index(name) - 1  # without self
            before = args[place] if place < len(args) else kwargs.get(name)
            handed = _cache_class()(partial(self._store, layer, module), before)
            if place < len(args):
                return (*args[:place], handed, *args[place + 1 :]), kwargs
            return args, {**kwargs, name: handed}

        return give

    def _store(self, layer: nn.Module, module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._held[layer, module] = _Held(
            _per_token(keys), _per_token(values), _window_of(module), hasattr(module, "kv_lora_rank")
        )
        return self.storing(module, keys, values)


def attends(layers: nn.Module) -> bool:
    """Whether any of the layers keeps keys and values for later tokens."""
    return any(_argument_of(type(module).forward) is not None for module in layers.modules())


def _window_of(module: nn.Module) -> int | None:
    """Tokens that a module looks back at most; None for all of them."""
    if hasattr(module, "sliding_window"):
        found: Any = module.sliding_window
    else:  # Mistral's modules ask the configuration, where every layer has the window
        config = getattr(module, "config", None)
        found = getattr(config, "sliding_window", None) if not getattr(config, "layer_types", None) else None
    return found if isinstance(found, int) and found > 0 else None


def _per_token(stored: Tensor) -> int:
    """Values a token of [rows, heads, tokens, head dimension]."""
    return stored.shape[1] * stored.shape[3] if stored.dim() == 4 else stored.shape[-1]


@cache
def _cache_class() -> type[Any]:
    from transformers.cache_utils import DynamicCache

    class _PassingCache(DynamicCache):
        """Empty before and after every call, or what hands on to the cache `before` of a row that runs in pieces."""

        def __init__(self, through: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], before: Any) -> None:
            super().__init__()
            self.through, self.before = through, before

        def update(self, keys: Tensor, values: Tensor, *where: Any, **how: Any) -> Any:  # type: ignore[override]
            stored = self.through(keys, values)
            return stored if self.before is None else self.before.update(*stored, *where, **how)

        def get_seq_length(self, *where: Any) -> int:
            return self.before.get_seq_length(*where) if self.before is not None else 0

        def update_indexer(self, keys: Tensor, *_: Any) -> Tensor:
            return keys  # of sparse attention; engines keep them as they are

        # of convolutions inside of attention (Inkling), whose states stay what they are
        def get_conv_state(self, *_: Any, **__: Any) -> None:
            return None

        def update_conv_state(self, states: Tensor, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            return states

        def has_previous_state(self, *_: Any, **__: Any) -> bool:
            return False

    return _PassingCache


@cache
def _argument_of(forward: Callable[..., Any]) -> str | None:
    """The argument under which a module's forward takes the cache that it stores keys and values in; None for a module
    that hands it on, or stores something else."""
    names = inspect.signature(forward).parameters
    found = next((name for name in _ARGUMENTS if name in names), None)
    if found is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    stores = any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and len(node.args) >= 3  # keys, values, the layer's number
        for node in ast.walk(tree)
    )
    return found if stores else None
