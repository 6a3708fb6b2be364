"""One pass over the calibration data for everything that has to be seen: limits of inputs, second
moments, the cache.

The observers are nested forward loops: each attaches what it looks with, lets the next one run, and
takes it off again. ModelOpt comes first, because it runs a copy of the module tree. Tokens of
experts are counted last, so that an expert that none reached is reported as such before an observer
misses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from calib.schemes import TensorScheme

Run = Callable[[nn.Module], None]
"""Runs the module it is given over all calibration data."""
Limits = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What to look at."""

    inputs: Mapping[str, TensorScheme]
    """Inputs with something to calibrate, by module name."""
    observer: str
    """What turns them into limits; ``min_max`` of symmetric ones is ModelOpt's."""
    moments: Sequence[str] = ()
    """Modules whose input's second moment is needed."""
    caches: Mapping[int, str] = field(default_factory=dict)
    """Attention modules by layer, where keys and values are quantized."""

    def __bool__(self) -> bool:
        return bool(self.inputs or self.moments or self.caches)


@dataclass
class Observed:
    """What was seen."""

    limits: dict[str, Limits] = field(default_factory=dict)
    """Least and greatest value of each input ``[]``; per cluster, those of each channel's cluster
    ``[in]``.
    """
    moments: dict[str, Tensor] = field(default_factory=dict)
    """``E[x^T x]`` ``[in, in]`` of each input."""
    caches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Largest magnitude ``[]`` of keys and of values."""
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tokens that each expert saw, by the module that holds the experts, where any of them were to
    be looked at.
    """


def observe(module: nn.Module, wanted: Wanted, run: Run) -> Observed:
    """Run ``module`` once over the calibration data and look at all that is ``wanted``.

    Raises:
        QuantizationError: an input that was never reached, or one that holds NaN or Inf.
    """
    found = Observed()
    if not wanted:
        return found
    from calib.network.observe_experts import experts_as_modules

    with experts_as_modules(module, {*wanted.inputs, *wanted.moments}) as experts:
        _observe(
            module, wanted, _with_tokens(run, wanted, tuple(experts), found), tuple(experts), found
        )
    return found


def _observe(
    module: nn.Module, wanted: Wanted, run: Run, experts: tuple[str, ...], found: Observed
) -> None:
    """The nested observers around ``run``; ``experts`` are the modules whose linears ModelOpt is
    not to observe.
    """
    from calib.modelopt.config import modelopt_calibrates

    plain = wanted.observer == "min_max"
    inside = tuple(f"{path}." for path in experts)
    by_modelopt = {
        name: what
        for name, what in wanted.inputs.items()
        if plain and modelopt_calibrates(what) and not name.startswith(inside)
    }
    rest = {name: what for name, what in wanted.inputs.items() if name not in by_modelopt}
    inner = _with_caches(
        _with_moments(_with_observers(run, rest, wanted.observer, found), wanted, found),
        wanted,
        found,
    )
    if not by_modelopt:
        inner(module)
        return
    from calib.modelopt.quantize import input_amax  # modelopt takes seconds to import

    amax = input_amax(module, by_modelopt, inner)
    found.limits.update({name: (-value, value) for name, value in amax.items()})


def _with_tokens(run: Run, wanted: Wanted, experts: tuple[str, ...], found: Observed) -> Run:
    if not experts:
        return run
    from calib.network.observe_experts import check_reached, count_tokens

    def counting(module: nn.Module) -> None:
        found.tokens.update(count_tokens(module, experts, run))
        check_reached({*wanted.inputs, *wanted.moments}, found.tokens)

    return counting


def _with_observers(
    run: Run, inputs: Mapping[str, TensorScheme], observer: str, found: Observed
) -> Run:
    if not inputs:
        return run
    from calib.observers import input_limits

    def observing(module: nn.Module) -> None:
        found.limits.update(input_limits(module, inputs, observer, run))

    return observing


def _with_moments(run: Run, wanted: Wanted, found: Observed) -> Run:
    if not wanted.moments:
        return run
    from calib.weights.moments import observe_moments

    def observing(module: nn.Module) -> None:
        moments = observe_moments(module, wanted.moments, run)
        # shared by what reads one tensor
        matrices = {id(moment): moment.result() for moment in moments.values()}
        found.moments.update({name: matrices[id(moment)] for name, moment in moments.items()})

    return observing


def _with_caches(run: Run, wanted: Wanted, found: Observed) -> Run:
    if not wanted.caches:
        return run
    from calib.network.kv_cache import observe_caches

    def observing(module: nn.Module) -> None:
        found.caches.update(observe_caches(module, wanted.caches, run))

    return observing
