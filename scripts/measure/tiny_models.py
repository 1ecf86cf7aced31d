"""A tiny random model of any family that transformers maps to a causal language model, built offline.

A config is the family's default one with every size replaced by a small one, by the name that sizes have in transformers'
configs. What a family needs in addition is in ``NEEDS``.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, HIDDEN, LAYERS, VOCABULARY, CONTEXT = 32, 80, 4, 320, 128

# The names that one size has in configs: numbers of layers, of tokens there are and of tokens that are read at once; all
# others with their tiny value.
_LAYERS = """num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers max_window_layers"""
_VOCABULARY = "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base"
_CONTEXT = "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"
_SIZES: dict[int, str] = {
    WIDTH: """hidden_size n_embd d_model embedding_size emb_dim embedding_dim word_embed_proj_dim attention_hidden_size
        lru_width adapter_in_dim
        adapter_out_dim adapter_input_size adapter_output_size""",
    HIDDEN: """intermediate_size ffn_dim ffn_hidden_size dim_ff dff feed_forward_size encoder_ffn_dim decoder_ffn_dim
        intermediate_size_mlp shared_intermediate_size dense_intermediate_size""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads n_mamba_heads num_query_groups
        num_experts n_routed_experts num_local_experts moe_num_experts mamba_n_heads mamba_num_heads hc_lowrank
        adapter_rank""",
    16: """q_lora_rank kv_lora_rank qk_head_dim moe_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size
        mamba_d_head mamba_head_dim mamba_headdim mamba_dt_rank""",
    8: """head_dim swa_head_dim d_head attention_head_size qk_nope_head_dim v_head_dim linear_key_head_dim dim_head
        linear_value_head_dim linear_head_dim index_head_dim qk_rope_head_dim attention_head_dim kv_channels rotary_dim
        mamba_d_state state_size ssm_state_size time_step_rank laurel_rank d_rel""",
    2: """num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads index_n_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k index_topk""",
    1: """n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace mamba_n_groups n_groups mamba_ngroups""",
    64: "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention",
}
SIZES = {name: value for value, names in _SIZES.items() for name in names.split()}

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# Where single layers are named, they are those of `LAYERS`.
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "axk2": {"gated_norm_rank": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mlp_multipliers": [0.7, 1.3]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    # its cache counts keys and values in multiples of 64
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(
    family: str, layers: int = LAYERS, vocabulary: int = VOCABULARY, context: int = CONTEXT, **changes: Any
) -> PreTrainedConfig:
    """A config of so many layers, `WIDTH` wide, and, where the family mixes kinds of layers, some of each.

    ``changes`` are further values of the config, by the family's own names.
    """
    given = {_LAYERS: layers, _VOCABULARY: vocabulary, _CONTEXT: context}
    sizes = SIZES | {name: value for names, value in given.items() for name in names.split()}
    return CONFIG_MAPPING[family](**_shrunk(CONFIG_MAPPING[family]().to_dict(), family, sizes) | changes)


def tiny_model(family: str, seed: int = 0, noise: float = 0.05, **changes: Any) -> PreTrainedModel:
    """A random model of `tiny_config`, in fp32, with biases and norms that are not at their trivial start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.requires_grad_(False)


def _shrunk(values: dict[str, Any], family: str, sizes: dict[str, int]) -> dict[str, Any]:
    """These values of a config, every size small."""
    layers = next(
        (values[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in values), None
    )
    few = sizes["num_hidden_layers"]
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("transformers_version", "architectures", "model_type", "per_layer_config"):
            continue
        if isinstance(value, dict) and (inner := value.get("model_type")) in CONFIG_MAPPING:
            small[name] = CONFIG_MAPPING[inner](**_shrunk(value, inner, sizes))
        elif name == "mlp_layer_types" and "sparse" in (value or ["sparse"]):
            small[name] = ["dense", *["sparse"] * (few - 1)]
        elif isinstance(value, list) and len(value) == layers:  # one of each kind first
            kinds = list(dict.fromkeys(value)) if all(isinstance(each, (str, int, float)) for each in value) else []
            small[name] = [_small(name, each, sizes) for each in (kinds + value)[:few]]
        elif name.endswith("_token_id") and isinstance(value, int):
            small[name] = TOKENS.get(name, 0)
        else:
            small[name] = _small(name, value, sizes)
    if values.get("num_key_value_heads", 0) in (None, values.get("num_attention_heads")):
        small["num_key_value_heads"] = sizes["num_attention_heads"]
    if "head_dim" in values and values["head_dim"] is None:
        small["head_dim"] = sizes["head_dim"]
    return small | NEEDS.get(family, {})


def _small(name: str, value: Any, sizes: dict[str, int]) -> Any:
    return sizes[name] if name in sizes and isinstance(value, int) and not isinstance(value, bool) else value
