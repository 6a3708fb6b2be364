"""Which device a run uses."""

from __future__ import annotations

import torch

from calib.errors import QuantizationError


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        QuantizationError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise QuantizationError(
            f"cannot use the device '{name}': {reason}", hint="--device cpu always works"
        ) from error
    return device
