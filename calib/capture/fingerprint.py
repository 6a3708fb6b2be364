"""A short name for a model's exact weights."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

_SAMPLED = 256


class Fingerprint:
    """The sha256 of the name, shape, dtype and about 256 evenly spaced elements of every parameter,
    which are shown to it in any order.

    It tells a folded, rotated or fine-tuned model from the original in well under a second, where
    hashing all weights of a 7B model takes a minute. It is no protection against somebody who
    changes single weights on purpose.
    """

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, parameter: Tensor) -> None:
        """Take in the parameter ``name``, as the module tree of the model stores it."""
        header = f"{name} {list(parameter.shape)} {parameter.dtype};".encode()
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)]
        self._parts[name] = header + sample.double().cpu().numpy().astype("<f8").tobytes()

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def value(self) -> str:
        """The sha256 of all parameters so far, as hex."""
        digest = hashlib.sha256()
        for _, part in sorted(self._parts.items()):
            digest.update(part)
        return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """The :class:`Fingerprint` of ``model``, as hex."""
    fingerprint = Fingerprint()
    for name, parameter in model.named_parameters():
        fingerprint.add(name, parameter)
    return fingerprint.value()
