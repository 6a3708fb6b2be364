"""Rows of the table: norms behind attention and MLP, which refuse R1.

Each row names the modeling file of transformers 5 that it mirrors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calib.architectures.architecture import Architecture
from calib.architectures.pieces import (
    ATTENTION_BIAS,
    LAYER,
    POST_NORM,
    PRE_ATTENTION,
    PRE_MLP,
    QK_NORM_MODULES,
    QK_NORMS,
    QKV_PROJ,
    attention,
    gated_mlp,
    packed_mlp,
)
from calib.architectures.spec import NormSpec
from calib.architectures.table_pre_norm import GEMMA, LLAMA

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_POST_ATTENTION = f"{LAYER}.post_attention_layernorm"
_POST_MLP = f"{LAYER}.post_feedforward_layernorm"
_POST = (f"{_POST_ATTENTION}.weight", f"{_POST_MLP}.weight")

# models/gemma2/modeling_gemma2.py: norms before and after both attention and MLP.
_GEMMA2_PRE_MLP = f"{LAYER}.pre_feedforward_layernorm"
GEMMA2 = replace(
    GEMMA,
    name="Gemma-2",
    model_types=("gemma2",),
    linears=attention() + gated_mlp(_GEMMA2_PRE_MLP),
    norms=(NormSpec(PRE_ATTENTION), NormSpec(_GEMMA2_PRE_MLP)),
    untouched=_POST,
    rotations_refused={"r1": POST_NORM},
)

# models/gemma3/modeling_gemma3.py, Gemma3ForCausalLM: as Gemma-2 with norms on queries and keys.
GEMMA3 = replace(GEMMA2, name="Gemma-3", model_types=("gemma3_text",), untouched=_POST + QK_NORMS)

# models/olmo2/modeling_olmo2.py: attention and MLP read the residual stream itself, their outputs
# are normalised; models/olmo3/modeling_olmo3.py has windows and two sets of rotary frequencies.
OLMO2 = replace(
    LLAMA,
    name="OLMo-2",
    model_types=("olmo2", "olmo3"),
    linears=attention(None) + gated_mlp(None),
    norms=(),
    untouched=_POST + QK_NORMS,
    rotations_refused={"r1": POST_NORM},
    biases=ATTENTION_BIAS,
)


def _exaone4_rope(config: PreTrainedConfig, layer: int) -> bool:
    """Exaone4Attention: where there are windows, layers without one have no RoPE."""
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


# models/exaone4/modeling_exaone4.py: as OLMo-2, with norms of queries and keys per head.
EXAONE4 = replace(
    OLMO2,
    name="EXAONE 4",
    model_types=("exaone4",),
    rope=_exaone4_rope,
    query_key_norms=QK_NORM_MODULES,
    biases={},
)

# models/glm4/modeling_glm4.py: four norms, as in Gemma-2; gate and up in one linear.
GLM4 = replace(
    LLAMA,
    name="GLM-4",
    model_types=("glm4",),
    linears=attention() + packed_mlp(PRE_MLP),
    untouched=(
        f"{LAYER}.post_self_attn_layernorm.weight",
        f"{LAYER}.post_mlp_layernorm.weight",
    ),
    rotations_refused={"r1": POST_NORM},
    biases={QKV_PROJ: ("attention_bias", True)},
)

POST_NORMS: tuple[Architecture, ...] = (GEMMA2, GEMMA3, OLMO2, EXAONE4, GLM4)
