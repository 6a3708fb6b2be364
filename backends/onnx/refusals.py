"""Models that cannot become a graph, found before anything is calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.base import Reason
from backends.onnx.embeddings import table_refusal
from backends.onnx.experts import ACTIVATIONS
from backends.onnx.tryout import untraceable
from calib.architectures import wiring_of
from calib.schemes import LinearScheme


def graph_refusal(config: Mapping[str, Any], linears: Mapping[str, LinearScheme]) -> Reason | None:
    """Why the model of ``config`` cannot be written as ONNX, and what to do; ``None`` if it can.

    Args:
        config: Hugging Face config as a dictionary.
        linears: how what is quantized is, by module name.
    """
    wiring = wiring_of(config)
    activation = getattr(wiring.config, "hidden_act", None)
    if wiring.expert_parameters and activation not in ACTIVATIONS:
        return Reason(
            (
                f"its experts use the activation '{activation}', for which the graph has"
                " no operators"
            ),
            (
                f"the activations of experts that can be written are {', '.join(ACTIVATIONS)}; "
                "the safetensors backend writes any"
            ),
        )

    tables = [table.name for table in wiring.embeddings if table.name in linears]
    refused = (table_refusal(name, linears[name].weight) for name in tables)
    return next(filter(None, refused), None) or untraceable(config)
