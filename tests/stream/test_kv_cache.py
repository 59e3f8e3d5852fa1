"""Every architecture attends through a cache that changes what it is given, as through transformers' own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recompile.checkpoint.checkpoint import WeightSource, open_checkpoint
from recompile.errors import UnsupportedError
from recompile.formats.cache_types import parse_cache
from recompile.model.kv_cache import SimulatedCache, Storing, attends
from recompile.model.stream import LayeredModel
from tests import tiny
from tests.stream import architectures

# Layers of the tiny models that keep keys and values, where these are not all of them.
SOME = {"qwen3-next": 1, "lfm2": 1, "nemotron-h": 1, "gemma3n": 2, "gemma4": 2}


def coarse(module: nn.Module | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """So coarse that nobody takes it for noise; keys and values differently."""
    return (keys * 4).round() / 4, (values * 2).round() / 2


@torch.inference_mode()
def logits_through(source: WeightSource, ids: Tensor, storing: Storing) -> tuple[Tensor, SimulatedCache]:
    model, cache = LayeredModel.of(source, dtype=torch.float32), SimulatedCache(storing)
    states = list(model.embed(ids, 2))
    for index in range(model.depth):
        with model.layer(index) as layer, cache.of_layer(layer):
            states = [model.run_layer(index, state) for state in states]
    with model.norm_loaded() as norm:
        states = [norm(state) for state in states]
    with model.head_loaded():
        return torch.cat([model.logits(state) for state in states]), cache


def coarse_cache(config: Any) -> Any:
    from transformers.cache_utils import DynamicCache

    class Coarse(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:  # type: ignore[override]
            return super().update(*coarse(None, keys, values), *more, **named)

    return Coarse(config=config)


# Mamba 2 keeps states alone, no keys and values
@pytest.mark.parametrize("name", [name for name in architectures.TYPES if name != "mamba2"])
def test_logits_are_those_of_transformers_with_such_a_cache(name: str) -> None:
    directory, ids = architectures.checkpoint(name), architectures.rows(2, 13)
    source, plain = open_checkpoint(directory), architectures.plain_model(directory)
    without = tiny.plain_logits(plain, ids, 2)
    same, _ = logits_through(source, ids, lambda module, keys, values: (keys, values))
    assert float((same - without).abs().max()) <= 1e-5 * float(without.max() - without.min())
    found, cache = logits_through(source, ids, coarse)
    argument = "cache" if "cache" in inspect.signature(type(plain).forward).parameters else "past_key_values"
    with torch.inference_mode():
        wanted = plain(input_ids=ids, use_cache=True, **{argument: coarse_cache(plain.config)}).logits
    scale = float(wanted.max() - wanted.min())
    assert float((found - wanted).abs().max()) <= 1e-5 * scale
    assert float((found - without).abs().max()) > 1e-2 * scale, "the cache changes something"
    assert cache.layers == SOME.get(name, len(LayeredModel.of(source).layers))
    assert min(cache.values_per_token) > 0


def test_values_per_token_are_those_of_the_configuration() -> None:
    source = open_checkpoint(architectures.checkpoint("llama"))
    _, cache = logits_through(source, architectures.rows(3, 9), coarse)
    assert cache.values_per_token == (2 * 2 * 8, 2 * 2 * 8)  # layers, heads, values of a head
    _, latent = logits_through(
        open_checkpoint(architectures.checkpoint("deepseek-v3")), architectures.rows(1, 9), coarse
    )
    assert latent.values_per_token == (2 * 16, 2 * 4)  # the latent, and its rotary part


def test_latents_as_exllamav3_stores_them() -> None:
    source, ids = open_checkpoint(architectures.checkpoint("deepseek-v3")), architectures.rows(1, 9)
    with pytest.raises(UnsupportedError, match=r"stores latents \(MLA\)"):
        logits_through(source, ids, SimulatedCache.of(parse_cache("q8_0"), "deepseek_v3").storing)


def test_a_model_that_keeps_no_keys_is_told_apart(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2, conv_kernel=4)
    assert not attends(AutoModelForCausalLM.from_config(config).backbone.layers)
    assert attends(LayeredModel.of(open_checkpoint(architectures.checkpoint("nemotron-h"))).layers)
