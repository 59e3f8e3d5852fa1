"""Types that cannot be run are refused before anything slow is imported, by what transformers itself lists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from recompile.errors import CheckpointError, RecompileError, UnsupportedError
from recompile.model.known_types import OTHERWISE, PUBLISHED_AS, TEXT_TABLES, Listed, check_told, listed_at
from tests.formats.test_checkpoints import streamed_logits

ROOT = Path(__file__).resolve().parent.parent.parent
REFUSED = {
    "t5": "is an encoder and a decoder",
    "vit": "transformers has no model that makes text for model_type 'vit'",
    "unheard-of": "model_type 'unheard-of' is not one that this transformers knows",
    "diffusion_gemma": "denoises a canvas of random tokens",
    "reformer": "hashes with other random numbers in every run",
}
COMMANDS = (
    ("model_diff", "-ma", "MODEL", "-mb", "MODEL"),
    ("model_diff", "-ma", "MODEL", "-ma", "MODEL", "-mb", "MODEL"),
    ("model_diff", "--engine", "vllm", "-ma", "MODEL", "-mb", "MODEL"),
    ("model_profile", "-mb", "MODEL", "--candidates", "4"),
    ("model_quantize", "-i", "MODEL", "-o", "OUT", "-b", "4"),
    ("model_quantize", "-i", "MODEL", "-o", "OUT", "-b", "Q4_K", "--format", "gguf"),
    ("model_heal", "-i", "MODEL", "-mb", "MODEL", "-o", "OUT"),
    ("model_trace", "-m", "MODEL", "-o", "OUT"),
    ("model_auto", "-i", "MODEL", "-o", "OUT", "-b", "4"),
    ("model_auto", "-i", "MODEL", "-o", "OUT", "-b", "4", "--plan"),
)
# Runs commands in one process; prints what each said, and last which of the slow imports there were.
RUNS = """
import json, sys
from importlib import import_module
from click.testing import CliRunner
for name, *arguments in json.loads(sys.argv[1]):
    found = CliRunner().invoke(import_module(f"recompile.cli.{name}").main, arguments)
    print(json.dumps([found.exit_code, " ".join(found.output.split())]))
print(json.dumps([name for name in ("torch", "transformers", "scipy") if name in sys.modules]))
"""


def write(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(8, 4)}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def listed() -> Listed:
    found = listed_at(Path(transformers.__file__).parent / "models")
    assert found is not None
    return found


def test_every_command_refuses_before_torch_is_imported(tmp_path: Path) -> None:
    folders = [write(tmp_path / model_type, {"model_type": model_type}) for model_type in REFUSED]
    runs = [
        [str({"MODEL": folder, "OUT": tmp_path / "out"}.get(word, word)) for word in command]
        for command in COMMANDS
        for folder in folders
    ]
    done = subprocess.run([sys.executable, "-c", RUNS, json.dumps(runs)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *said, imported = (json.loads(line) for line in done.stdout.splitlines())
    assert imported == []
    for run, (code, text) in zip(runs, said, strict=True):
        model_type = next(folder.name for folder in folders if str(folder) in run)
        assert code == 1, run
        assert f"{model_type}/config.json: " in text, (run, text)
        assert REFUSED[model_type] in text, (run, text)
        assert len(text) < 400
    assert not (tmp_path / "out").exists()


def test_what_runs_no_model_takes_any_type(tmp_path: Path) -> None:
    """A profile of weights alone, and GGUF types without importance."""
    folder = write(tmp_path / "t5", {"model_type": "t5"})
    commands = (
        ("model_quantize", "-i", "MODEL", "-o", "OUT", "-b", "Q4_K", "--format", "gguf", "--no-importance"),
        ("model_profile", "-mb", "MODEL", "-i", "MODEL", "-s", "MODEL", "--mode", "weights", "--no-importance"),
    )
    places = {"MODEL": folder, "OUT": tmp_path / "out"}
    runs = [[str(places.get(word, word)) for word in command] for command in commands]
    done = subprocess.run([sys.executable, "-c", RUNS, json.dumps(runs)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "encoder and a decoder" not in done.stdout


def test_the_lists_are_those_of_transformers(listed: Listed) -> None:
    assert listed.types == set(CONFIG_MAPPING)
    assert listed.text == {name for table in TEXT_TABLES for name in getattr(modeling_auto, table)}
    assert set(OTHERWISE) <= listed.text


def test_encoder_decoders_are_those_of_transformers(listed: Listed) -> None:
    """What is told from the text of a config's class, of all types that make text and others that seem to be pairs."""
    found = {name: listed.is_pair({"model_type": name}) for name in listed.types}
    asked = sorted((listed.text & listed.types) | {name for name, is_pair in found.items() if is_pair})
    wrong = []
    for name in asked:
        try:
            wanted = bool(getattr(CONFIG_MAPPING[name](), "is_encoder_decoder", False))
        except (ValueError, TypeError, StrictDataclassError):
            continue  # has no defaults of its own
        if wanted != found[name]:
            wrong.append(name)
    assert (wrong, sum(found.values()) > 40) == ([], True)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"model_type": "bart", "is_encoder_decoder": False}, None, ""),
        ({"model_type": "bart"}, UnsupportedError, "an encoder and a decoder"),
        ({"model_type": "llama", "is_encoder_decoder": True}, UnsupportedError, "an encoder and a decoder"),
        ({"model_type": "musicgen", "is_encoder_decoder": False}, UnsupportedError, "an encoder and a decoder"),
        ({"model_type": "gpt-sw3"}, None, ""),
        ({"model_type": "reformer", "hash_seed": 1}, None, ""),
        ({"model_type": "reformer", "attn_layers": ["local"]}, None, ""),
        ({"model_type": ["llama"]}, CheckpointError, "is not one that this transformers knows"),
        ({}, CheckpointError, "model_type None is not one"),
        ({"gguf_architecture": "rwkv9"}, UnsupportedError, "'rwkv9' has no table of Hugging Face names here"),
        ({"model_type": "pi0"}, UnsupportedError, "moves a robot"),
    ],
)
def test_the_config_decides(
    listed: Listed, config: dict[str, Any], error: type[RecompileError] | None, says: str
) -> None:
    if error is None:
        check_told(config, "config.json", listed)
        return
    with pytest.raises(error, match=says):
        check_told(config, "config.json", listed)


def test_files_of_transformers_that_are_laid_out_otherwise_tell_nothing(tmp_path: Path) -> None:
    assert listed_at(tmp_path) is None
    check_told({"model_type": "t5"}, "config.json", None)
    check_told({"model_type": "unheard-of"}, "config.json", None)


@pytest.mark.parametrize("published", sorted(PUBLISHED_AS))
def test_a_model_published_under_a_name_of_its_own_is_run_as_what_it_is(
    published: str, listed: Listed, tmp_path: Path
) -> None:
    model_type, path = PUBLISHED_AS[published], tmp_path / "model"
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 32)
    sizes |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_hidden_layers"), 2)
    sizes |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    counts = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 1, "vocab_size": 64}
    model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes, **counts)).eval()
    model.save_pretrained(str(path))
    settings = json.loads((path / "config.json").read_text())
    config = {**settings, "model_type": published, "auto_map": {"AutoConfig": "configuration_of_theirs.Theirs"}}
    (path / "config.json").write_text(json.dumps(config))
    check_told(config, "config.json", listed)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        wanted = model(ids).logits
    assert torch.allclose(streamed_logits(path, ids), wanted, atol=1e-4)
