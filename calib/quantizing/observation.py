"""One pass over the calibration data for everything that has to be seen: limits of inputs, second
moments, the cache.

The observers are nested forward loops: each attaches what it looks with, lets the next one run, and
takes it off again. ModelOpt comes first, because it runs a copy of the module tree. Tokens of
experts are counted last, so that an expert that none reached is reported as such before an observer
misses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from calib.modules.watch import Run
from calib.schemes import TensorScheme

if TYPE_CHECKING:
    from calib.network.experts import Experts

Limits = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Watchlist:
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

    amax: dict[str, Tensor] = field(default_factory=dict)
    """Largest magnitude ``[]`` of each input that ModelOpt observed."""
    limits: dict[str, Limits] = field(default_factory=dict)
    """Least and greatest value of each other input ``[]``; per cluster, those of each channel's
    cluster ``[in]``.
    """
    moments: dict[str, Tensor] = field(default_factory=dict)
    """``E[x^T x]`` ``[in, in]`` of each input."""
    caches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Largest magnitude ``[]`` of keys and of values."""
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tokens that each expert saw, by the module that holds the experts, where any of them were to
    be looked at.
    """


def observe(module: nn.Module, watchlist: Watchlist, run: Run) -> Observed:
    """Run ``module`` once over the calibration data and look at all that is on ``watchlist``.

    Raises:
        QuantizationError: an input that was never reached, or one that holds NaN or Inf.
    """
    observed = Observed()
    if not watchlist:
        return observed
    from calib.network.observe_experts import experts_as_modules

    with experts_as_modules(module, {*watchlist.inputs, *watchlist.moments}) as experts:
        counted = _with_tokens(run, watchlist, experts, observed)
        _observe(module, watchlist, counted, experts, observed)
    return observed


def _observe(
    module: nn.Module,
    watchlist: Watchlist,
    run: Run,
    experts: Mapping[str, Experts],
    observed: Observed,
) -> None:
    """The nested observers around ``run``; ModelOpt is not to observe linears in ``experts``."""
    from calib.modelopt.config import modelopt_calibrates

    inside = tuple(f"{path}." for path in experts)
    by_modelopt = {
        name: scheme
        for name, scheme in watchlist.inputs.items()
        if watchlist.observer == "min_max"
        and modelopt_calibrates(scheme)
        and not name.startswith(inside)
    }
    rest = {name: scheme for name, scheme in watchlist.inputs.items() if name not in by_modelopt}

    inner = _with_observers(run, rest, watchlist.observer, observed)
    inner = _with_moments(inner, watchlist, observed)
    inner = _with_caches(inner, watchlist, observed)
    if not by_modelopt:
        inner(module)
        return
    from calib.modelopt.quantize import input_amax  # modelopt takes seconds to import

    observed.amax.update(input_amax(module, by_modelopt, inner))


def _with_tokens(
    run: Run, watchlist: Watchlist, experts: Mapping[str, Experts], observed: Observed
) -> Run:
    if not experts:
        return run
    from calib.network.observe_experts import check_reached, count_tokens

    def counting(module: nn.Module) -> None:
        observed.tokens.update(count_tokens(module, experts, run))
        check_reached({*watchlist.inputs, *watchlist.moments}, observed.tokens)

    return counting


def _with_observers(
    run: Run, inputs: Mapping[str, TensorScheme], observer: str, observed: Observed
) -> Run:
    if not inputs:
        return run
    from calib.observers import input_limits

    def observing(module: nn.Module) -> None:
        observed.limits.update(input_limits(module, inputs, observer, run))

    return observing


def _with_moments(run: Run, watchlist: Watchlist, observed: Observed) -> Run:
    if not watchlist.moments:
        return run
    from calib.weights.moments import observe_moments

    def observing(module: nn.Module) -> None:
        moments = observe_moments(module, watchlist.moments, run)
        # shared by what reads one tensor
        matrices = {id(moment): moment.result() for moment in moments.values()}
        observed.moments.update({name: matrices[id(moment)] for name, moment in moments.items()})

    return observing


def _with_caches(run: Run, watchlist: Watchlist, observed: Observed) -> Run:
    if not watchlist.caches:
        return run
    from calib.network.kv_cache import observe_caches

    def observing(module: nn.Module) -> None:
        observed.caches.update(observe_caches(module, watchlist.caches, run))

    return observing
