"""Whether what a written folder holds is what the artifact has: bit by bit, in the dtype that the
target stores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calib.artifact import QuantizedCache, QuantizedLinear


def altered_parts(found: QuantizedLinear, expected: QuantizedLinear) -> list[str]:
    """Names of the parts of ``found``, read from a folder, that are not those of ``expected``."""
    keys = found.tensors().keys() ^ expected.tensors().keys()
    altered = [key.removeprefix(f"{expected.name}.") for key in sorted(keys)]
    if found.description() != expected.description():
        altered.append("scheme")

    inverted = _second_scales(expected)
    for key, tensor in expected.tensors().items():
        part = key.removeprefix(f"{expected.name}.")
        actual: Tensor | None = getattr(found, part)
        if actual is not None and not same_values(actual, tensor, inverted=part in inverted):
            altered.append(part)
    return altered


def altered_cache(found: QuantizedCache | None, expected: QuantizedCache | None) -> list[str]:
    """The same of the scales of a cache."""
    if found is None or expected is None:
        return [] if found is expected else ["cache"]
    return list(_altered_scales(found, expected))


def _altered_scales(found: QuantizedCache, expected: QuantizedCache) -> Iterator[str]:
    if found.scheme != expected.scheme:
        yield "scheme"
    for part in ("key_scale", "value_scale"):
        actual, wanted = getattr(found, part), getattr(expected, part)
        if actual.keys() != wanted.keys():
            yield f"{part} of other layers"
        for layer in actual.keys() & wanted.keys():
            if not same_values(actual[layer], wanted[layer]):
                yield f"{part} of layer {layer}"


def same_values(found: Tensor, expected: Tensor, *, inverted: bool = False) -> bool:
    """Whether ``found`` is ``expected`` in the dtype of ``found``.

    Args:
        found: what was read.
        expected: of the artifact.
        inverted: whether the target may hold the inverse: inverting twice rounds twice, by up to
            half an eps each.
    """
    if found.shape != expected.shape:
        return False
    if inverted:
        eps = torch.finfo(torch.float32).eps
        apart = (found.double() - expected.double()).abs()
        return bool((apart <= eps * (1 + eps) * expected.double()).all())
    if found.dtype.itemsize == 1:  # float8 has no comparison of its own, and -0 is not 0
        if expected.dtype != found.dtype:
            return False
        return torch.equal(
            found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
        )
    return torch.equal(found, expected.to(found.dtype))


def same_either_way(found: Tensor, expected: Tensor) -> bool:
    """The same of a float tensor that :class:`~backends.base.ReadsFloats` gives: a target may store
    the weight of a linear ``[in, out]``.
    """
    turned = expected.dim() == 2 and same_values(found, expected.T)
    return turned or same_values(found, expected)


def _second_scales(linear: QuantizedLinear) -> tuple[str, ...]:
    """Parts of ``linear`` that are the second level of NVFP4."""
    own = linear.input_scheme is not None and linear.input_scheme.scale_format == "e4m3"
    return ("weight_second_scale", "input_scale") if own else ("weight_second_scale",)
