"""Hugging Face config -> the hyperparameter keys of a GGUF file: the reverse of `recompile.gguf.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recompile.errors import CheckpointError, UnsupportedError
from recompile.gguf.container import GgufFile, encode_key
from recompile.gguf.fields import (
    EPSILON,
    EXAONE4_LAYERS,
    FIELDS,
    FIXED_EPSILON,
    MAVERICK_EXPERTS,
    PARTIAL_ROTARY,
    REQUIRED,
    RMS_EPSILON,
    SIGMOID,
    SIGMOID_ROUTERS,
    SOFTMAX,
    constants,
    every,
)
from recompile.gguf.names import Architecture, Heads, kinds_of_layers

TOKENIZER = "tokenizer."


def heads_in(config: Mapping[str, Any]) -> Heads:
    """The sizes in a config.json that the order of rows depends on; those that a model does not have are 0."""
    query = int(_need(config, "num_attention_heads"))

    rope = _rope(config)

    def size(name: str) -> int:
        return int(config.get(name) or 0)

    return Heads(
        query,
        int(config.get("num_key_value_heads") or query),
        size("linear_num_key_heads"),
        size("linear_num_value_heads"),
        size("linear_key_head_dim"),
        size("linear_value_head_dim"),
        size("qk_nope_head_dim"),
        size("v_head_dim"),
        size("kv_lora_rank"),
        size("hidden_size"),
        size("mamba_n_groups") or size("n_groups") or 1,
        head := size("head_dim") or size("hidden_size") // query,
        int(head * rope.get("partial_rotary_factor", 1.0)) if rope.get("mrope_section") else 0,
    )


SYNONYMS = {  # versions of transformers differ, and so do models
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_shared_experts": "n_shared_experts",
    "num_experts_per_token": "num_experts_per_tok",
}
Values = dict[str, tuple[Any, str]]  # key below the architecture's name -> value and its kind


def model_records(architecture: Architecture, config: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """The keys that say what the model is, as records by name; those of the tokenizer are not among them.

    config: of the text model. Raises CheckpointError for a config without a field that the architecture needs,
    UnsupportedError for one that GGUF's keys cannot express here (a kind of rope scaling, layers that differ otherwise
    than by a pattern) or that the engine would compute differently.
    """
    arch = architecture.name
    heads = heads_in(config)
    hidden, layers = int(_need(config, "hidden_size")), int(_need(config, "num_hidden_layers"))
    head_dim = int(config.get("head_dim") or hidden // heads.query)
    rope = _rope(config)
    epsilon_key, epsilon = EPSILON.get(arch, RMS_EPSILON)
    values: Values = {
        "block_count": (layers, "u32"),
        "context_length": (_context(arch, config), "u32"),
        "embedding_length": (hidden, "u32"),
        "feed_forward_length": (_width(arch, config), "u32"),
        "attention.head_count": (heads.query, "u32"),
        "attention.head_count_kv": (heads.key, "u32"),
        "attention.key_length": (head_dim, "u32"),
        "attention.value_length": (head_dim, "u32"),
        epsilon_key: (FIXED_EPSILON.get(arch) or _need(config, epsilon), "f32"),
        "rope.freq_base": (rope["rope_theta"], "f32"),
        "rope.dimension_count": (head_dim, "u32"),
        "vocab_size": (_need(config, "vocab_size"), "u32"),
    }
    for wanted, value in constants(arch, layers).items():
        found = config.get(wanted)
        if found is not None and found != value:
            raise UnsupportedError(
                f"config.json: {wanted} is {found}, and llama.cpp computes {arch} with {value} whatever a file says"
            )
    for entry in FIELDS.get(arch, ()):
        found = config.get(entry.name, config.get(SYNONYMS.get(entry.name, entry.name)))
        if found is None and entry.default is REQUIRED:
            _need(config, entry.name)
        if isinstance(found, list):  # one a layer, all alike in the models there are
            if len(set(found)) != 1:
                raise UnsupportedError(f"config.json: {entry.name} is {found}, and a GGUF file has one for all layers")
            found = found[0]
        if found is not None:
            values[entry.key] = (found, entry.kind)
    if arch in PARTIAL_ROTARY:
        values["rope.dimension_count"] = (int(head_dim * rope.get("partial_rotary_factor", 1.0)), "u32")
    if arch in SIGMOID_ROUTERS:
        values["expert_gating_func"] = (SIGMOID, "u32")
    _add_scaling(arch, config, rope, values)
    _add_special(arch, config, values, layers)
    records = {
        "general.architecture": encode_key("general.architecture", arch),
        "general.type": encode_key("general.type", "model"),
        "general.name": encode_key("general.name", name),
    }
    records |= {f"{arch}.{key}": encode_key(f"{arch}.{key}", value, kind) for key, (value, kind) in values.items()}
    return records


def _context(arch: str, config: Mapping[str, Any]) -> int:
    if arch == "bloom":  # which knows positions by their distance
        return int(config.get("max_position_embeddings") or 2048)
    return int(_need(config, "max_position_embeddings"))


def _width(arch: str, config: Mapping[str, Any]) -> int:
    """Rows of the feed-forward maps; of older models they follow from the hidden size."""
    found = config.get("intermediate_size")
    if not found and arch in ("gpt2", "bloom", "falcon"):
        return 4 * int(config["hidden_size"])
    return int(found or _need(config, "moe_intermediate_size"))


def _add_scaling(arch: str, config: Mapping[str, Any], rope: Mapping[str, Any], values: Values) -> None:
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = (kind, "string")
        values["rope.scaling.factor"] = (rope["factor"], "f32")
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            values["rope.scaling.original_context_length"] = (original, "u32")
            for key in ("beta_fast", "beta_slow"):
                if rope.get(key) is not None:
                    values[f"rope.scaling.yarn_{key}"] = (rope[key], "f32")
            if rope.get("mscale_all_dim"):
                tenth = 1.0 if arch == "mistral3" else 0.1
                values["rope.scaling.yarn_log_multiplier"] = (tenth * rope["mscale_all_dim"], "f32")
    elif kind == "proportional" and arch == "gemma4":
        pass  # in the factors of rope_freqs.weight
    elif kind not in ("default", "llama3", "mrope"):
        raise UnsupportedError(f"config.json: rope_type {kind!r} has no GGUF keys here; use llama.cpp's own converter")


def _add_special(arch: str, config: Mapping[str, Any], values: Values, layers: int) -> None:
    """What is particular to one architecture, and is more than a field's value."""
    types = config.get("layer_types")
    if "nextn_predict_layers" in values:  # draft layers are blocks like others
        values["block_count"] = (layers + values["nextn_predict_layers"][0], "u32")
    if arch == "gemma3" and config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = (config["final_logit_softcapping"], "f32")
    if arch == "gemma2":
        _add_gemma2(config, values)
    if arch in ("gemma3", "gemma4", "exaone4", "olmo2", "exaone-moe", "mellum") and types:
        _add_windows(arch, config, values, list(types))
    if arch == "llama" and config.get("num_local_experts"):
        values["expert_count"] = (config["num_local_experts"], "u32")
        values["expert_used_count"] = (_need(config, "num_experts_per_tok"), "u32")
    if arch in ("qwen3next", "qwen35", "qwen35moe"):
        head = _need(config, "linear_value_head_dim")
        values["ssm.inner_size"] = (head * config["linear_num_value_heads"], "u32")
        values["full_attention_interval"] = (_interval(config, layers), "u32")
        if arch != "qwen3next":
            _add_sections(config, values, [11, 11, 10])
    if arch == "glm4" and _rope(config).get("mrope_section"):
        _add_sections(config, values)
    if arch in ("qwen2vl", "qwen3vl", "qwen3vlmoe"):
        _add_sections(config, values)
        if arch != "qwen2vl":
            values["n_deepstack_layers"] = (config.get("deepstack_layers") or 0, "u32")
    if arch in ("stablelm", "gptneox"):  # what transformers does without being told
        values.setdefault("use_parallel_residual", (arch == "gptneox", "bool"))
    if arch in ("bailingmoe", "bailingmoe2"):
        _add_bailing(arch, config, values)
    if arch in ("gpt2", "gptneox"):
        del values["attention.head_count_kv"]  # as many as of queries, without being told
    if arch == "falcon":
        values["tensor_data_layout"] = ("jploski", "string")
    if arch in ("deepseek2", "deepseek32", "glm-dsa"):
        _add_latent(arch, config, values)
    if arch == "gemma4":
        _add_gemma4(config, values, types)
    if arch == "mistral3" and _rope(config).get("llama_4_scaling_beta") is not None:
        values["attention.temperature_scale"] = (_rope(config)["llama_4_scaling_beta"], "f32")
    if arch == "minimax-m2":
        values["rope.dimension_count"] = (config.get("rotary_dim") or values["rope.dimension_count"][0], "u32")
        values["expert_gating_func"] = (SIGMOID, "u32")
    if arch == "llama4" and config.get("use_qk_norm", True) != (config["num_local_experts"] != MAVERICK_EXPERTS):
        raise UnsupportedError(
            f"config.json: use_qk_norm is {config.get('use_qk_norm')} with {config['num_local_experts']} experts; "
            f"llama.cpp normalizes queries and keys unless there are {MAVERICK_EXPERTS}"
        )
    if arch == "cohere2moe":
        _add_cohere2_moe(config, values)
    if arch in ("command-r", "cohere2", "cohere2moe", "nemotron", "exaone-moe"):
        values["rope.scaling.type"] = ("none", "string")
    if arch == "ernie4_5-moe" and config.get("moe_num_shared_experts"):
        shared = config["moe_intermediate_size"] * config["moe_num_shared_experts"]
        values["expert_shared_feed_forward_length"] = (shared, "u32")
    if arch == "afmoe":  # transformers normalizes without being told
        values.setdefault("expert_weights_norm", (True, "bool"))
    if arch == "exaone-moe":
        _add_exaone_moe(config, values)
    if arch == "hunyuan-moe":
        values["expert_shared_feed_forward_length"] = (_need(config, "intermediate_size"), "u32")
        values.setdefault("expert_shared_count", (1, "u32"))
    if arch in ("lfm2", "lfm2moe") and types:
        keys = values["attention.head_count_kv"][0]
        values["attention.head_count_kv"] = ([keys if kind == "full_attention" else 0 for kind in types], "i32")
    if arch == "lfm2":
        values["feed_forward_length"] = (_lfm2_size(config), "u32")
    if arch in ("granite", "granitemoe") and config.get("model_type") == "granitemoehybrid":
        _add_granite(arch, config, values)
    if arch in ("granitehybrid", "nemotron_h", "nemotron_h_moe", "jamba", "kimi-linear"):
        _add_state_space(arch, config, values)
    if arch == "mimo2":
        _add_mimo(config, values)
    if arch == "phi3":
        values["attention.sliding_window"] = (config.get("sliding_window") or 0, "u32")


def _add_windows(arch: str, config: Mapping[str, Any], values: Values, types: list[str]) -> None:
    """Layers that see a window; types: of every layer."""
    if arch != "gemma3" and config.get("sliding_window"):
        _check_windows(arch, types)
        values["attention.sliding_window_pattern"] = ([kind == "sliding_attention" for kind in types], "bool")
    local = dict(config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    local = local or config.get("rope_local_base_freq")
    if local:
        values["rope.freq_base_swa"] = (local, "f32")


def _add_cohere2_moe(config: Mapping[str, Any], values: Values) -> None:
    size, shared = int(_need(config, "intermediate_size")), values.pop("expert_shared_count", (0, ""))[0]
    if shared:
        values |= {
            "expert_shared_count": (shared, "u32"),
            "expert_shared_feed_forward_length": (size * shared, "u32"),
        }
    values["feed_forward_length"] = (config.get("prefix_dense_intermediate_size") or size, "u32")
    local = [kind == "sliding_attention" for kind in _need(config, "layer_types")]
    values["attention.sliding_window_pattern"] = (local, "bool")
    values["expert_gating_func"] = (SIGMOID if config.get("expert_selection_fn") == "sigmoid" else SOFTMAX, "u32")
    dense = _check_dense_first(config)
    if dense is not None:
        values["leading_dense_block_count"] = (dense, "u32")


def _add_exaone_moe(config: Mapping[str, Any], values: Values) -> None:
    shared = int(values["expert_feed_forward_length"][0]) * int(values["expert_shared_count"][0])
    values["expert_shared_feed_forward_length"] = (shared, "u32")
    values["nextn_predict_layers"] = (0, "u32")  # draft layers have names of their own (mtp.) and are left out
    dense = _check_dense_first(config)
    if dense is not None:
        values["leading_dense_block_count"] = (dense, "u32")


def _add_gemma2(config: Mapping[str, Any], values: Values) -> None:
    for key, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if config.get(key, usual) is None:
            raise UnsupportedError(
                f"config.json: {key} is None, and llama.cpp computes gemma2 with {usual} where a file has none"
            )
        values[key] = (config.get(key, usual), "f32")


def _add_granite(arch: str, config: Mapping[str, Any], values: Values) -> None:
    """Of the class that may be hybrid, one that is not."""
    if config.get("position_embedding_type") != "rope":
        raise UnsupportedError(
            f"config.json: position_embedding_type is {config.get('position_embedding_type')}, and llama.cpp "
            f"computes {arch} with rope"
        )
    if arch == "granite":
        values["feed_forward_length"] = (_need(config, "shared_intermediate_size"), "u32")
    values["rope.scaling.finetuned"] = (True, "bool")


def _add_state_space(arch: str, config: Mapping[str, Any], values: Values) -> None:
    """Mamba beside attention. The engine tells layers apart by their numbers of key heads and feed-forward rows."""
    if arch in ("jamba", "kimi-linear"):
        (_add_jamba if arch == "jamba" else _add_kimi)(config, values)
        return
    kinds = kinds_of_layers(config)
    keys, rows = values["attention.head_count_kv"][0], values["feed_forward_length"][0]
    values |= {
        "attention.head_count_kv": ([keys if kind == "full_attention" else 0 for kind in kinds], "i32"),
        "context_length": (2**20, "u32"),  # states know no positions, and neither does this attention
        "rope.scaling.finetuned": (False, "bool"),
    }
    if arch == "granitehybrid":
        if not config.get("num_local_experts"):
            values["feed_forward_length"] = (_need(config, "shared_intermediate_size"), "u32")
        values["ssm.inner_size"] = (int(_need(config, "mamba_expand")) * int(config["hidden_size"]), "u32")
        if config.get("position_embedding_type") == "rope":
            raise UnsupportedError(
                "config.json: position_embedding_type is rope, and llama.cpp computes granitehybrid without positions"
            )
        return
    values["attention.layer_norm_epsilon"] = values["attention.layer_norm_rms_epsilon"]
    values["ssm.inner_size"] = (int(config["mamba_num_heads"]) * int(_need(config, "mamba_head_dim")), "u32")
    fed = "mlp" if arch == "nemotron_h" else "moe"
    if arch == "nemotron_h_moe":
        rows = _need(config, "moe_intermediate_size")
        if "mlp" in kinds:
            raise UnsupportedError("config.json: has layers of experts and others without; llama.cpp knows one kind")
    values["feed_forward_length"] = ([rows if kind == fed else 0 for kind in kinds], "i32")


def _add_jamba(config: Mapping[str, Any], values: Values) -> None:
    """Mamba 1 beside attention, which stands in every so manyth layer."""
    keys, hidden, layers = values["attention.head_count_kv"][0], int(config["hidden_size"]), values["block_count"][0]
    period, offset = int(_need(config, "attn_layer_period")), int(_need(config, "attn_layer_offset"))
    attends = [number % period == offset for number in range(layers)]
    values["attention.head_count_kv"] = ([keys if there else 0 for there in attends], "i32")
    values["ssm.inner_size"] = (int(_need(config, "mamba_expand")) * hidden, "u32")
    if config.get("mamba_dt_rank") == "auto":
        values["ssm.time_step_rank"] = (-(-hidden // 16), "u32")


def _add_kimi(config: Mapping[str, Any], values: Values) -> None:
    """Delta attention beside latent attention without positions."""
    linear, layers = dict(config.get("linear_attn_config") or {}), int(values["block_count"][0])
    whole = [number - 1 for number in linear.get("full_attn_layers") or ()]  # they count from 1
    types = config.get("layer_types")
    kinds = list(types) if types else ["full_attention" if n in whole else "" for n in range(layers)]
    turned, rank = int(_need(config, "qk_rope_head_dim")), int(_need(config, "kv_lora_rank"))
    heads = linear.get("num_heads") or config.get("linear_num_heads")
    if heads != values["attention.head_count"][0]:
        raise UnsupportedError(
            f"config.json: delta attention has {heads} heads and latent attention {values['attention.head_count'][0]}; "
            f"llama.cpp computes kimi-linear with one number"
        )
    values |= {
        "attention.head_count_kv": ([int(kind == "full_attention") for kind in kinds], "i32"),
        "attention.key_length": (rank + turned, "u32"),
        "attention.key_length_mla": (int(_need(config, "qk_nope_head_dim")) + turned, "u32"),
        "attention.value_length_mla": (_need(config, "v_head_dim"), "u32"),
        "rope.dimension_count": (turned, "u32"),
        "kda.head_dim": (linear.get("head_dim") or _need(config, "linear_head_dim"), "u32"),
        "ssm.conv_kernel": (linear.get("short_conv_kernel_size") or _need(config, "linear_conv_kernel_dim"), "u32"),
    }
    dense = _check_dense_first(config)
    if dense is not None:
        values["leading_dense_block_count"] = (dense, "u32")


def _add_mimo(config: Mapping[str, Any], values: Values) -> None:
    """Layers that see a window have twice the key heads, rotary embeddings of their own, and sinks."""
    types, keys = config.get("layer_types"), int(values["attention.head_count_kv"][0])
    local = [kind == "sliding_attention" for kind in types] if types else config.get("hybrid_layer_pattern")
    if local is None:
        raise CheckpointError("config.json: has neither layer_types nor hybrid_layer_pattern")
    of_window = int(config.get("swa_num_key_value_heads") or 2 * keys)
    theta = dict(config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    values |= {
        "attention.head_count_kv": ([of_window if there else keys for there in local], "i32"),
        "attention.sliding_window_pattern": ([bool(there) for there in local], "bool"),
        "rope.freq_base_swa": (theta or _need(config, "swa_rope_theta"), "f32"),
    }


def _add_bailing(arch: str, config: Mapping[str, Any], values: Values) -> None:
    if arch == "bailingmoe":
        values["expert_weights_scale"] = (1.0, "f32")
        return
    if not config.get("use_qk_norm"):
        raise UnsupportedError(
            "config.json: has no use_qk_norm; GGUF names are known here of Ling 2, which normalizes queries and keys. "
            "Use llama.cpp's own converter"
        )
    shared = int(_need(config, "moe_intermediate_size")) * int(values.get("expert_shared_count", (0, ""))[0])
    values["expert_shared_feed_forward_length"] = (shared, "u32")


def _add_sections(config: Mapping[str, Any], values: Values, usual: list[int] | None = None) -> None:
    """Rotary sections of images; text has one position."""
    sections = _rope(config).get("mrope_section") or usual
    if sections is None:
        raise CheckpointError("config.json: has no mrope_section, which a GGUF file must say")
    values["rope.dimension_sections"] = ([*sections, 0][:4], "i32")


def _check_windows(arch: str, types: list[str]) -> None:
    """Raise UnsupportedError for windows where the engine has none: its rules know layers by their number."""
    if arch in ("exaone4", "olmo2") and types != every(len(types), 4, "full_attention", "sliding_attention"):
        raise UnsupportedError(
            f"config.json: layer_types is {types}, and llama.cpp computes {arch} with full attention in every 4th layer"
        )
    if arch == "exaone4" and len(types) != EXAONE4_LAYERS:
        raise UnsupportedError(
            f"config.json: sliding_window with {len(types)} layers; llama.cpp has windows in EXAONE 4 of "
            f"{EXAONE4_LAYERS} layers only"
        )


def _interval(config: Mapping[str, Any], layers: int) -> int:
    """Every how many layers one has full attention. Raises UnsupportedError where the layers follow no such rule."""
    types = config.get("layer_types")
    asked = config.get("full_attention_interval")
    if types is None:
        return int(asked or 4)
    rules = [asked] if asked else range(1, layers + 1)
    for rule in rules:
        if list(types) == every(layers, rule, "full_attention", "linear_attention"):
            return int(rule)
    raise UnsupportedError(
        f"config.json: layer_types {list(types)} has full attention at no regular interval, as llama.cpp wants it"
    )


def _lfm2_size(config: Mapping[str, Any]) -> int:
    """Rows of the feed-forward maps, as LFM2's config defines them."""
    size = int(_need(config, "intermediate_size"))
    if not config.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    if config.get("block_ffn_dim_multiplier") is not None:
        size = int(config["block_ffn_dim_multiplier"] * size)
    multiple = int(config.get("block_multiple_of") or 256)
    return multiple * -(-size // multiple)


def _add_latent(arch: str, config: Mapping[str, Any], values: Values) -> None:
    turned, rank = int(_need(config, "qk_rope_head_dim")), int(_need(config, "kv_lora_rank"))
    values |= {
        "attention.head_count_kv": (1, "u32"),  # keys and values are split: one latent head serves all
        "attention.key_length": (rank + turned, "u32"),
        "attention.value_length": (rank, "u32"),
        "attention.key_length_mla": (int(_need(config, "qk_nope_head_dim")) + turned, "u32"),
        "attention.value_length_mla": (_need(config, "v_head_dim"), "u32"),
        "rope.dimension_count": (turned, "u32"),
    }
    if "expert_gating_func" not in values:
        values["expert_gating_func"] = (SOFTMAX if config.get("model_type") == "deepseek_v2" else SIGMOID, "u32")
    if config.get("topk_method") == "greedy":  # groups that the config has and the model does not use
        values |= {"expert_group_count": (1, "u32"), "expert_group_used_count": (1, "u32")}
    dense = _check_dense_first(config)
    if dense is not None:
        values["leading_dense_block_count"] = (dense, "u32")


def _check_dense_first(config: Mapping[str, Any]) -> int | None:
    """How many layers without experts come first by `mlp_layer_types`, None where the config has none. Raises
    UnsupportedError for such layers elsewhere."""
    types = config.get("mlp_layer_types")
    if not types:
        return None
    dense = list(types).count("dense")
    if list(types) != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise UnsupportedError(f"config.json: mlp_layer_types {list(types)}; llama.cpp wants all dense layers first")
    return dense


def _add_gemma4(config: Mapping[str, Any], values: Values, types: Any) -> None:
    local = int(_need(config, "head_dim"))
    whole = _of_layers(config, "head_dim", "full_attention") or int(config.get("global_head_dim") or local)
    values |= {
        "attention.key_length": (whole, "u32"),
        "attention.value_length": (whole, "u32"),
        "attention.key_length_swa": (local, "u32"),
        "attention.value_length_swa": (local, "u32"),
        "rope.dimension_count": (whole, "u32"),
        "rope.dimension_count_swa": (local, "u32"),
    }
    values.setdefault("final_logit_softcapping", (0.0, "f32"))  # without the key the engine caps at 30
    keys = _of_layers(config, "num_key_value_heads", "full_attention") or config.get("num_global_key_value_heads")
    if keys:
        usual = config["num_key_value_heads"]
        values["attention.head_count_kv"] = ([usual if kind == "sliding_attention" else keys for kind in types], "i32")
    if config.get("use_double_wide_mlp"):
        size, shared = int(config["intermediate_size"]), int(config.get("num_kv_shared_layers") or 0)
        sizes = [size * (2 if number >= len(types) - shared else 1) for number in range(len(types))]
        values["feed_forward_length"] = (sizes, "i32")


def _of_layers(config: Mapping[str, Any], name: str, kind: str) -> int | None:
    """What `per_layer_config` says of the layers of one kind; None where it says nothing. Raises UnsupportedError where
    layers of one kind differ."""
    each = config.get("per_layer_config") or {}
    types = config.get("layer_types") or []
    found = {each.get(str(number), {}).get(name) for number, other in enumerate(types) if other == kind}
    if len(found) > 1:
        raise UnsupportedError(f"config.json: {name} differs between layers of {kind}, which GGUF's keys cannot say")
    return next(iter(found), None)


def gemma4_rope_factors(config: Mapping[str, Any]) -> list[float]:
    """What Gemma 4's whole layers divide each rotary frequency by (float, head / 2): the part that turns by 1, the rest
    by a number so large that it does not turn."""
    whole = _of_layers(config, "head_dim", "full_attention") or int(config.get("global_head_dim") or config["head_dim"])
    share = _rope(config).get("partial_rotary_factor", 1.0)
    turned = int(whole * share / 2)
    return [1.0] * turned + [1e30] * (whole // 2 - turned)


def _need(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json: has no {key}, which a GGUF file must say")
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and the scaling, from either generation of transformers' spelling."""
    found = dict(config.get("rope_parameters") or {})
    if "full_attention" in found:  # one for each kind of layer: the engine's keys hold those of the global ones
        found = dict(found["full_attention"])
    scaling = dict(config.get("rope_scaling") or {})
    found |= scaling
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0)
    for name in ("partial_rotary_factor", "rotary_pct"):
        if config.get(name) is not None:
            found.setdefault("partial_rotary_factor", config[name])
    return found


def llama3_factors(config: Mapping[str, Any]) -> list[float] | None:
    """What each rotary frequency is divided by under llama3 scaling (float, head_dim / 2); None without such scaling.

    From the definition in transformers' rope utilities: high frequencies stay, low ones are divided by `factor`, those
    between are blended."""
    import math

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    half = int(config.get("head_dim") or hidden // heads) // 2
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(half):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / half)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def tokenizer_records(file: GgufFile) -> dict[str, bytes]:
    """The tokenizer's keys of a GGUF file, byte for byte. Raises CheckpointError where it has none."""
    found = {name: file.record(name) for name in file.keys if name.startswith(TOKENIZER)}
    if "tokenizer.ggml.tokens" not in found:
        raise CheckpointError(f"{file.label}: has no tokenizer keys; name another GGUF file of the same model")
    return found
