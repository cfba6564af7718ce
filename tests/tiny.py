"""Tiny random-weight models of every family that transformers has, the same on every run. No tokenizer, no network.

`model("olmoe")` is a loaded `workbench.models.Model`, `module("olmoe")` the bare module, `inputs(…)` token ids for it.
Keyword arguments change the configuration: `module("olmoe", num_experts=300)`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from workbench.models import load

transformers.logging.set_verbosity_error()

VOCABULARY = 128
EXPERTS = 8
TOP_K = 3

# Set where a configuration has the field: 3 layers, 8 experts of which 3 are used, 2 groups, every layer sparse.
# index_topk is longer than the texts: where it isn't, transformers' own cached generation of the families with sparse
# attention differs from one full forward.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
}
# Names of one thing, of which a configuration has one or several.
_SAME = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
)
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "text_hidden_size": 64,
    "projection_hidden_dim": 32,
}

# Family -> (model type of the configuration, what it needs besides).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {}),
    "aria": ("aria_text", {"moe_num_experts": EXPERTS, "moe_topk": TOP_K, "moe_num_shared_experts": 1}),
    "axk1": ("axk1", _LATENT),
    "axk2": ("axk2", _LATENT),
    "bailing_hybrid": ("bailing_hybrid", {"num_key_value_heads": 4}),
    "beam": ("beam", {}),
    "cohere2_moe": ("cohere2_moe", {}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 256,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": 64},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        },
    ),
    "deepseek_ocr2": (
        "deepseek_ocr2_text",
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "topk_method": "greedy"},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "deepseek_v32": ("deepseek_v32", _LATENT),
    "deepseek_v4": ("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe", "moe"]}),
    "diffusion_gemma": ("diffusion_gemma_text", {"top_k_experts": TOP_K}),
    "doge": ("doge", {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4}),
    "dots1": ("dots1", {}),
    "dots3_note": ("dots3_note_text", {"num_key_value_heads": 4}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_num_shared_experts": 1,
        },
    ),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe_text",
        {
            "moe_intermediate_size": [32, 32],
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
    ),
    "exaone_moe": ("exaone_moe", {}),
    "flex_olmo": ("flex_olmo", {}),
    "flint": ("flint", {}),
    "gemma4": (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "top_k_experts": TOP_K,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "glm4v_moe": (
        "glm4v_moe_text",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2],
            }
        },
    ),
    "glm5_next": (
        "glm5_next_text",
        {
            "num_key_value_heads": 4,
            "index_topk": 64,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
        },
    ),
    "glm_moe_dsa": ("glm_moe_dsa", _LATENT),
    "gpt_oss": ("gpt_oss", {}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe_swa": ("granitemoe_swa", {}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
        },
    ),
    "granitemoeshared": ("granitemoeshared", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"moe_topk": TOP_K}),
    "hy_v3": ("hy_v3", {}),
    "hy_v4": ("hy_v4", _LATENT),
    "inkling": ("inkling_text", {}),
    "inkling2": (
        "inkling2",
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                "unpadded_vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 16,
                "moe_intermediate_size": 32,
                "n_routed_experts": EXPERTS,
                "num_experts_per_tok": TOP_K,
                "rel_extent": 16,
                "d_rel": 4,
                "initializer_range": 0.3,
            },
            "vision_config": _VISION,
        },
    ),
    "jamba": (
        "jamba",
        {
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
    ),
    "jetmoe": ("jetmoe", {"kv_channels": 16, "num_key_value_heads": 4, "num_attention_heads": 12}),
    "kimi_linear": ("kimi_linear", _LATENT),
    "kolibri1": ("kolibri1", {}),
    "laguna": ("laguna", {}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}),
    "llama4": (
        "llama4_text",
        {
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
            "num_experts_per_tok": 2,
            "moe_layers": [0, 1, 2],
            "layer_types": None,
            "no_rope_layers": None,
            "attention_chunk_size": 64,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 32,
            "moe_topk": TOP_K,
            "zero_expert_num": 2,
            "head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "mellum": ("mellum", {}),
    "mimo_v2_flash": ("mimo_v2_flash", {}),
    "minimax": ("minimax", {}),
    "minimax_m2": ("minimax_m2", {}),
    "minimax_m3_vl": ("minimax_m3_vl_text", {}),
    "mistral4": ("mistral4", {"num_key_value_heads": 4}),
    "mistral_large4": ("mistral_large4_text", _LATENT),
    "mixtral": ("mixtral", {}),
    "muse_spark": ("muse_spark_text", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
        },
    ),
    "nllb_moe": (
        "nllb-moe",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "decoder_start_token_id": 2,
        },
    ),
    "olmoe": ("olmoe", {}),
    "openai_privacy_filter": ("openai_privacy_filter", {}),
    "phimoe": ("phimoe", {"num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", _MIXED),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_next": ("qwen3_next", _MIXED),
    "qwen3_omni_moe": ("qwen3_omni_moe_text", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", {}),
    "qwen4_exp": (
        "qwen4_exp_text",
        {
            **_MIXED,
            "ple_layer_ids": [],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
        },
    ),
    "solar_open": ("solar_open", {}),
    "step3p7": (
        "step3p7",
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 48,
                "moe_intermediate_size": 32,
                "share_expert_dim": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "n_routed_experts": EXPERTS,
                "num_experts_per_tok": TOP_K,
                "sliding_window": 16,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "layer_types": ["full_attention"] * 3,
                "initializer_range": 0.3,
            },
            "vision_config": {name: _VISION[name] for name in list(_VISION)[:4]},
        },
    ),
    "switch_transformers": (
        "switch_transformers",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 64,
            "decoder_start_token_id": 0,
        },
    ),
    "unlimited_ocr": ("unlimited_ocr_text", {}),
    "zaya": ("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
}

FAMILIES = tuple(_FAMILIES)
"""Every family there is a tiny model of."""


def config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """A tiny configuration of the family."""
    model_type, needs = _FAMILIES[family]
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    known = {*default.to_dict(), *vars(default), *(getattr(cls, "attribute_map", None) or {})}
    values = {name: value for name, value in _COMMON.items() if name in known}
    values |= needs
    for name, value in changes.items():
        for aliases in _SAME:
            values |= {alias: value for alias in aliases if name in aliases and alias in values}
    values |= changes
    layers = values.get("num_hidden_layers", 3)
    for name in ("layer_types", "mlp_layer_types"):  # one entry a layer, and each kind once before any twice
        kinds = default.to_dict().get(name)
        if isinstance(kinds, list) and name not in values and len(kinds) > layers:
            values[name] = (list(dict.fromkeys(kinds)) * layers)[:layers]
    return cls(**{name: value for name, value in values.items() if value is not None})


def module(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny float32 model with random weights, in eval mode, its selection biases not zero."""
    cfg = config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _class_of(cfg)(cfg).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name.endswith("tid2eid"):  # hash layers: k experts of every token id, all different
            tensor.data = torch.rand(len(tensor), EXPERTS, generator=generator).topk(tensor.shape[1]).indices
        if not tensor.is_floating_point():
            continue
        if "bias" in name and ("correction" in name or name.endswith("expert_bias")):
            tensor.data = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.05
        elif not tensor.isfinite().all() or tensor.abs().max() > 1e4 or (tensor.dim() > 1 and tensor.std() < 1e-6):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.2  # left empty, or all the same
    return made


def model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny `workbench.models.Model`, without a tokenizer."""
    return load(module(family, seed, **changes))


def inputs(made: Any, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids that avoid the special ones; for encoder–decoder models those of the decoder too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    given = {"input_ids": ids}
    if made.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, : length - 4].clone()
    return given


def _class_of(cfg: transformers.PretrainedConfig) -> Any:
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(cfg) in mapping:
            return mapping[type(cfg)]
    package = importlib.import_module(type(cfg).__module__.replace("configuration_", "modeling_"))
    for cls in vars(package).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, transformers.PreTrainedModel)
            and cls.config_class is type(cfg)
            and not cls.__name__.endswith("PreTrainedModel")
        ):
            return cls
    raise LookupError(f"no model class for {type(cfg).__name__}")
