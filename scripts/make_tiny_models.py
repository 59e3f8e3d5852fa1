#!/usr/bin/env python3
"""Train two tiny language models on the bundled text, for tests that need the structure that a random model lacks.

    tiny-dense  llama: 4 layers, hidden 256, MLP 512, 8 heads over 4 key-value heads of 64; every width is a multiple of
                256, so that formats with super-blocks of 256 apply to every matrix
    tiny-moe    qwen3_moe: 4 layers, hidden 256, 8 experts of 256 of which 2 see a token, no shared expert (that
                architecture has none); tensors are named expert by expert, as released checkpoints are

Both share a byte-level BPE tokenizer of 512 tokens. Tokenizer and weights see documents of the role `calibrate` only
(recompile.tokens), so rows of the other roles are held out. Seeded: the same processor and torch give the same files.

A minute of one core is no time to learn a language from nothing. So embedding and head begin as the best guess from one
token alone, fitted to the counts of neighbours, which takes a second; every layer begins by adding nothing to that, and
attention in the first by looking a few tokens back. What is left to learn is what the context says.

    scripts/make_tiny_models.py                 makes what is missing (two minutes on 2 cores), prints both directories
    scripts/make_tiny_models.py --root DIR      default: ~/.cache/recompile/tiny-models-HASH, a hash of this file
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.errors import OutputError, RecompileError

if TYPE_CHECKING:
    from torch import Tensor

VOCAB = 512  # few: tokens that are seen often enough, and a small head
ROW_TOKENS = 64
BATCH_ROWS = 8
HELD_OUT_ROWS, HELD_OUT_TOKENS = 32, 128
RATE = 6e-3
ENDS_RATE = 3e-4  # of embedding and head, which begin well
BALANCE = 0.02  # of the loss that keeps experts in use, a layer
PAIR_STEPS = 300
PAIR_RATE = 0.03
PRIOR = 2.0  # tokens, spread as all text is, that count as seen after each token
BIAS = 4.0  # the first number of every token's embedding: gives the head a bias, and attention something to look for
LOOKS_BACK = 4  # heads of the first layer begin by looking 1, 2, ... so many tokens back
SHARPNESS = 1.5  # of that look
RECORD = "made_by_recompile.json"  # written last: a directory that has it is whole
NAMES = ("tiny-dense", "tiny-moe")
ROOT = Path(__file__).resolve().parent.parent

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attention_bias": False,
}


@dataclass(frozen=True)
class Spec:
    """How one model is built and trained."""

    architecture: str
    config: dict[str, Any]
    steps: int


SPECS = {
    "tiny-dense": Spec(
        "Llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512, "mlp_bias": False}, 320
    ),
    "tiny-moe": Spec(
        "Qwen3Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "router_aux_loss_coef": BALANCE,
            "mlp_only_layers": [],
        },
        280,
    ),
}


def default_root() -> Path:
    """`$XDG_CACHE_HOME/recompile/tiny-models-HASH`, or the same under `~/.cache`. The hash is of this file."""
    cache = os.environ.get("XDG_CACHE_HOME")
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return (Path(cache) if cache else Path.home() / ".cache") / "recompile" / f"tiny-models-{digest}"


def build(root: Path | None = None, names: Sequence[str] = NAMES) -> dict[str, Path]:
    """Make sure that the models are below `root` (default: `default_root()`); returns their directories by name.

    What is missing is trained side by side, a process and one thread for each (so that the result does not depend on
    the number of cores). Raises OutputError where that fails.
    """
    root = (default_root() if root is None else Path(root)).absolute()
    missing = [name for name in names if not is_whole(root / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, "--root", str(root), "--only"]
    running = [
        subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in missing
    ]
    for name, process in zip(missing, running, strict=True):
        _, errors = process.communicate()
        if process.returncode or not is_whole(root / name):
            raise OutputError(f"{root / name}: cannot be made: {errors.strip()[-2000:]}")
    return {name: root / name for name in names}


def is_whole(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def build_one(name: str, root: Path) -> Path:
    """Train one model unless it is there; it is written as `NAME.partial` and renamed. A second process waits."""
    if not is_whole(root / name):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{name}.lock"):
            if not is_whole(root / name):
                make_model(name, root)
    return root / name


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel lets go of it even when the process is killed."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make_model(name: str, root: Path) -> None:
    """Train one model and put it at `root/name`."""
    from recompile.model import texts, tokens

    partial = root / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(root / name, ignore_errors=True)  # has no record: cut off
    partial.mkdir()
    started = time.monotonic()
    text = texts.default_text()
    tokenizer = train_tokenizer([d.text for d in texts.documents_of(text, "calibrate")], partial)
    ids = tokens.make_rows(text, tokenizer, None, ROW_TOKENS, "calibrate").ids
    held_out = tokens.make_rows(text, tokenizer, HELD_OUT_ROWS, HELD_OUT_TOKENS, "report").ids
    model = train(SPECS[name], ids, seed=NAMES.index(name))
    report = {"name": name, "training_tokens": SPECS[name].steps * BATCH_ROWS * ROW_TOKENS}
    report |= judge(model, ids, held_out)
    save(model, partial)
    report["seconds"] = round(time.monotonic() - started, 1)
    (partial / RECORD).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.rename(root / name)


def train_tokenizer(texts: list[str], folder: Path) -> Any:
    """A byte-level BPE tokenizer of `VOCAB` tokens, saved in `folder`; token 0 is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=1024
    )
    made.save_pretrained(str(folder))
    return made


def train(spec: Spec, ids: Tensor, seed: int) -> Any:
    """A model trained on rows of ids, int64 [rows, tokens]: fitted to pairs of tokens, then AdamW on whole rows."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config_class = getattr(transformers, f"{spec.architecture}Config")
        model = getattr(transformers, f"{spec.architecture}ForCausalLM")(config_class(**COMMON, **spec.config)).float()
        model.train()
        options = router_options(model)
        if options:
            model.set_experts_implementation("eager")  # the quickest on a CPU
        fit_pairs(model, ids)
        begin_layers(model)
        ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        inner = [parameter for parameter in model.parameters() if not any(parameter is end for end in ends)]
        groups = [{"params": inner, "lr": RATE, "weight_decay": 0.05}, {"params": ends, "lr": ENDS_RATE}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(  # warm up; cool the last two thirds
            optimizer, lambda step: min(1.0, (step + 1) / 20, 1.5 * (1 - step / spec.steps))
        )
        for step in range(spec.steps):
            rows = ids[torch.randint(len(ids), (BATCH_ROWS,))]
            found = model(input_ids=rows, use_cache=False, **options)
            loss = cross_entropy(found.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            uneven = [unevenness(logits, model.config.num_experts_per_tok) for logits in found.get("router_logits", ())]
            (loss + BALANCE * sum(uneven)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if os.environ.get("TINY_MODELS_VERBOSE") and step % 20 == 0:
                print(step, round(float(loss.detach()), 3), file=sys.stderr, flush=True)
    return model.eval()


def router_options(model: Any) -> dict[str, bool]:
    return {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}


def unevenness(router_logits: Tensor, chosen: int) -> Tensor:
    """How unevenly a layer uses its experts, 1 where it uses all alike. router_logits: [tokens, experts]; the loss of
    the Switch Transformer (Fedus et al., 2021). The one in transformers adds up all layers first, so that each may
    settle on experts of its own."""
    from torch.nn.functional import one_hot

    experts = router_logits.shape[-1]
    tokens = one_hot(router_logits.topk(chosen, -1).indices, experts).float().mean((0, 1))  # share of each expert
    return experts * (tokens * router_logits.softmax(-1).mean(0)).sum()


def fit_pairs(model: Any, ids: Tensor) -> None:
    """Fit embedding and head so that, with nothing between them, each token predicts what follows it in rows of ids."""
    import torch
    from torch.nn.functional import rms_norm

    share = pair_shares(ids)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # [vocab, hidden]
    with torch.no_grad():
        embedding.normal_()
        embedding[:, 0] = BIAS
        head[:, 0] = share.sum(0).log() / BIAS
    optimizer = torch.optim.Adam([embedding, head])
    for step in range(PAIR_STEPS):
        optimizer.param_groups[0]["lr"] = PAIR_RATE * (1 - step / PAIR_STEPS)
        logits = rms_norm(embedding, embedding.shape[1:]) @ head.T
        optimizer.zero_grad()
        (-(share * logits.log_softmax(-1)).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        embedding.copy_(rms_norm(embedding, embedding.shape[1:]))


def pair_shares(ids: Tensor) -> Tensor:
    """Of all neighbours in rows of ids the share that are (token, next token), float32 [vocab, vocab], none of it 0."""
    import torch

    counts = torch.bincount((ids[:, :-1] * VOCAB + ids[:, 1:]).flatten(), minlength=VOCAB**2).view(VOCAB, VOCAB)
    frequency = counts.sum(0) + 0.5
    smooth = counts + PRIOR * frequency / frequency.sum()
    return smooth / smooth.sum()


def begin_layers(model: Any) -> None:
    """Let every layer begin by adding nothing, and the heads of the first by looking 1 to LOOKS_BACK tokens back.

    Rotary positions turn the numbers (i, i + half) of queries and keys by an angle that grows with the position. A
    query that begins turned back by some tokens meets its like there. Only pairs that turn fast tell neighbours apart.
    """
    import torch

    half = model.config.head_dim // 2
    turns = model.config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)  # radians a token
    fast = SHARPNESS * (torch.arange(half) < half // 4)
    with torch.no_grad():
        mean = model.get_input_embeddings().weight.mean(0)
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        attention = model.model.layers[0].self_attn
        for projection, backs in ((attention.q_proj, range(1, LOOKS_BACK + 1)), (attention.k_proj, (0,))):
            for number, rows in enumerate(projection.weight.split(2 * half)):  # a head each, [head, hidden]
                angles = backs[number % len(backs)] * turns
                looks = torch.cat([fast * angles.cos(), -fast * angles.sin()])
                rows += torch.outer(looks, mean / mean.square().sum())  # for what all tokens have in common


def judge(model: Any, ids: Tensor, rows: Tensor) -> dict[str, Any]:
    """Cross entropy on held-out rows in nats per token, and how evenly experts are used.

    Beside the model's stands that of guesses from counts in the rows `ids` that it was trained on: from frequencies
    (unigram) and from the token before (bigram).
    """
    import torch
    from torch.nn.functional import cross_entropy

    options = router_options(model)
    with torch.inference_mode():
        found = model(input_ids=rows, use_cache=False, **options)
    before, after, share = rows[:, :-1].flatten(), rows[:, 1:].flatten(), pair_shares(ids)
    report: dict[str, Any] = {
        "held_out_nats": round(float(cross_entropy(found.logits[:, :-1].flatten(0, 1), after)), 4),
        "bigram_nats": round(float(cross_entropy(share.log()[before], after)), 4),
        "unigram_nats": round(float(-share.sum(0).log()[after].mean()), 4),
        "uniform_nats": round(math.log(VOCAB), 4),
    }
    if options:
        chosen = [logits.topk(model.config.num_experts_per_tok, dim=-1).indices for logits in found.router_logits]
        counts = [torch.bincount(c.flatten(), minlength=model.config.num_experts) for c in chosen]
        report["expert_tokens"] = [count.tolist() for count in counts]
    return report


def save(model: Any, folder: Path) -> None:
    """Write bf16 weights and the config; experts by name."""
    import torch

    model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--root", type=Path, default=default_root(), help="default: %(default)s")
    parser.add_argument("--only", choices=NAMES, help="make this one, in this process")
    given = parser.parse_args()
    try:
        if given.only is not None:
            print(build_one(given.only, given.root.absolute()))
        else:
            for folder in build(given.root).values():
                print(folder, (folder / RECORD).read_text(encoding="utf-8").strip())
    except (RecompileError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
