"""A float weight that several stored tensors make up. Imports no torch until one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from calib.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class Header(NamedTuple):
    """What the header of a safetensors file says of one tensor, and of a shape also what it is."""

    dtype: str
    """As safetensors spells it: ``F8_E4M3``."""
    shape: tuple[int, ...]
    values: tuple[int, ...] | None = None
    """Of a ``weight_shape``, what it says, where more than headers is at hand."""


@dataclass(frozen=True)
class Weight:
    """One float weight."""

    name: str
    """What the tensor is called in the checkpoint that was quantized."""
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    """Names of the stored tensors that it is made of, by what they are in the layout."""
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    """From the stored tensors, by what they are, to the weight in float32."""


Reader = Callable[[Mapping[str, Header], Mapping[str, object]], Iterator[Weight]]
"""From the headers of all stored tensors and the ``quantization_config`` to the weights in one
layout.
"""


def malformed(name: str, what: str) -> CheckpointError:
    """What is raised of a quantized weight that cannot be read."""
    return CheckpointError(
        f"the quantized weight {name} cannot be read: {what}",
        hint="download the checkpoint again; or start from the float one that it was made from",
    )


def part(stored: Mapping[str, Header], name: str, of: str, *shapes: tuple[int, ...]) -> str:
    """``name``, which is among the stored tensors in one of ``shapes``.

    Args:
        stored: headers of all stored tensors.
        name: that of the tensor.
        of: the weight that it belongs to, for the message.
        shapes: what it may have; anything if there are none.

    Raises:
        CheckpointError: it is missing, or has another shape.
    """
    if name not in stored:
        raise malformed(of, f"{name} is missing")
    found = stored[name].shape
    if shapes and found not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise malformed(of, f"{name} has shape {list(found)}, expected {wanted}")
    return name


def matrix(stored: Mapping[str, Header], name: str) -> tuple[int, int]:
    """Shape of a stored tensor of two dimensions.

    Raises:
        CheckpointError: it has more or fewer.
    """
    shape = stored[name].shape
    if len(shape) != 2:
        raise malformed(name, f"it has shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def weight_settings(settings: Mapping[str, object]) -> list[Mapping[str, object]]:
    """What the ``config_groups`` of compressed-tensors and ModelOpt say of weights."""
    groups = settings.get("config_groups")
    entries = groups.values() if isinstance(groups, Mapping) else ()
    found = [entry.get("weights") for entry in entries if isinstance(entry, Mapping)]
    return [weights for weights in found if isinstance(weights, Mapping)]


def bits_of(settings: Mapping[str, object], key: str, known: tuple[int, ...]) -> int:
    """How many bits a number of the config says, which is one of ``known``.

    Raises:
        CheckpointError: it says none of them.
    """
    bits = settings.get(key)
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in known:
        raise CheckpointError(
            f"the quantization_config says {key} = {bits!r:.40}, and rotq reads"
            f" {', '.join(map(str, known))}",
            hint="start from the floating-point checkpoint that it was made from",
        )
    return bits
