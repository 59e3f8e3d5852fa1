"""The main job against named peers, each pair run in turn on the same work. Writes scripts/bench_results/main.json.

.venv/bin/python scripts/bench_main.py            # everything; about 20 minutes on 2 cores
.venv/bin/python scripts/bench_main.py copy diff  # some parts

copy     recompile against `cp` + sync of the same bytes, and its peak memory   goals: 1.2x, 400 MiB
diff     model_diff against two plain transformers forwards of the same rows    goals: 1.15x at 2,048, 1.10x at 16,384
memory   model_diff's peak memory on a 30-layer model                           goal:  a quarter of the model
profile  the exact profile against one full forward per swap                    goal:  1.8x faster
start    what comes before the first layer: imports, and the model's structure  goal:  2.5 s on SmolLM2
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
RESULTS = ROOT / "scripts" / "bench_results" / "main.json"
PARTS = ("copy", "diff", "memory", "profile", "start")


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def pairs(ours: Callable[[], Any], theirs: Callable[[], Any], count: int) -> dict[str, Any]:
    """Run two jobs in turn; the ratio is the median over pairs, so that a machine that drifts hurts both."""
    left, right = [], []
    for _ in range(count):
        right.append(timed(theirs))
        left.append(timed(ours))
    ratios = [a / b for a, b in zip(left, right, strict=True)]
    return {"ours_s": left, "theirs_s": right, "ratio": statistics.median(ratios), "ratios": ratios}


# A process inherits the peak of the one that started it; this small one stands between.
CHILD_JOB = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - started, usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def child(*words: str | Path) -> tuple[float, int]:
    """Run a program; its seconds and its peak resident bytes."""
    command = [sys.executable, "-c", CHILD_JOB, *map(str, words)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(printed[0]), int(printed[1])


# ---- recompile against cp ---------------------------------------------------------------------------------------


def make_synthetic(target: Path, gib: float) -> None:
    """A bf16 checkpoint of `gib` GiB with the tensor names of a Llama; random bytes, made a layer at a time."""
    import numpy as np
    from safetensors.numpy import save_file

    target.mkdir(parents=True)
    generator = np.random.default_rng(0)
    layers = 32
    side = int((gib * 2**30 / 2 / layers / 4) ** 0.5) // 64 * 64
    weight_map = {}
    for layer in range(layers):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")]
        bits = generator.integers(0, 2**14, (4, side, side), dtype=np.uint16)
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file({name: bits[n].view(np.float16) for n, name in enumerate(names)}, target / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (target / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": side}))


def bench_copy(work: Path, gib: float, count: int) -> dict[str, Any]:
    base, variant = work / "base", work / "variant"
    make_synthetic(base, gib)
    shutil.copytree(base, variant)
    recipe = work / "recipe.yaml"
    recipe.write_text(
        f"sources: [{{id: v, model_dir: {variant}}}]\n"
        "overrides: [{key: 'model.layers.*.self_attn.v_proj.*', source: v}]\n"
    )
    out, copied = work / "out", work / "copied"
    peaks: list[int] = []

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        _, peak = child(ROOT / ".venv/bin/recompile", "-i", base, "-o", out, "-or", recipe, "--no-probe", "--quiet")
        times.append(time.perf_counter() - started)
        peaks.append(peak)

    def theirs() -> None:
        shutil.rmtree(copied, ignore_errors=True)
        started = time.perf_counter()
        child("cp", "-r", base, copied)
        child("sync", "-f", copied)
        cp_times.append(time.perf_counter() - started)

    times: list[float] = []
    cp_times: list[float] = []
    for _ in range(count):
        theirs()
        ours()
    ratios = [a / b for a, b in zip(times, cp_times, strict=True)]
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return {
        "bytes": size,
        "ours_s": times,
        "cp_and_sync_s": cp_times,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_rss_mib": max(peaks) / 2**20,
        "note": "recompile hashes every module and fsyncs; cp is followed by sync; start-up included",
    }


# ---- model_diff against plain forwards ----------------------------------------------------------------------------


def bench_diff(count: int) -> dict[str, Any]:
    """2,048 and 16,384 tokens, in one process; more pairs of the short runs."""
    import make_base
    import torch
    from transformers import AutoModelForCausalLM

    from eval.diff import compare
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.model.texts import default_text
    from recompile.model.tokenizer import load_tokenizer
    from recompile.model.tokens import make_rows

    directory = make_base.build()
    checkpoint = open_checkpoint(directory)
    models = [AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for _ in range(2)]

    def measured(rows: int, length: int, times: int) -> dict[str, Any]:
        ids = make_rows(default_text(), load_tokenizer(directory), rows, length, "report").ids

        def theirs() -> None:
            with torch.inference_mode():
                for model in models:
                    for row in ids.split(1):
                        model(row)

        def ours() -> None:
            for _ in compare(checkpoint, checkpoint, ids):
                pass

        ours()  # what is made once a process
        return {**pairs(ours, theirs, times), "rows": rows, "tokens": length}

    return {
        "2048": measured(4, 512, 2 * count),
        "16384": measured(8, 2048, max(2, count - 1)),
        "threads": torch.get_num_threads(),
        "note": "ours: both models' weights read from disk layer by layer, and all statistics; theirs: forwards only, "
        "of models already in memory",
    }


MEMORY_JOB = """
import sys, json, torch
from recompile.checkpoint.checkpoint import open_checkpoint
from eval.diff import compare
import transformers.models.llama.modeling_llama
checkpoint = open_checkpoint(sys.argv[1])
ids = torch.randint(0, 8000, (2, 256), generator=torch.Generator().manual_seed(0))
before = int(open("/proc/self/statm").read().split()[1]) * 4096
for _ in compare(checkpoint, checkpoint, ids):
    pass
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # of this program alone
print(json.dumps([before, int(peak.split()[1]) * 1024]))
"""


def bench_memory(work: Path) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
    )
    target = work / "thirty"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters())
    model.save_pretrained(target)
    del model
    printed = subprocess.run(
        [sys.executable, "-c", MEMORY_JOB, str(target)], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    before, peak = json.loads(printed.splitlines()[-1])
    return {
        "weights": weights,
        "model_float32_mib": 4 * weights / 2**20,
        "imports_mib": before / 2**20,
        "peak_mib": peak / 2**20,
        "added_mib": (peak - before) / 2**20,
        "share_of_one_float32_model": (peak - before) / (4 * weights),
        "note": "peak resident memory above what importing torch and transformers takes, for both models together",
    }


# ---- the exact profile against a forward per swap -----------------------------------------------------------------


def bench_profile(work: Path, rows: int, length: int, variants: Path) -> dict[str, Any]:
    import make_base
    import torch
    from transformers import AutoModelForCausalLM

    from eval.profile.exact import Measured, ProfileJob, ProfileOptions, profile_exact
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.costs import Profile
    from recompile.model.texts import default_text
    from recompile.model.tokenizer import load_tokenizer
    from recompile.model.tokens import make_rows

    directory = make_base.build()
    reference = open_checkpoint(directory)
    ids = make_rows(default_text(), load_tokenizer(directory), rows, length, "choose").ids
    candidates = [(bits, open_checkpoint(variants / f"{bits}bpw")) for bits in (3, 2, 4, 6)]
    layers = (0, 6, 12, 18, 24, 29)  # evenly spread, so that the mean depth is that of a whole profile
    match = tuple(f"model.layers.{layer}.*" for layer in layers)
    journal = work / "profile.jsonl"
    profile: list[Profile] = []

    def ours() -> None:
        journal.unlink(missing_ok=True)
        for event in profile_exact(ProfileJob(reference, 3, candidates, ids, journal, ProfileOptions(match=match))):
            if isinstance(event, Profile):
                profile[:] = [event]
            else:
                assert isinstance(event, Measured) or event.resumed == 0

    naive: dict[tuple[str, str], float] = {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def theirs() -> None:
        by_label = {str(bits): checkpoint for bits, checkpoint in candidates}
        log_p = model(ids).logits.log_softmax(-1)
        for group in profile[0].header.groups:
            kept = {name: model.get_submodule(name).weight.data for name in group.modules}
            for label in group.bits:
                for name in group.modules:
                    model.get_submodule(name).weight.data = by_label[label].load(f"{name}.weight")
                log_q = model(ids).logits.log_softmax(-1)
                naive[(group.name, label)] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            for name, value in kept.items():
                model.get_submodule(name).weight.data = value

    first = timed(ours)
    second = timed(theirs)
    third = timed(ours)
    worst = max(abs(naive[key] - found.mean) / max(found.mean, 1e-4) for key, found in profile[0].measurements.items())
    return {
        "swaps": len(naive),
        "rows": rows,
        "tokens": length,
        "ours_s": [first, third],
        "theirs_s": [second],
        "times_faster": second / statistics.mean([first, third]),
        "largest_relative_difference": worst,
        "note": "groups of 6 evenly spaced layers; ours includes the reference run and every start-up cost",
    }


# ---- before the first layer --------------------------------------------------------------------------------------

# Widths of models that people run, by what they are called.
LARGE_MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama 3.1 70B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "DeepSeek V3": {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
    },
}  # fmt: skip
START_JOB = """
import json, sys, time
started = time.perf_counter()
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
imported = time.perf_counter()
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.io.memory import resident_bytes
from recompile.model.own_forward import Probe
from recompile.model.skeleton import build_skeleton
from recompile.model.stream import LayeredModel, find_runner, find_stack
before = resident_bytes()
if sys.argv[1].startswith("{"):
    device = torch.device("cpu")
    model = build_skeleton(json.loads(sys.argv[1]), torch.float32, device)
    name, layers = find_stack(model)
    Probe(model, find_runner(model, name), list(layers), name, device, "it").run()
else:
    LayeredModel.of(open_checkpoint(sys.argv[1])).structure
print(json.dumps([imported - started, time.perf_counter() - imported, resident_bytes() - before]))
"""


def bench_start(count: int) -> dict[str, Any]:
    """Seconds that importing torch and the model's class take, and what comes after that, in processes of their own."""
    import make_base

    found: dict[str, Any] = {}
    models = {"SmolLM2": str(make_base.build())}
    models |= {name: json.dumps({**config, "tie_word_embeddings": False}) for name, config in LARGE_MODELS.items()}
    for name, given in models.items():
        runs = []
        for _ in range(count):
            command = [sys.executable, "-c", START_JOB, given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            runs.append(json.loads(done.stdout))
        imports, own, held = (statistics.median(values) for values in zip(*runs, strict=True))
        found[name] = {"imports_s": imports, "structure_s": own, "held_bytes": held, "ratio": own / imports}
        click.echo(f"  {name}: imports {imports:.2f} s, structure {own:.2f} s, {held / 2**20:.0f} MiB held", err=True)
    return {"models": found, "note": "medians; float32; held_bytes: resident memory that is more afterwards"}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--gib", default=8.0, show_default=True, help="Size of the synthetic checkpoint of `copy`.")
@click.option("--count", default=3, show_default=True, help="Pairs of runs.")
@click.option("--variants", type=click.Path(path_type=Path), default=ROOT / "demo" / "variants", help="2, 3, 4, 6 bpw.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where the large files go; default a temporary directory."
)
def main(parts: tuple[str, ...], gib: float, count: int, variants: Path, work: Path | None) -> None:
    """Run the benchmarks and keep the newest figures."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in parts or PARTS:
        place = Path(tempfile.mkdtemp(prefix=f"bench-{part}-", dir=work))
        try:
            click.echo(f"{part} ...", err=True)
            jobs: dict[str, Callable[[], dict[str, Any]]] = {
                "copy": lambda place=place: bench_copy(place, gib, count),
                "diff": lambda place=place: bench_diff(count),
                "memory": lambda place=place: bench_memory(place),
                "profile": lambda place=place: bench_profile(place, 4, 128, variants),
                "start": lambda: bench_start(count),
            }
            result = jobs[part]()
        finally:
            shutil.rmtree(place, ignore_errors=True)
        found[part] = {
            **result,
            "command": f"scripts/bench_main.py {part}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": _versions(),
        }
        click.echo(json.dumps({part: result}, indent=2))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def _versions() -> dict[str, str]:
    from eval.diff import versions

    return {**versions(), "python": platform.python_version()}


if __name__ == "__main__":
    main()
