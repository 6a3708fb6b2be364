"""A checkpoint as the network that its makers published: the one way to load one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calib.errors import CheckpointError
from calib.files.reading import check_size, is_failure, reason_of
from calib.modules.attention import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_network(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    complete: bool = False,
    floats: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The causal LM in ``folder``, in eval mode and without gradients.

    It attends as ``config`` says (:func:`calib.modules.attention.attention_implementation`), which
    what transformers picks by itself does not for every family.

    Args:
        folder: a checkpoint folder.
        config: its Hugging Face config.
        dtype: of its parameters.
        device: where it is put.
        complete: whether it must also hold no tensor that the network has no place for.
        floats: its tensors by their published names, where the files in the folder are quantized.

    Raises:
        CheckpointError: transformers does not load it, or does not find every tensor of the network
            in it.
    """
    # here, because it takes seconds to import
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    generation = Path(folder) / "generation_config.json"
    try:
        if generation.exists():
            check_size(generation)
        # the class itself: the automatic one asks for a folder
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            folder if floats is None else None,
            config=config,
            dtype=dtype,
            attn_implementation=attention_implementation(config),
            output_loading_info=True,
            state_dict=None if floats is None else dict(floats),
        )
    # whatever it makes of side files (generation_config.json) and numbers that it did not expect
    except Exception as error:
        if not is_failure(error):
            raise
        raise CheckpointError(
            f"transformers does not load the model in '{folder}': {reason_of(error)}",
            hint="download or write the folder again",
        ) from error
    if not complete:
        info.pop("unexpected_keys", None)

    # What is missing would be made up at random, with no more than a warning.
    wrong = sorted({str(key) for names in info.values() for key in names})
    if wrong:
        raise CheckpointError(
            f"transformers does not load '{folder}' as it was written: {', '.join(wrong[:4])}",
            hint="its weights do not fit its config; download or write the folder again",
        )
    network: nn.Module = model.to(device).eval().requires_grad_(False)
    return network
