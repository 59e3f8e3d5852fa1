"""docs/models.md: what works with every causal and image-text model type that transformers lists, by trying it.

    python scripts/make_models_page.py                   # every type, in a process of its own; writes docs/models.md
    python scripts/make_models_page.py --only llama phi3 # those types again; the rest stay as they were
    python scripts/make_models_page.py --missing         # the types that were not tried yet, after an interruption
    python scripts/make_models_page.py --print           # the page from what was tried before, to stdout

A tiny model of the type is made from its default configuration (scripts/tiny_configs.py) and taken the whole way by
the commands: logits beside transformers' own, variants of 3 and 4 bits, a sketch profile, a recipe, a verified merge
with its check, the result loaded by transformers, GGUF names. A cell is "yes" or quotes the refusal. What was tried is
kept in scripts/bench_results/models.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "bench_results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
SECONDS = 240  # a type that takes longer has hung
STEPS = ("logits", "quantize", "profile", "merge", "loads", "gguf")
TITLES = {
    "logits": "logits",
    "quantize": "quantize",
    "profile": "profile",
    "merge": "merge, check",
    "loads": "loads in transformers",
    "gguf": "GGUF names",
}
NOT_RUN = """
Every command that would run one refuses it in a sentence, within a second: config.json and the lists of transformers,
read as text, tell so before torch is imported (`recompile/model/known_types.py`).

- Encoder-decoders (T5, BART as a whole, ...): more than one stack of layers. Their causal halves that transformers
  lists (BartForCausalLM, ...) work.
- diffusion_gemma, an encoder and a decoder: denoises a canvas of 256 tokens that it draws at random and predicts no
  next token, so that there is no KL a token.
- prophetnet, the decoder of an encoder-decoder: beside the tokens its layers carry streams that predict several
  tokens ahead, and its head reads those alone.
- reformer whose config.json sets no `hash_seed`: it hashes with other random numbers in every run, so that no two runs
  agree. With a seed it works; it has gradients in training only, so that `--mode sketch` refers to `--mode exact`.
- idefics, which takes an image with every text; pi0, which moves a robot; gemma4_assistant and
  gemma4_unified_assistant, which draft from the keys and values of another model.

transformers writes -1 over the last balancing bias of every zaya router while it loads, whatever is stored; so does
what runs it here. Outputs keep the stored value.
"""
TOLERANCE = 1e-4  # of the range of the logits, in float32: sums of recurrences differ by their order

sys.path.insert(0, str(Path(__file__).resolve().parent))


class Refused(Exception):
    """A step that ended in a message."""


def listed_types() -> list[str]:
    """Every model type that transformers lists as causal or image-text-to-text, sorted."""
    from transformers.models.auto import modeling_auto as auto

    return sorted({*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


# ---- one type --------------------------------------------------------------------------------------------------------


def _command(name: str, *arguments: object) -> str:
    """Run a command in this process; what it printed. Raises Refused with its message."""
    from importlib import import_module

    from click.testing import CliRunner

    main = import_module(f"recompile.cli.{name}").main
    result = CliRunner().invoke(main, [*map(str, arguments), "--quiet"], catch_exceptions=True)
    if result.exit_code:
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise Refused(f"TRACEBACK {type(result.exception).__name__}: {result.exception}")
        lines = [line for line in result.output.splitlines() if line.strip()]
        start = max((n for n, line in enumerate(lines) if line.startswith("Error:")), default=len(lines) - 1)
        raise Refused(" ".join(lines[start:]).removeprefix("Error: "))
    return result.output


def _ids(folder: Path) -> Path:
    """Four rows of 24 tokens of the tokenizer's 256."""
    import torch
    from safetensors.torch import save_file

    path = folder / "ids.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file({"input_ids": torch.randint(1, 256, (4, 24), generator=generator)}, path)
    return path


def _plain_logits(directory: Path, ids: Path) -> Any:
    """transformers' own logits in float32, [rows, tokens, vocab]. Experts that it decodes while it loads stay in the
    dtype of their scales, and it would compute with them in that."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT

    kind = AutoConfig.from_pretrained(directory).model_type
    auto = AutoModelForImageTextToText if kind in IMAGE_TEXT else AutoModelForCausalLM
    model, told = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    if told["missing_keys"]:
        lost = sorted(told["missing_keys"])
        raise ValueError(f"transformers misses {len(lost)} weights in what it wrote, first {lost[0]}")
    model.eval()
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    rows = load_file(ids)["input_ids"]
    with torch.no_grad():
        try:
            return model(input_ids=rows, use_cache=False).logits.float()
        except AttributeError:  # Llama 4's wrapper asks the output of its text model for a field that it has not
            return model.language_model(input_ids=rows, use_cache=False).logits.float()


def _our_logits(directory: Path, ids: Path, folder: Path) -> Any:
    """Ours of the same tokens, as `model_diff -sla` saves them."""
    from safetensors.torch import load_file

    saved = folder / f"{directory.name}-logits.safetensors"
    report = folder / f"{directory.name}.json"
    _command("model_diff", "-ma", directory, "-mb", directory, "--input-ids", ids, "-sla", saved, "--json", report)
    (kl,) = {json.loads(report.read_text())["kl"]["mean"]}
    if kl != 0:
        raise Refused(f"KL of the model against itself is {kl}")
    (found,) = load_file(saved).values()
    return found.float()


class _AsTransformersLoads:
    """A checkpoint with the weights that transformers gives its model: fused experts rounded to the dtype of their
    scales."""

    def __init__(self, directory: Path) -> None:
        from recompile.checkpoint.checkpoint import open_checkpoint
        from recompile.model.loads import fused_by_transformers

        self._checkpoint = open_checkpoint(directory)
        self._rounded = {f"{name}.weight" for name in fused_by_transformers(self._checkpoint)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def load(self, tensor: str, *, device: Any = "cpu") -> Any:
        import torch

        value = self._checkpoint.load(tensor, device=device)
        return value.to(torch.bfloat16).to(value.dtype) if tensor in self._rounded else value


def _logits_as_loaded(directory: Path, ids: Path) -> Any:
    """Ours of a variant as transformers loads it, [rows, tokens, vocab]."""
    import torch
    from safetensors.torch import load_file

    from recompile.model.stream import LayeredModel

    rows = load_file(ids)["input_ids"]
    model = LayeredModel.of(_AsTransformersLoads(directory), dtype=torch.float32)
    with torch.inference_mode():
        normed = model.normed(rows, len(rows))
        with model.head_loaded():
            return model.logits(normed)


def _compare(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the range of theirs."""
    theirs = theirs[:, : ours.shape[1], : ours.shape[-1]]
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def _try(folder: Path, model_type: str) -> Iterator[tuple[str, str]]:
    """(step, "yes" or why not), one after another; a step that needs a failed one is not tried."""
    import tiny_configs

    base = folder / "base"
    try:
        yield "class", tiny_configs.write(model_type, base)
        ids = _ids(folder)
        theirs = _plain_logits(base, ids)
    except Exception as error:  # whatever a model's own code raises on a tiny configuration
        yield "class", f"not made: {_sentence(error)}"
        return

    def logits() -> None:
        off = _compare(_our_logits(base, ids, folder), theirs)
        if not off < TOLERANCE:
            raise Refused(f"WRONG: off by {off:.1e} of the range")

    def quantize() -> None:
        _command("model_quantize", "-i", base, "-o", folder / "v", "-b", 3, 4, "-g", 32, "--input-ids", ids)

    def profile() -> None:
        v = folder / "v"
        common = ("-mb", base, "-i", v / "3bpw", "-s", v / "4bpw", "--input-ids", ids, "-o", folder / "p.jsonl")
        _command("model_profile", *common, "--mode", "sketch", "--samples", 4)
        _command("model_optimize", folder / "p.jsonl", "-b", 4.0, "-o", folder / "mix.yaml", "--no-check")

    def merge() -> None:
        _command("recompile", "-i", folder / "v/3bpw", "-o", folder / "mix", "-or", folder / "mix.yaml", "--verify")
        _command("recompile", "--check", folder / "mix")

    def loads() -> None:
        from recompile.merge.check import loaders_that_fail

        for problem in loaders_that_fail(folder / "v/4bpw"):
            if problem.message.startswith("transformers"):
                raise Refused(problem.message)
        off = _compare(_logits_as_loaded(folder / "v/4bpw", ids), _plain_logits(folder / "v/4bpw", ids))
        if not off < TOLERANCE:
            raise Refused(f"WRONG: off by {off:.1e} of the range")

    def gguf() -> None:
        from recompile.checkpoint.checkpoint import open_checkpoint
        from recompile.errors import RecompileError
        from recompile.quantize.gguf import base_tensors

        try:
            base_tensors(open_checkpoint(base))
        except RecompileError as error:
            raise Refused(str(error).partition("; known:")[0]) from error

    steps: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
        "logits": (logits, ()),
        "quantize": (quantize, ()),
        "profile": (profile, ("quantize",)),
        "merge": (merge, ("profile",)),
        "loads": (loads, ("quantize",)),
        "gguf": (gguf, ()),
    }
    done: dict[str, str] = {}
    for name, (step, needs) in steps.items():
        if any(done[need] != "yes" for need in needs):
            done[name] = "-"
        else:
            try:
                step()
                done[name] = "yes"
            except Refused as refusal:
                done[name] = _sentence(refusal)
            except Exception as error:  # what transformers says of a file that it does not load
                done[name] = f"{type(error).__name__}: {_sentence(error)}"
        yield name, done[name]


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def try_type(model_type: str) -> dict[str, str]:
    """Every step of one type, in a process of its own: a crash, a hang or 6 GiB end that process only."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
                signal.alarm(SECONDS)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                with results.open("a") as out:
                    for step, said in _try(Path(folder), model_type):
                        out.write(json.dumps([step, said.replace(folder + "/", "")]) + "\n")
                        out.flush()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        found = dict(json.loads(line) for line in results.read_text().splitlines()) if results.exists() else {}
        if os.WIFSIGNALED(status):
            step = next((name for name in ("class", *STEPS) if name not in found), "class")
            hung = os.WTERMSIG(status) == signal.SIGALRM
            found[step] = f"DIED: no end after {SECONDS} s" if hung else f"DIED: signal {os.WTERMSIG(status)}"
        return found


def _warm_up() -> None:
    """Everything that a first model imports, in this process, so that its children need not import it again."""
    with tempfile.TemporaryDirectory() as folder:
        for step, _ in _try(Path(folder), "llama"):
            if step == "logits":
                return


# ---- all of them -----------------------------------------------------------------------------------------------------


def try_all(types: Iterable[str], workers: int) -> Iterator[tuple[str, dict[str, str]]]:
    import torch
    import transformers

    import recompile.cli.model_diff
    import recompile.cli.model_optimize
    import recompile.cli.model_profile
    import recompile.cli.model_quantize
    import recompile.cli.recompile  # noqa: F401  children find everything imported

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    _warm_up()
    with ThreadPoolExecutor(workers) as pool:
        listed = list(types)
        yield from zip(listed, pool.map(try_type, listed), strict=True)


def page(results: Mapping[str, Any]) -> str:
    """The Markdown of what was tried."""
    from recompile.model.known_types import PUBLISHED_AS

    rows: Mapping[str, Mapping[str, str]] = results["types"]
    waiting = [name for name, row in rows.items() if not row]
    made = {name: row for name, row in rows.items() if row and not row["class"].startswith("not made")}
    notes: list[str] = []
    lines = [
        "# Which models work",
        "",
        f"Every causal and image-text model type of transformers {results['transformers']} ({len(rows)}), tried",
        f"on {results['date']} with a tiny model made of its default configuration, every stored tensor random.",
        "Made by `scripts/make_models_page.py`; do not edit.",
        "",
        "**logits**: within 1e-4 of transformers' own (float32, of their range), and KL of the model against itself 0. "
        "**quantize**: 3 and 4 bits, GPTQ.",
        "**profile**: a sketch and a recipe from it. **merge, check**: `recompile --verify`, then `--check`. "
        "**loads in transformers**: the 4-bit variant,",
        "its logits equal to our decoding. **GGUF names**: `model_quantize --format gguf` knows the architecture.",
        "",
        "Published under a name of its own and run as what it is: "
        + ", ".join(f"{own} as {known}" for own, known in PUBLISHED_AS.items())
        + ".",
        "",
        "| type | class | " + " | ".join(TITLES[step] for step in STEPS) + " |",
        "| --- | --- | " + " | ".join("---" for _ in STEPS) + " |",
    ]
    for name, row in made.items():
        cells = []
        for step in STEPS:
            said = row.get(step, "-")
            if said not in ("yes", "-"):
                if said not in notes:
                    notes.append(said)
                said = f"no ({notes.index(said) + 1})"
            cells.append(said)
        lines.append(f"| {name} | {row['class']} | " + " | ".join(cells) + " |")
    lines += ["", "## What is not run, and why", *NOT_RUN.rstrip().split("\n")]
    lines += ["", "## What the refusals say", ""]
    lines += [f"{number}. {_escaped(note)}" for number, note in enumerate(notes, 1)]
    if waiting:
        lines += ["", f"## Not tried yet ({len(waiting)})", "", ", ".join(waiting)]
    rest = {name: row["class"] for name, row in rows.items() if row and name not in made}
    lines += ["", "## Types of which no tiny model that reads text alone could be made automatically", ""]
    lines += [f"- {name}: {_escaped(said.removeprefix('not made: '))}" for name, said in rest.items()]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="try these types; the others stay as they were")
    parser.add_argument("--missing", action="store_true", help="try the types that were not tried before")
    parser.add_argument("--workers", type=int, default=2, help="types at a time")
    parser.add_argument("--print", action="store_true", help="the page from what was tried before, to stdout")
    options = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"types": {}}
    if options.print:
        print(page(before), end="")
        return
    import transformers

    types = listed_types()
    rows = {name: before["types"].get(name, {}) for name in types}
    chosen = [name for name in types if not rows[name]] if options.missing else options.only or types
    began = time.monotonic()
    results = {
        "command": "python scripts/make_models_page.py",
        "date": date.today().isoformat(),
        "transformers": transformers.__version__,
        "types": rows,
    }
    for number, (name, row) in enumerate(try_all(chosen, options.workers), 1):
        rows[name] = row
        bad = {step: said for step, said in row.items() if said not in ("yes", "-") and step != "class"}
        print(f"{number} {time.monotonic() - began:.0f} s {name}: {row.get('class')} {bad or ''}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
