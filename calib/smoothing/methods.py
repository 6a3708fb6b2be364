"""The smoothing methods by name: ``none``, ``smoothquant:0.5``, ``awq`` and so on; :data:`KNOWN`
lists them
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from calib.errors import QuantizationError, did_you_mean


@dataclass(frozen=True)
class SmoothQuant:
    """Balance the largest magnitudes of inputs and weights (Xiao et al., 2023)."""

    alpha: float | Literal["auto"] = 0.5
    """How much of an input channel's size moves into the weights, 0 to 1; ``auto`` searches it for
    every group.
    """

    @property
    def needs_moment(self) -> bool:
        """Whether the search asks for second moments of inputs."""
        return self.alpha == "auto"

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise QuantizationError(
                f"SmoothQuant's alpha is {self.alpha}", hint="it lies in 0 to 1, or is 'auto'"
            )


@dataclass(frozen=True)
class Awq:
    """Protect the weights that large inputs meet, as far as it pays (Lin et al., 2023)."""

    grid: int = 20
    """Steps of the search between not smoothing and scaling by the whole mean magnitude."""

    @property
    def needs_moment(self) -> bool:
        """The search does."""
        return True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise QuantizationError(
                f"AWQ's grid has {self.grid} steps", hint="it needs at least one; 20 is usual"
            )


Smoothing = SmoothQuant | Awq

KNOWN = ("none", "smoothquant", "smoothquant:ALPHA", "smoothquant:auto", "awq", "awq:grid=STEPS")
"""What :func:`smoothing_named` understands."""


def smoothing_named(text: str) -> Smoothing | None:
    """The method that ``text`` names; ``None`` for ``none``.

    Raises:
        QuantizationError: an unknown name, or a value out of range.
    """
    name, _, setting = text.partition(":")
    with suppress(ValueError):  # a setting that is no number
        match name, setting:
            case "none", "":
                return None
            case "smoothquant", "" | "auto":
                return SmoothQuant("auto") if setting else SmoothQuant()
            case "smoothquant", _:
                return SmoothQuant(float(setting))
            case "awq", "":
                return Awq()
            case "awq", _ if setting.startswith("grid="):
                return Awq(int(setting.removeprefix("grid=")))
    guess = did_you_mean(text, KNOWN)
    raise QuantizationError(
        f"unknown smoothing '{text}'", hint=f"{guess}choose from {', '.join(KNOWN)}"
    )
