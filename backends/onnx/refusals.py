"""Models that cannot become a graph, found before anything is calibrated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import AutoConfig

from backends.onnx.experts import ACTIVATIONS
from calib.architectures import architecture_for


def graph_refusal(config: Mapping[str, Any], linears: Collection[str]) -> tuple[str, str] | None:
    """Why the model of ``config`` cannot be written as ONNX, and what to do; ``None`` if it can.

    Args:
        config: Hugging Face config as a dictionary.
        linears: names of what is quantized.
    """
    hf_config: Any = AutoConfig.for_model(**config)
    if architecture_for(hf_config).expert_parameters(hf_config) and hf_config.hidden_act not in ACTIVATIONS:
        return (
            f"its experts use the activation '{hf_config.hidden_act}', for which the graph has no operators",
            f"the activations of experts that can be written are {', '.join(ACTIVATIONS)}; "
            "the safetensors backend writes any",
        )
    return None
