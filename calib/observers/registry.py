"""The observers by name: ``min_max``, ``percentile:99.99``, ``clip_std:3`` and so on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from calib.arithmetic.grids import weight_limits
from calib.errors import QuantizationError, did_you_mean
from calib.observers.entropy import entropy_limits
from calib.observers.extremes import Extremes, MovingExtremes
from calib.observers.histogram import Histogram
from calib.observers.moments import Moments
from calib.observers.mse import mse_limits
from calib.observers.observer import Observer, ObserverFactory, RuleObserver
from calib.observers.rules import (
    clip_limits,
    clip_std_limits,
    clustered_limits,
    fixed_scale_limits,
    min_max_limits,
    percentile_limits,
)
from calib.observers.statistics import Reduce
from calib.schemes import PerCluster, PerTensor, PerToken, TensorScheme


@dataclass(frozen=True)
class Parameter:
    """The number that an observer's name may be followed by.

    Attributes:
        meaning: what it is, for messages.
        least: the smallest value allowed.
        most: the largest.
        open: whether ``least`` itself is not allowed.
        default: what holds where the name stands alone; ``None`` where a number must be given.
    """

    meaning: str
    least: float
    most: float
    open: bool
    default: float | None


@dataclass(frozen=True)
class Entry:
    """An observer: its parameter, if it has one, and how it is made from spec, parameter and
    scheme.
    """

    parameter: Parameter | None
    build: Callable[[str, float, TensorScheme], Observer]


def _min_max(spec: str, _: float, scheme: TensorScheme) -> Observer:
    if isinstance(scheme.granularity, PerCluster):
        rule = partial(clustered_limits, clusters=scheme.granularity.clusters)
        return RuleObserver(spec, Moments(by_channel=True), rule)
    return RuleObserver(spec, Extremes(_reduce(spec, scheme)), min_max_limits)


def _moving_average(spec: str, momentum: float, scheme: TensorScheme) -> Observer:
    return RuleObserver(spec, MovingExtremes(momentum, _reduce(spec, scheme)), min_max_limits)


def _clip(spec: str, bound: float, scheme: TensorScheme) -> Observer:
    return RuleObserver(spec, Extremes(_reduce(spec, scheme)), partial(clip_limits, bound=bound))


def _fixed_scale(spec: str, scale: float, scheme: TensorScheme) -> Observer:
    _require(
        spec,
        scheme.scale_format == "compute" and not scheme.dynamic,
        "a scale that is static and not of FP8 or E8M0",
    )
    return RuleObserver(
        spec,
        Extremes(_reduce(spec, scheme)),
        partial(fixed_scale_limits, scale=scale, scheme=scheme),
    )


def _clip_std(spec: str, k: float, scheme: TensorScheme) -> Observer:
    _require_one_scale(spec, scheme)
    return RuleObserver(spec, Moments(), partial(clip_std_limits, k=k))


def _percentile(spec: str, p: float, scheme: TensorScheme) -> Observer:
    _require_one_scale(spec, scheme)
    return RuleObserver(spec, Histogram(), partial(percentile_limits, p=p, scheme=scheme))


def _entropy(spec: str, _: float, scheme: TensorScheme) -> Observer:
    _require_one_scale(spec, scheme)
    _require(
        spec, scheme.format.kind == "integer", "an integer format, for which the method is defined"
    )
    return RuleObserver(spec, Histogram(), partial(entropy_limits, fmt=scheme.format))


def _mse(spec: str, _: float, scheme: TensorScheme) -> Observer:
    _require(
        spec,
        scheme.granularity == PerTensor() and not scheme.dynamic,
        "one static scale for the whole tensor",
    )
    return RuleObserver(spec, Histogram(), partial(mse_limits, scheme=scheme))


OBSERVERS = {
    "min_max": Entry(None, _min_max),
    "moving_average": Entry(Parameter("weight of the past", 0, 1, False, 0.9), _moving_average),
    "percentile": Entry(
        Parameter("per cent of the values kept", 50, 100, True, 99.99), _percentile
    ),
    "entropy": Entry(None, _entropy),
    "mse": Entry(None, _mse),
    "clip": Entry(
        Parameter("largest magnitude", 0, torch.finfo(torch.float32).max, True, None), _clip
    ),
    "clip_std": Entry(Parameter("standard deviations from the mean", 0, 1e6, True, 3.0), _clip_std),
    "fixed_scale": Entry(Parameter("scale", 0, 1e30, True, None), _fixed_scale),
}
"""Every observer by name. ``docs/calibration.md`` says what each does."""


def observer_named(spec: str) -> ObserverFactory:
    """Look up an observer: a name, or a name and its number, as in ``percentile:99.99``.

    Returns:
        Makes a fresh observer for a tensor scheme; refuses, with a QuantizationError, a scheme that
        it cannot serve.

    Raises:
        QuantizationError: no observer has this name (the hint lists all), or its number is missing
            or out of range.
    """
    name, colon, text = spec.partition(":")
    if name not in OBSERVERS:
        raise QuantizationError(
            f"unknown observer '{name}'",
            hint=f"{did_you_mean(name, OBSERVERS)}the observers are:"
            f" {', '.join(map(_usage, OBSERVERS))}",
        )
    entry = OBSERVERS[name]
    if entry.parameter is None:
        if colon:
            raise QuantizationError(
                f"observer '{name}' takes no number, got '{spec}'", hint=f"use '{name}'"
            )
        return partial(entry.build, spec, 0.0)
    return partial(entry.build, spec, _number(spec, text, colon, entry.parameter))


def _number(spec: str, text: str, colon: str, parameter: Parameter) -> float:
    try:
        value = float(text) if colon else parameter.default
    except ValueError:
        value = None
    least, most = parameter.least, parameter.most
    if value is None or not least <= value <= most or (parameter.open and value == least):
        kind = f"{'above' if parameter.open else 'from'} {least:g} to {most:g}"
        raise QuantizationError(
            f"observer '{spec}' needs a number {kind}: the {parameter.meaning}",
            hint=f"write it as {_usage(spec.partition(':')[0])}",
        )
    return value


def _usage(name: str) -> str:
    parameter = OBSERVERS[name].parameter
    if parameter is None:
        return name
    return f"{name}:NUMBER" if parameter.default is None else f"{name}[:{parameter.default:g}]"


def _reduce(spec: str, scheme: TensorScheme) -> Reduce:
    """The limits of each group of the scheme; what a dynamic one has to observe, if anything, is
    the whole tensor's.
    """
    if scheme.dynamic:
        return torch.aminmax
    _require(
        spec,
        not isinstance(scheme.granularity, PerCluster | PerToken),
        "scales of fixed groups of values",
    )
    return partial(weight_limits, granularity=scheme.granularity)


def _require_one_scale(spec: str, scheme: TensorScheme) -> None:
    _require(
        spec, scheme.dynamic or scheme.granularity == PerTensor(), "one scale for the whole tensor"
    )


def _require(spec: str, met: bool, what: str) -> None:
    if not met:
        raise QuantizationError(
            f"observer '{spec}' needs {what}", hint="use min_max for this tensor"
        )
