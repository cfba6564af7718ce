"""What each mixture-of-experts family of transformers does to route a token, as data.

A family is a package of `transformers.models` whose model has routers over experts; its key here is the package's
name (`olmoe`, `qwen3_vl_moe`), whichever of the package's configurations a checkpoint uses. Gating is written as the
steps that a router takes, in order, in this vocabulary:

    softmax, sigmoid, sqrt-softplus   scores from logits; before `top-k`: over all experts, after it: over the selected
    + bias                            a per-expert bias moves the selection, and never the weights
    groups                            only experts of the best groups can be selected
    top-k                             the selection
    renormalised                      the k weights are divided by their sum
    scaled                            the weights are multiplied by a factor of the model
    hash                              the token id alone selects
    product keys                      an expert is a pair of keys, its logit the sum of theirs
    sparsemixer                       top-2 one after the other, each weight a softmax over the experts near the best

A trailing `?` marks a step that a flag of the configuration switches; a layer of a loaded model has it resolved.

>>> FAMILIES["mixtral"].gating
'softmax, top-k, renormalised'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one family's routers.

    gating    the steps, in the vocabulary above
    scoring   "softmax", "sigmoid" or "sqrt-softplus": what makes the full distribution p out of the logits; or
              "config:NAME" where the configuration's field NAME says which
    layout    where the selection is read:
              "standard"      experts(hidden, ids, weights): the arguments that the experts consume
              "one-hot"       experts(hidden, 0/1 mask, weight)
              "dense"         the router returns a score for every expert, 0 where not selected
              "sorted"        the router returns token rows sorted by expert
              "product keys"  one module does it all
    logits    position of the logits in what the router returns, or the name of the router's own linear layer
    selects   the function whose last call in the router selects: "topk", "max" or "argmax"
    skips     whether a weight of exactly 0 means that the token skipped the layer
    two_ranks whether the experts module breaks when called with one expert a token
    caveat    what a reader of a trace of this family must know
    refused   why the family can't be traced; empty where it can
    """

    gating: str
    scoring: str = "softmax"
    layout: str = "standard"
    logits: int | str = 0
    selects: str = "topk"
    skips: bool = False
    two_ranks: bool = False
    caveat: str = ""
    refused: str = ""


_SOFTMAX_FLAG = Family("softmax, top-k, renormalised?")
_SOFTMAX = Family("softmax, top-k, renormalised")
_TOPK_SOFTMAX = Family("top-k, softmax")
_SIGMOID_GROUPS = Family("sigmoid + bias, groups, top-k, renormalised?, scaled", "sigmoid")
_SIGMOID_BIAS = Family("sigmoid + bias, top-k, renormalised", "sigmoid")
_SIGMOID_BIAS_SCALED = Family("sigmoid + bias, top-k, renormalised, scaled", "sigmoid")
_DEEPSEEK_V2 = Family("softmax, groups?, top-k, scaled")
_GEMMA = Family(
    "softmax, top-k, renormalised, scaled",
    logits="proj",
    caveat="Weights are scaled by a factor of each expert, so they don't sum to 1.",
)

FAMILIES: dict[str, Family] = {
    "afmoe": _SIGMOID_BIAS_SCALED,
    "aria": _TOPK_SOFTMAX,
    "axk1": _SIGMOID_GROUPS,
    "axk2": _SIGMOID_GROUPS,
    "bailing_hybrid": _SIGMOID_GROUPS,
    "beam": Family("sigmoid + bias, groups, top-k, renormalised?", "sigmoid"),
    "cohere2_moe": Family("top-k, {scoring}, renormalised?", "config:expert_selection_fn"),
    "dbrx": Family("softmax, top-k, renormalised?", caveat="Weights are renormalised by the p-norm of the config."),
    "deepseek_ocr2": _DEEPSEEK_V2,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _SIGMOID_GROUPS,
    "deepseek_v32": _SIGMOID_GROUPS,
    "deepseek_v4": Family(
        "{scoring} + bias, top-k, renormalised, scaled",
        "config:scoring_func",
        caveat="Hash layers select by token id: their entropy, margin and probabilities are missing. The cache is "
        "compressed in windows counted from the padded start, so padding on the left moves the routing of a text.",
    ),
    "diffusion_gemma": _GEMMA,
    "doge": Family(
        "product keys, top-k, softmax",
        layout="product keys",
        caveat="The routing of a token depends on the other tokens of its batch (the model mixes them): padding and "
        "batching change it, and it isn't causal.",
    ),
    "dots1": _SIGMOID_GROUPS,
    "dots3_note": _SIGMOID_GROUPS,
    "ernie4_5_moe": Family("softmax + bias, top-k, renormalised"),
    "ernie4_5_vl_moe": Family(
        "softmax + bias, top-k, renormalised",
        caveat="Text and images have experts of their own: text-only input is traced, through the text experts.",
    ),
    "exaone_moe": _SIGMOID_GROUPS,
    "flex_olmo": _SOFTMAX_FLAG,
    "flint": Family("sigmoid, top-k, renormalised?", "sigmoid"),
    "gemma4": _GEMMA,
    "glm4_moe": _SIGMOID_GROUPS,
    "glm4_moe_lite": _SIGMOID_GROUPS,
    "glm4v_moe": _SIGMOID_GROUPS,
    "glm5_next": _SIGMOID_GROUPS,
    "glm_moe_dsa": _SIGMOID_GROUPS,
    "gpt_oss": Family("top-k, softmax", caveat="MXFP4 checkpoints must be loaded dequantised."),
    "granitemoe": _TOPK_SOFTMAX,
    "granitemoe_swa": _TOPK_SOFTMAX,
    "granitemoehybrid": _TOPK_SOFTMAX,
    "granitemoeshared": _TOPK_SOFTMAX,
    "hunyuan_v1_moe": _SOFTMAX,
    "hy_v3": _SIGMOID_BIAS_SCALED,
    "hy_v4": _SIGMOID_GROUPS,
    "inkling": Family(
        "sigmoid + bias, top-k, renormalised, scaled",
        "sigmoid",
        caveat="Weights are normalised together with those of the shared experts, so they sum to less than the scale.",
    ),
    "inkling2": Family("{scoring} + bias, top-k, renormalised, scaled", "config:scoring_func"),
    "jamba": Family("softmax, top-k"),
    "jetmoe": Family(
        "top-k, softmax",
        layout="sorted",
        logits=4,
        caveat="Attention has experts too: its routers are layers of their own (`…self_attention.experts.router`).",
    ),
    "kimi_linear": _SIGMOID_GROUPS,
    "kolibri1": Family("logits + bias, top-k, sigmoid, renormalised?", "sigmoid"),
    "laguna": Family(
        "sigmoid + bias, top-k, renormalised", "sigmoid", caveat="Logits are recorded after their soft cap."
    ),
    "lfm2_moe": Family("sigmoid + bias?, top-k, renormalised?, scaled", "sigmoid"),
    "llama4": Family(
        "top-k, sigmoid",
        "sigmoid",
        layout="dense",
        logits=1,
        caveat="The weight scales the expert's input, not its output: a norm is that of the output for the scaled "
        "input.",
    ),
    "longcat_flash": Family(
        "softmax + bias, top-k, scaled",
        two_ranks=True,
        caveat="The last ids are zero-computation experts (they return their input); they count in n_experts.",
    ),
    "mellum": _SOFTMAX_FLAG,
    "mimo_v2_flash": _SIGMOID_GROUPS,
    "minimax": _SOFTMAX,
    "minimax_m2": _SIGMOID_BIAS,
    "minimax_m3_vl": _SIGMOID_BIAS,
    "mistral4": Family("softmax, groups, top-k, renormalised?, scaled"),
    "mistral_large4": Family("softmax, groups, top-k, renormalised, scaled"),
    "mixtral": _SOFTMAX,
    "muse_spark": Family(
        "sigmoid + bias, top-k, renormalised, scaled",
        "sigmoid",
        caveat="Logits are recorded after their multiplier; norms are of the experts' outputs after their RMS norm.",
    ),
    "nemotron_h": Family(
        "sigmoid + bias, groups, top-k, renormalised?, scaled",
        "sigmoid",
        caveat="Where experts work in a latent space, norms are of the latent outputs.",
    ),
    "nllb_moe": Family(
        "softmax, top-k, renormalised",
        layout="one-hot",
        refused="transformers' NLLB-MoE runs only experts 0 and 1 whatever its router selects (a 0/1 mask is taken for "
        "expert ids), so no record of its routing would be true",
    ),
    "olmoe": _SOFTMAX_FLAG,
    "openai_privacy_filter": Family(
        "top-k, softmax, scaled", caveat="Weights sum to 1/k: the model divides them by k."
    ),
    "phimoe": Family(
        "sparsemixer",
        selects="max",
        caveat="Each of the two weights is a softmax of its own, so they don't sum to 1; the margin is that of the "
        "second choice.",
    ),
    "qwen2_moe": _SOFTMAX_FLAG,
    "qwen3_5_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX_FLAG,
    "qwen3_next": _SOFTMAX_FLAG,
    "qwen3_omni_moe": Family("softmax, top-k, renormalised?", caveat="The thinker is traced, the talker isn't."),
    "qwen3_vl_moe": _SOFTMAX,
    "qwen4_exp": _SOFTMAX_FLAG,
    "solar_open": _SIGMOID_GROUPS,
    "step3p7": _SIGMOID_BIAS,
    "switch_transformers": Family(
        "softmax, top-k",
        layout="one-hot",
        logits=2,
        selects="argmax",
        caveat="A token beyond an expert's capacity (counted within its padded row) has no expert. Encoder and decoder "
        "are stacks of their own.",
    ),
    "unlimited_ocr": _DEEPSEEK_V2,
    "zaya": Family(
        "softmax + bias, top-k",
        skips=True,
        caveat="A token that the router lets skip the layer has no expert; the entropy counts the skip, logits and "
        "probabilities leave it out.",
    ),
}


def families() -> pd.DataFrame:
    """The table behind `workbench models`: a row a family, sorted by name.

    Columns: family, traced (bool), gating, scoring, layout, note (the caveat, or why it is refused).
    """
    import pandas as pd

    rows = [
        {
            "family": name,
            "traced": not family.refused,
            "gating": family.gating.format(scoring=family.scoring),
            "scoring": family.scoring,
            "layout": family.layout,
            "note": family.refused or family.caveat,
        }
        for name, family in sorted(FAMILIES.items())
    ]
    return pd.DataFrame(rows)
