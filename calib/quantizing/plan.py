"""What is to be done to each linear: a scheme with its finer controls and overrides, resolved for
one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from calib.architectures import LinearSpec, Wiring
from calib.errors import QuantizationError
from calib.schemes import (
    KV_SCHEMES,
    Granularity,
    LinearScheme,
    PerBlock,
    PerCluster,
    PerTensor,
    PerToken,
    Scheme,
    TensorScheme,
    scheme_named,
)

KEPT_BY_OVERRIDE = "float by override"
KEPT_BY_SCHEME = "the scheme quantizes nothing"


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized, linear by linear.

    Attributes:
        scheme: the preset, with the finer controls applied; the rule for linears that no override
            names.
        linears: what is done to each linear (or embedding, or head) that is quantized, by module
            name, in topological order.
        observer: what turns activations into limits; see :mod:`calib.observers`.
        weights: what rounds weights; see :mod:`calib.weights`.
        cache: how the KV cache is quantized, if it is.
        kept: linears of the decoder that an override or the scheme leaves in float, with that
            reason.
    """

    scheme: Scheme
    linears: Mapping[str, LinearScheme]
    observer: str = "min_max"
    weights: str = "rtn"
    cache: TensorScheme | None = None
    kept: Mapping[str, str] = field(default_factory=dict)


def customised(
    scheme: Scheme,
    *,
    block_size: int | None = None,
    weight_symmetric: bool | None = None,
    activation_symmetric: bool | None = None,
    activation_granularity: str | None = None,
) -> Scheme:
    """``scheme`` with finer controls; ``None`` leaves what it says.

    Args:
        scheme: a preset.
        block_size: input features that share a weight scale.
        weight_symmetric: ``False``: weights get zero points.
        activation_symmetric: ``False``: activations get zero points.
        activation_granularity: ``tensor`` (static), ``token`` (dynamic) or ``cluster:k`` (static).

    Raises:
        QuantizationError: a control that this scheme does not have.
    """
    controls = (block_size, weight_symmetric, activation_symmetric, activation_granularity)
    weight = scheme.weight
    if weight is None:
        if any(control is not None for control in controls):
            raise QuantizationError(
                f"'{scheme.name}' quantizes nothing, so there is nothing to control",
                hint=(
                    "choose a scheme that quantizes, such as int8; overrides take no finer controls"
                ),
            )
        return scheme

    if block_size is not None:
        if block_size < 1:
            raise QuantizationError(
                f"a block of {block_size} input features", hint="use 1 or more, such as 32 or 128"
            )
        if weight.scale_format != "compute":
            raise QuantizationError(
                f"the format of '{scheme.name}' fixes its blocks",
                hint="leave --block-size out",
            )
        weight = replace(weight, granularity=PerBlock(block_size))
    if weight_symmetric is not None:
        weight = replace(weight, symmetric=weight_symmetric)
    activation = _customised_activation(scheme, activation_symmetric, activation_granularity)
    return replace(scheme, weight=weight, activation=activation)


def _customised_activation(
    scheme: Scheme, symmetric: bool | None, granularity: str | None
) -> TensorScheme | None:
    activation = scheme.activation
    if activation is None:
        if symmetric is not None or granularity is not None:
            raise QuantizationError(
                f"'{scheme.name}' leaves activations in float",
                hint="choose a scheme that quantizes them, such as int8",
            )
        return None

    if granularity is not None:
        if activation.scale_format != "compute":
            raise QuantizationError(
                f"the format of '{scheme.name}' fixes the blocks of activations",
                hint="choose int8 or w4a4 instead",
            )
        group = _activation_granularity(granularity)
        activation = replace(activation, granularity=group, dynamic=isinstance(group, PerToken))

    return activation if symmetric is None else replace(activation, symmetric=symmetric)


@dataclass(frozen=True)
class Choice:
    """What a scheme and its overrides make of linears, by name.

    Attributes:
        linears: what is done to each; ``None``: it stays in float.
        overridden: those that an override names.
        unmatched: overrides that match nothing.
    """

    linears: dict[str, LinearScheme | None]
    overridden: set[str]
    unmatched: list[str]


def choose(
    scheme: Scheme,
    overrides: Mapping[str, str],
    decoder: Mapping[str, str],
    outside: Sequence[str],
) -> Choice:
    """Apply the patterns of overrides, as :func:`resolve` describes them.

    Args:
        scheme: the rule for the decoder's linears.
        overrides: scheme names by pattern.
        decoder: the decoder's linears, each with another name that patterns may match.
        outside: names of embeddings and of the output head.

    Raises:
        QuantizationError: an unknown scheme.
    """
    chosen: dict[str, LinearScheme | None] = dict.fromkeys(decoder, scheme.linear)
    overridden: set[str] = set()
    unmatched = []
    for pattern, name in overrides.items():
        matched = (
            [pattern]
            if pattern in outside
            else [
                linear
                for linear, other in decoder.items()
                if fnmatchcase(linear, pattern) or fnmatchcase(other, pattern)
            ]
        )
        if not matched:
            unmatched.append(pattern)
        chosen.update(dict.fromkeys(matched, scheme_named(name).linear))
        overridden.update(matched)
    return Choice(chosen, overridden, unmatched)


def resolve(
    scheme: Scheme,
    wiring: Wiring,
    *,
    overrides: Mapping[str, str] | None = None,
    observer: str = "min_max",
    weights: str = "rtn",
    kv: str | None = None,
) -> Quantization:
    """What is done to every linear of one model.

    A pattern (``fnmatch``: ``*``, ``?``, ``[…]``) is matched against the names of the decoder's
    linears; of several that match the last one counts. The output head and embeddings are quantized
    only where a pattern *is* their name. An expert of a 3-D parameter is called
    ``{parameter}.{e}``; a pattern that matches the parameter matches them all.

    Args:
        scheme: the rule.
        wiring: that of the model.
        overrides: scheme names by pattern.
        observer: what turns activations into limits.
        weights: what rounds weights.
        kv: how the KV cache is quantized; a key of :data:`calib.schemes.KV_SCHEMES`.

    Raises:
        QuantizationError: a pattern that matches nothing, an unknown scheme, an embedding with a
            scheme that quantizes its input, or some experts of a 3-D parameter left in float and
            others not.
    """
    if kv is not None and kv not in KV_SCHEMES:
        raise QuantizationError(
            f"unknown KV cache format '{kv}'", hint=f"use one of: {', '.join(KV_SCHEMES)}"
        )

    specs = wiring.quantizable
    decoder = list(specs)
    embeddings = [table.name for table in wiring.embeddings]
    outside = [*embeddings, wiring.head.name]

    names = {linear: spec.name for linear, spec in specs.items()}
    choice = choose(scheme, overrides or {}, names, outside)
    if choice.unmatched:
        raise nothing_matches(choice.unmatched[0], decoder, outside)
    chosen = choice.linears
    _check_experts(chosen, specs)
    _check_embeddings(chosen, embeddings)

    order = [*embeddings, *decoder, wiring.head.name]
    linears = {name: linear for name in order if (linear := chosen.get(name)) is not None}
    return Quantization(
        scheme=scheme,
        linears=linears,
        observer=observer,
        weights=weights,
        cache=None if kv is None else KV_SCHEMES[kv],
        kept={
            spec.name: KEPT_BY_OVERRIDE if name in choice.overridden else KEPT_BY_SCHEME
            for name, spec in specs.items()
            if chosen[name] is None
        },
    )


def _check_embeddings(chosen: Mapping[str, LinearScheme | None], embeddings: Sequence[str]) -> None:
    for table in embeddings:
        linear = chosen.get(table)
        if linear is not None and linear.input is not None:
            raise QuantizationError(
                f"the embedding '{table}' has no input to quantize",
                hint="give it a weight-only scheme",
            )


def _check_experts(
    chosen: Mapping[str, LinearScheme | None], specs: Mapping[str, LinearSpec]
) -> None:
    """A 3-D parameter is either in the artifact's float tensors or not."""
    quantized: dict[str, set[bool]] = {}
    for name, spec in specs.items():
        quantized.setdefault(spec.name, set()).add(chosen[name] is not None)
    mixed = next((parameter for parameter, found in quantized.items() if len(found) > 1), None)
    if mixed is not None:
        raise QuantizationError(
            f"overrides leave some experts of '{mixed}' in float and quantize others",
            hint=f"name all of them, as in --override '{mixed}=float'",
        )


def _activation_granularity(text: str) -> Granularity:
    kind, _, count = text.partition(":")
    if kind == "cluster" and count.isdecimal() and int(count) > 0:
        return PerCluster(int(count))
    if text == "tensor":
        return PerTensor()
    if text == "token":
        return PerToken()
    raise QuantizationError(
        f"unknown granularity '{text}' of activations", hint="use tensor, token or cluster:K"
    )


def nothing_matches(
    pattern: str, decoder: Sequence[str], outside: Sequence[str]
) -> QuantizationError:
    """The error of an override without effect.

    Args:
        pattern: of the override.
        decoder: names of the decoder's linears.
        outside: names of embeddings and of the output head.
    """
    return QuantizationError(
        f"the override '{pattern}' matches no linear of this model",
        hint=(
            f"linears are called like {decoder[0]} and {decoder[-1]}; by their full name also"
            f" {', '.join(outside)}"
        ),
    )
