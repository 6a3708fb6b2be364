"""The weight algorithms by name: ``rtn``, ``mse``, ``gptq:act_order=false,damping=0.1``,
``adaround:iterations=500``.

Their settings are data that a recipe can hold and check before anything heavy is imported; torch is
imported when a weight is rounded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from calib.errors import QuantizationError, did_you_mean
from calib.schemes import TensorScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calib.weights.rounded import Rounded


@dataclass(frozen=True)
class WeightAlgorithm(ABC):
    """How the weights of a linear are rounded; its fields are the settings."""

    name: ClassVar[str]

    @property
    def needs_moment(self) -> bool:
        """Whether it asks for the second moment of the linear's input, and so for calibration
        data.
        """
        return True

    def round(
        self,
        weight: Tensor,
        moment: Tensor | None,
        scheme: TensorScheme,
        dtype: torch.dtype | None = None,
        *,
        amax: Tensor | None = None,
    ) -> Rounded:
        """Quantize ``weight`` [out, in].

        Args:
            weight: any float dtype.
            moment: ``E[x xᵀ]`` of the input, ``[in, in]``; looked at only where
                :attr:`needs_moment`.
            scheme: format and granularity.
            dtype: dtype of the scales; float32 by default.
            amax: ``[]``, sets the second level of two-level scales; by default the largest
                magnitude of ``weight``.

        Raises:
            QuantizationError: the moment is needed and missing, does not fit, or holds NaN or Inf;
                or the algorithm does not do this format.
        """
        import torch

        if self.needs_moment and moment is None:
            raise QuantizationError(
                f"'{self.name}' needs the second moment of the linear's input, and there is none"
            )
        return self._round(weight, moment, scheme, dtype or torch.float32, amax)

    @abstractmethod
    def _round(
        self,
        weight: Tensor,
        moment: Tensor | None,
        scheme: TensorScheme,
        dtype: torch.dtype,
        amax: Tensor | None,
    ) -> Rounded: ...


@dataclass(frozen=True)
class Rtn(WeightAlgorithm):
    """Round to nearest: :func:`calib.weights.clip.rtn`."""

    name: ClassVar[str] = "rtn"

    @property
    def needs_moment(self) -> bool:
        """Not needed."""
        return False

    def _round(
        self,
        weight: Tensor,
        moment: Tensor | None,
        scheme: TensorScheme,
        dtype: torch.dtype,
        amax: Tensor | None,
    ) -> Rounded:
        from calib.weights.clip import rtn

        return rtn(weight, scheme, dtype, amax=amax)


@dataclass(frozen=True)
class Mse(WeightAlgorithm):
    """Limits searched for the least squared error: :func:`calib.weights.clip.mse`."""

    name: ClassVar[str] = "mse"
    weighted: bool = False
    """Count the error of a column by E[x²], which needs calibration data; else all columns alike.
    """

    @property
    def needs_moment(self) -> bool:
        """Only to weight columns."""
        return self.weighted

    def _round(
        self,
        weight: Tensor,
        moment: Tensor | None,
        scheme: TensorScheme,
        dtype: torch.dtype,
        amax: Tensor | None,
    ) -> Rounded:
        from calib.weights.clip import mse

        return mse(weight, scheme, dtype, moment=moment if self.weighted else None, amax=amax)


@dataclass(frozen=True)
class Gptq(WeightAlgorithm):
    """Errors made up for by later columns: :func:`calib.weights.gptq.gptq`, which says what the
    settings mean.
    """

    name: ClassVar[str] = "gptq"
    act_order: bool = True
    static_groups: bool = True
    block: int = 128
    damping: float = 0.01
    clip: bool = True

    def __post_init__(self) -> None:
        _check(self, "block", self.block >= 1, "at least 1")
        _check(self, "damping", 0 <= self.damping < math.inf, "at least 0")

    def _round(
        self,
        weight: Tensor,
        moment: Tensor | None,
        scheme: TensorScheme,
        dtype: torch.dtype,
        amax: Tensor | None,
    ) -> Rounded:
        from calib.weights.gptq import gptq

        assert moment is not None  # it is needed, and round() has checked it
        return gptq(weight, moment, scheme, dtype, amax=amax, **vars(self))


@dataclass(frozen=True)
class AdaRound(WeightAlgorithm):
    """Learnt rounding up or down: :func:`calib.weights.adaround.adaround`, which says what the
    settings mean.
    """

    name: ClassVar[str] = "adaround"
    iterations: int = 1000
    regularisation: float = 100.0
    learning_rate: float = 0.02
    clip: bool = True

    def __post_init__(self) -> None:
        _check(self, "iterations", self.iterations >= 1, "at least 1")
        _check(self, "regularisation", 0 <= self.regularisation < math.inf, "at least 0")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0")

    def _round(
        self,
        weight: Tensor,
        moment: Tensor | None,
        scheme: TensorScheme,
        dtype: torch.dtype,
        amax: Tensor | None,
    ) -> Rounded:
        from calib.weights.adaround import adaround

        assert moment is not None  # it is needed, and round() has checked it
        return adaround(weight, moment, scheme, dtype, **vars(self))


ALGORITHMS: Mapping[str, type[WeightAlgorithm]] = {
    kind.name: kind for kind in (Rtn, Mse, Gptq, AdaRound)
}


def algorithm_named(spec: str) -> WeightAlgorithm:
    """The algorithm that ``spec`` names: ``name`` or ``name:setting=value,setting=value``.

    Raises:
        QuantizationError: an algorithm or setting that does not exist, twice the same setting, or a
            value that it cannot take; the hint lists what exists.
    """
    name, colon, rest = spec.strip().partition(":")
    kind = ALGORITHMS.get(name)
    if kind is None:
        raise QuantizationError(
            f"unknown weight algorithm '{name}'",
            hint=f"{did_you_mean(name, ALGORITHMS)}the algorithms are: {', '.join(ALGORITHMS)}",
        )

    known = {field.name: type(field.default) for field in fields(kind)}
    values: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, _, text = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise QuantizationError(
                f"weight algorithm '{name}' has no setting '{key}'",
                hint=f"its settings are: {', '.join(known) or 'none'}",
            )
        if key in values:
            raise QuantizationError(f"'{spec}' sets '{key}' twice")
        values[key] = _parse(name, key, text, known[key])
    return kind(**values)


_READERS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def _parse(name: str, key: str, text: str, kind: type) -> Any:
    read, what = _READERS[kind]
    try:
        return read(text)
    except (KeyError, ValueError) as error:
        raise QuantizationError(
            f"'{key}' of weight algorithm '{name}' must be {what}, not '{text}'"
        ) from error


def _check(algorithm: WeightAlgorithm, key: str, valid: bool, what: str) -> None:
    if not valid:
        value = getattr(algorithm, key)
        raise QuantizationError(
            f"'{key}' of weight algorithm '{algorithm.name}' must be {what}, not {value}"
        )
