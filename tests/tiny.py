"""Tiny seeded models for every test: built once a session, in a folder that goes when the session ends.

The tensors are written here by name, without transformers, so that loading them with transformers is an independent
check of ours. Nothing returned may be changed; `copy_of` makes a copy that may.

    tiny.base("llama")                      a dense HF directory
    tiny.variants("llama", (3, 4))          {3: .../3bpw, 4: .../4bpw}, compressed-tensors integers
    tiny.rows(4, 16)                        int64 [4, 16]
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import INDEX_NAME, open_checkpoint

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 64, 4, 2, 16, 128, 256
EXPERTS, EXPERT_SIZE, SHARED_SIZE = 4, 64, 128
GROUP_SIZE = 32  # divides every row above
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

Shapes = dict[str, tuple[int, ...]]


# ---- architectures ---------------------------------------------------------------------------------------------------


def _config(model_type: str, name: str, layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **extra,
    }


def _attention(layer: str, bias: bool) -> Shapes:
    sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes: Shapes = {f"{layer}.self_attn.{name}_proj.weight": (size, HIDDEN) for name, size in sizes.items()}
    shapes |= {f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM)}
    if bias:
        shapes |= {f"{layer}.self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    return shapes


def _mlp(prefix: str, size: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (size, HIDDEN),
        f"{prefix}.up_proj.weight": (size, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, size),
    }


def _norms(layer: str, *names: str, size: int = HIDDEN) -> Shapes:
    return {f"{layer}.{name}.weight": (size,) for name in names}


def _llama(layers: int, tied: bool = False, bias: bool = False, **extra: Any) -> tuple[dict[str, Any], Shapes]:
    config = _config(
        "llama", "LlamaForCausalLM", layers, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=False, **extra
    )
    shapes: Shapes = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= _attention(layer, bias) | _mlp(f"{layer}.mlp", int(config["intermediate_size"]))
        if bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (HIDDEN,)
        shapes |= _norms(layer, "input_layernorm", "post_attention_layernorm")
    return config, shapes


def _qwen2_moe(layers: int) -> tuple[dict[str, Any], Shapes]:
    config = _config(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        layers,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=EXPERT_SIZE,
        shared_expert_intermediate_size=SHARED_SIZE,
        decoder_sparse_step=1,
        norm_topk_prob=False,
    )
    shapes: Shapes = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= _attention(layer, bias=True)
        shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, HIDDEN)
        for expert in range(EXPERTS):
            shapes |= _mlp(f"{layer}.mlp.experts.{expert}", EXPERT_SIZE)
        shapes |= _mlp(f"{layer}.mlp.shared_expert", SHARED_SIZE)
        shapes |= _norms(layer, "input_layernorm", "post_attention_layernorm")
    return config, shapes


def _qwen3_moe(layers: int) -> tuple[dict[str, Any], Shapes]:
    config = _config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        layers,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=EXPERT_SIZE,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        mlp_only_layers=[0],  # the first layer is dense
    )
    shapes: Shapes = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= _attention(layer, bias=False)
        shapes |= _norms(layer, "self_attn.q_norm", "self_attn.k_norm", size=HEAD_DIM)
        if number:
            shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                shapes |= _mlp(f"{layer}.mlp.experts.{expert}", EXPERT_SIZE)
        else:
            shapes |= _mlp(f"{layer}.mlp", INTERMEDIATE)
        shapes |= _norms(layer, "input_layernorm", "post_attention_layernorm")
    return config, shapes


_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _gemma2(layers: int) -> tuple[dict[str, Any], Shapes]:
    """Every second layer sees 8 tokens back; logits end in a soft cap."""
    config = _config(
        "gemma2",
        "Gemma2ForCausalLM",
        layers,
        tie_word_embeddings=True,
        sliding_window=8,
        final_logit_softcapping=6.0,
        attn_logit_softcapping=50.0,
        query_pre_attn_scalar=HEAD_DIM,
        hidden_activation="gelu_pytorch_tanh",
    )
    shapes: Shapes = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= _attention(layer, False) | _mlp(f"{layer}.mlp", INTERMEDIATE) | _norms(layer, *_GEMMA_NORMS)
    return config, shapes


def _gemma3(layers: int) -> tuple[dict[str, Any], Shapes]:
    """Layers 0, 1 see 8 tokens back, with another rotary base than layer 2, which sees all; and so on."""
    config = _config(
        "gemma3_text",
        "Gemma3ForCausalLM",
        layers,
        tie_word_embeddings=True,
        sliding_window=8,
        layer_types=["full_attention" if number % 3 == 2 else "sliding_attention" for number in range(layers)],
        rope_local_base_freq=100.0,
        query_pre_attn_scalar=HEAD_DIM,
        hidden_activation="gelu_pytorch_tanh",
    )
    shapes: Shapes = {}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= _attention(layer, False) | _mlp(f"{layer}.mlp", INTERMEDIATE) | _norms(layer, *_GEMMA_NORMS)
        shapes |= _norms(layer, "self_attn.q_norm", "self_attn.k_norm", size=HEAD_DIM)
    return config, shapes


ARCHITECTURES: Mapping[str, Callable[[], tuple[dict[str, Any], Shapes]]] = {
    "llama": lambda: _llama(4),
    "llama-tied": lambda: _llama(4, tied=True),
    "llama-bias": lambda: _llama(4, bias=True),
    "llama-ragged": lambda: _llama(2, intermediate_size=80),  # 80: no multiple of 32
    "qwen2-moe": lambda: _qwen2_moe(2),
    "qwen3-moe": lambda: _qwen3_moe(2),
    "gemma2": lambda: _gemma2(3),
    "gemma3": lambda: _gemma3(3),
}


def _describe(architecture: str) -> tuple[dict[str, Any], Shapes]:
    """Config and shapes of a name above, or of a depth: "llama-12", "qwen2-moe-12"."""
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]()
    kind, _, layers = architecture.rpartition("-")
    return {"llama": _llama, "qwen2-moe": _qwen2_moe}[kind](int(layers))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(config: Mapping[str, Any], layer_shapes: Shapes, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Weights as wide as trained ones: every map keeps the size of what goes through it, logits differ by a few nats.

    With transformers' own start (0.02) a model this narrow predicts the same for every token, and no quantization error
    would show.
    """
    gemma = str(config["model_type"]).startswith("gemma")  # their norms multiply by 1 + weight
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), **layer_shapes, "model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_norm = name.endswith(".weight")
            value = value * 0.1 + (1.0 if is_norm and not gemma else 0.0)
        elif "embed_tokens" in name:
            value = value * (0.25 if config["tie_word_embeddings"] else 1.0)
        elif name == "lm_head.weight":
            value = value * 2 / math.sqrt(HIDDEN)
        else:
            value = value / math.sqrt(shape[1])
            # a few inputs of every map carry more than the rest, as in real models
            value = value * (1 + 1.5 * (torch.rand(shape[1], generator=generator) > 0.9))
        tensors[name] = value.to(dtype)
    return tensors


def write_model(
    directory: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shards: int = 1,
) -> Path:
    """Write a dense HF directory: config, tokenizer, one file or `shards` files with an index."""
    config, shapes = _describe(architecture)
    config["dtype"] = DTYPE_NAMES[dtype]
    tensors = _tensors(config, shapes, dtype, seed)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory)
    write_tensors(directory, tensors, shards)
    return directory


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """One model.safetensors, or several with an index; `shards` takes names in turn, so that layers are torn apart."""
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: value for at, (name, value) in enumerate(tensors.items()) if at % shards == number}
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2))


def write_tokenizer(directory: Path, *, first: int = 0) -> None:
    """A byte-level tokenizer: 256 tokens, one a byte. `first` turns the alphabet, for a tokenizer of another model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: (number + first) % VOCAB for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(directory))


# ---- built once ------------------------------------------------------------------------------------------------------


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="recompile-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def base(architecture: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shards: int = 1) -> Path:
    """The directory of a dense model. Read only."""
    directory = _root() / f"{architecture}-{DTYPE_NAMES[dtype]}-{seed}-{shards}" / "base"
    if not directory.exists():
        write_model(directory, architecture, dtype=dtype, seed=seed, shards=shards)
    return directory


@cache
def variants(architecture: str, bits: tuple[int, ...], **options: Any) -> dict[int, Path]:
    """Quantized variants beside each other, by bits. Read only. options: `quantize`'s."""
    folder = Path(tempfile.mkdtemp(prefix=f"{architecture}-", dir=_root()))
    return quantize(base(architecture), folder, bits, **options)


def quantize(
    base_dir: Path,
    out_dir: Path,
    bits: tuple[int, ...],
    *,
    method: str = "rtn",
    group_size: int | None = GROUP_SIZE,
    symmetric: bool = True,
    head_bits: int | None = None,
) -> dict[int, Path]:
    """compressed-tensors variants of a base, each in `out_dir`/Nbpw. "rtn" needs no Hessian and is quickest."""
    from recompile.quantize.encoders import IntEncoder, variant_name
    from recompile.quantize.pipeline import BuildOptions, quantize_model

    encoder = IntEncoder(bits, group_size, symmetric, method, head_bits=head_bits)
    options = BuildOptions(head=head_bits is not None)
    for _ in quantize_model(open_checkpoint(base_dir), out_dir, encoder, rows(2, 16), options):
        pass
    return {rate: out_dir / variant_name(rate) for rate in bits}


def rows(count: int, tokens: int, seed: int = 1) -> Tensor:
    """Token rows, int64 [count, tokens]."""
    return torch.randint(0, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(seed))


def copy_of(directory: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(directory, target)
    return target


# ---- the plain way, to compare with ----------------------------------------------------------------------------------


def plain_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it from a dense directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype).eval()


@torch.inference_mode()
def plain_logits(model: Any, ids: Tensor, batch: int | None = None) -> Tensor:
    """Logits [rows, tokens, vocab], `batch` rows at a time (None: all)."""
    return torch.cat([model(input_ids=piece, use_cache=False).logits for piece in ids.split(batch or len(ids))])


def streamed_logits(source: Any, ids: Tensor, batch: int = 2, model: Any = None) -> Tensor:
    """Logits [rows, tokens, vocab] of a source in float32, layer by layer; model: a LayeredModel of it."""
    from recompile.model.stream import LayeredModel

    model = model or LayeredModel.of(source, dtype=torch.float32)
    with torch.inference_mode():
        normed = model.normed(ids, batch, source)
        with model.head_loaded(source):
            return torch.cat([model.logits(states) for states in normed.split(batch)])


def plain_kl(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) per token in float64, [...]."""
    log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def dense_copy(source: Any, directory: Path, like: Path) -> Path:
    """Every weight of a source (Checkpoint or Overlay) decoded to float32, as a dense HF directory for transformers."""
    from recompile.model.stream import dense_names

    directory.mkdir(parents=True)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    for file in like.glob("tokenizer*"):
        shutil.copy(file, directory / file.name)
    save_file(
        {name: source.load(name).float().contiguous() for name in dense_names(source)}, directory / "model.safetensors"
    )
    return directory
