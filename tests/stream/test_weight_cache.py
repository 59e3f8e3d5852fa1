"""Decoded weights that are held: the same values, decoded once, as far as there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.diff import DiffOptions, measure_many
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.io.memory import available_bytes
from recompile.merge.overlay import build_overlay
from recompile.merge.weight_cache import WeightStore
from tests import tiny


def test_a_mix_shares_what_its_checkpoints_hold(tmp_path: Path) -> None:
    variants = tiny.variants("llama", (2, 4))
    two, four = (open_checkpoint(variants[bits]) for bits in (2, 4))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources:\n- {{id: 4, model_dir: {variants[4]}}}\noverrides:\n- {{key: '*.v_proj.*', source: 4}}\n"
    )
    mix = build_overlay(two, recipe)
    (four_of_mix,) = mix.sources.values()
    store = WeightStore(2**30)
    held = store.over(mix)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv"]
    for name in names:
        assert torch.equal(held.load(name), mix.load(name))
    assert held.load(names[0]) is store.over(two).load(names[0])
    assert held.load(names[1]) is store.over(four_of_mix).load(names[1])
    assert torch.equal(held.load(names[1]), four.load(names[1]))
    assert not torch.equal(held.load(names[1]), store.over(two).load(names[1]))
    assert (held.config, held.label) == (mix.config, mix.label)
    assert list(held.modules) == list(mix.modules)
    assert held.has(f"{names[0]}_packed") == mix.has(f"{names[0]}_packed")


def test_what_does_not_fit_is_decoded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny.variants("llama", (4,))[4])
    name, other = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    size = checkpoint.load(name).nbytes
    store = WeightStore(size)
    held = store.over(checkpoint)
    assert held.load(name) is held.load(name)
    assert store.held_bytes == size
    loads = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, *a, **k: loads.append(a) or load(self, *a, **k))
    for _ in range(3):
        held.load(other)
        held.load(name)
    assert loads == [(other,)] * 3
    assert store.held_bytes == size


def test_mixes_that_run_together_decode_what_they_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = tiny.variants("llama", (2, 4))
    two, base = open_checkpoint(variants[2]), open_checkpoint(tiny.base("llama"))
    mixes = [build_overlay(two, None)]
    for number, key in enumerate(("*.v_proj.*", "*.down_proj.*")):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(
            f"sources:\n- {{id: 4, model_dir: {variants[4]}}}\noverrides:\n- {{key: '{key}', source: 4}}\n"
        )
        mixes.append(build_overlay(two, recipe))
    alone = [measure_many([mix], base, tiny.rows(2, 8))[0] for mix in mixes]
    loads: list[tuple[str, str]] = []
    load = Checkpoint.load

    def counted(self: Checkpoint, tensor: str, **how: object) -> torch.Tensor:
        loads.append((self.label, tensor))
        return load(self, tensor, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "load", counted)
    together = measure_many(mixes, base, tiny.rows(2, 8))
    layers = [entry for entry in loads if ".layers." in entry[1]]
    assert len(layers) == len(set(layers))
    for tensor, label, count in (("q_proj", "2bpw", 1), ("v_proj", "2bpw", 1), ("v_proj", "4bpw", 1)):
        name = f"model.layers.0.self_attn.{tensor}.weight"
        assert sum(label in who and what == name for who, what in layers) == count
    assert [report.kl_rows for report in together] == [report.kl_rows for report in alone]
    loads.clear()
    measure_many(mixes, base, tiny.rows(2, 8), DiffOptions(max_memory_bytes=2**34))
    assert len(loads) > len(set(loads)), "a cap leaves no room for that"


def test_the_memory_that_is_left_is_less_than_there_is() -> None:
    left = available_bytes()
    assert left >= 0
    if Path("/proc/meminfo").exists():
        total = int(Path("/proc/meminfo").read_text().split()[1]) * 2**10
        assert 0 < left <= total
