"""What a large vocabulary costs a sketch: the head's share of a sweep, on a synthetic Gemma 3 of 262,144 tokens.

.venv/bin/python scripts/bench_head.py [--rows 4 --length 256 --samples 8]

18 layers of 640, tied head, random weights; integers of 2 to 6 bits made on the fly; one thread. The head's seconds are
those from the last layer's forward to the end of its backward, less what the other layers' backward takes (median).
Goal: at most a third of the sweep. Beside it, in the same process: what one draw at a time would take, a softmax and a
product with the head each (labels of p, then (p - label) @ head), timed on one chunk of tokens and scaled.
Writes scripts/bench_results/head.json.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from bench_record import RESULTS, birth_certificate, keep  # noqa: E402

VOCAB, HIDDEN, LAYERS = 262_144, 640, 18
CHUNK = 128  # tokens of the plain way that are timed


def make_model(folder: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def sweep(base: Path, ids: Path, samples: int, out: Path) -> dict[str, Any]:
    """CPU seconds of one sweep and of its head."""
    import recompile
    from recompile.events import Progress

    seen: list[tuple[str, float]] = []

    def note(event: object) -> None:
        if isinstance(event, Progress) and event.text.startswith("sweep 1"):
            seen.append((event.text, time.process_time()))

    started = time.process_time()
    recompile.profile(
        base,
        candidates=["2", "3", "4", "6"],
        mode="sketch",
        input_ids=ids,
        samples=samples,
        importance=False,
        importance_rows=0,
        out=out,
        on_event=note,
    )
    ended = time.process_time()
    forward = [at for text, at in seen if text.endswith("forward")]
    backward = [at for text, at in seen if ", layer " in text]
    layers = [after - before for before, after in itertools.pairwise(backward)]
    head = backward[0] - forward[-1] - statistics.median(layers)
    return {"all_s": ended - started, "head_s": head, "share": head / (ended - started), "layers": len(layers) + 1}


@torch.no_grad()
def plainly(tokens: int, samples: int) -> float:
    """CPU seconds of as many draws with a softmax and a product each."""
    head = torch.randn(VOCAB, HIDDEN) * 0.02
    states = torch.randn(CHUNK, HIDDEN)
    started = time.process_time()
    p = (states @ head.T).softmax(-1)
    labels = torch.multinomial(p, 1)[:, 0]
    change = p.clone()
    change[torch.arange(CHUNK), labels] -= 1
    change @ head
    return (time.process_time() - started) * tokens / CHUNK * samples


@click.command()
@click.option("--rows", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--samples", default=8, show_default=True)
def main(rows: int, length: int, samples: int) -> None:
    """One sweep, and what is in it."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    certificate = birth_certificate()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "base")
        ids = torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": ids}, Path(folder) / "ids.safetensors")
        found = sweep(Path(folder) / "base", Path(folder) / "ids.safetensors", samples, Path(folder) / "p.jsonl")
    plain = plainly(rows * length, samples)
    result = {"rows": rows, "tokens": length, "samples": samples, "vocab": VOCAB, "hidden": HIDDEN, **found}
    keep(RESULTS / "head.json", {**certificate, **result, "goal": "share <= 1/3", "a_draw_at_a_time_s": plain})
    print(f"head {found['head_s']:.1f} of {found['all_s']:.1f} s ({found['share']:.2f}); plainly {plain:.1f} s")


if __name__ == "__main__":
    main()
