"""The module tree of a Hugging Face config, on the meta device: built once, and shared."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from calib.errors import CheckpointError
from calib.files.reading import reason_of
from calib.modules.attention import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST = 4
"""Module trees without weights that are kept: a run has its model in one or two dtypes."""
_KEPT: dict[tuple[type, str, str], Any] = {}


def template(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The module tree of ``config``, built once: a copy of it takes an eighth of the time.

    Nobody may change it.
    """
    attention = attention_implementation(config)
    # A copy, because from_config writes dtype and attention implementation into the config it is
    # given. What does not shape the tree is made the same, so that every reader of one model (the
    # checkpoint, an artifact, a trace) finds the one tree.
    own = deepcopy(config)
    own.dtype = dtype
    own._name_or_path = ""

    key = (type(own), own.to_json_string(use_diff=False), attention)
    if key not in _KEPT:
        from transformers import AutoModelForCausalLM  # here, because it takes seconds to import

        while len(_KEPT) >= _MOST:
            del _KEPT[next(iter(_KEPT))]
        try:
            with torch.device("meta"):
                _KEPT[key] = AutoModelForCausalLM.from_config(
                    own, dtype=dtype, attn_implementation=attention
                )
        except Exception as error:  # whatever a class makes of numbers that it did not expect
            raise CheckpointError(
                f"transformers cannot build the {own.model_type} model of this config:"
                f" {reason_of(error)}",
                hint="check the numbers in config.json",
            ) from error
    return _KEPT[key]
