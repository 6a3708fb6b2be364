"""Whether tensors that were read back are those that were written."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.artifact import QuantizedLinear


def bits_of(tensor: Tensor) -> Tensor:
    """Float formats compared bit by bit: float8 has no comparison of its own everywhere, and -0 is
    not 0.
    """
    return tensor.contiguous().view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def check_part(name: str, actual: Tensor | None, expected: Tensor) -> None:
    """Equal in the dtype of ``actual``, and of one shape."""
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape, (
        f"{name}: {list(actual.shape)} instead of {list(expected.shape)}"
    )
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, expected.to(actual.dtype)), name
        return
    assert torch.equal(actual.double(), expected.to(actual.dtype).double()), name


def second_scales(linear: QuantizedLinear) -> tuple[str, ...]:
    """Parts of ``linear`` that are the second level of NVFP4."""
    own = linear.input_scheme is not None and linear.input_scheme.scale_format == "e4m3"
    return ("weight_second_scale", "input_scale") if own else ("weight_second_scale",)


def check_second_scale(name: str, actual: Tensor | None, expected: Tensor) -> None:
    """A target may hold the inverse, and inverting twice rounds twice: by up to half an eps
    each.
    """
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape == ()
    eps = torch.finfo(torch.float32).eps
    assert abs(actual.double() - expected.double()) <= eps * (1 + eps) * expected.double(), name
