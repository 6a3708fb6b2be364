"""Observing the inputs of linears while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from calib.errors import QuantizationError
from calib.modules.watch import Run, watching
from calib.observers.observer import Observer
from calib.observers.registry import observer_named
from calib.observers.statistics import Limits
from calib.schemes import TensorScheme


def observe_inputs(
    model: nn.Module,
    modules: Sequence[str],
    factory: Callable[[str], Observer],
    run: Run,
) -> dict[str, Observer]:
    """Show the input of each of ``modules`` to an observer of its own while ``run`` runs the model.

    Every position of an input is observed, so batches must hold no padding; those of
    :func:`calib.data.batches.length_batches` hold none.

    Args:
        model: a model, or a single block of one.
        modules: dotted names of linears in ``model``.
        factory: makes the observer of the module of a name.
        run: feeds batches to the model; a :class:`calib.data.forward_loop.ForwardLoop`, say.

    Returns:
        The observers by module name, in the order of ``modules``.

    Raises:
        QuantizationError: an input holds NaN or Inf, or a module was never reached; both are named.
        CheckpointError: one of ``modules`` does not exist.
    """
    observers = {name: factory(name) for name in modules}
    with watching(model, inputs={name: each.observe for name, each in observers.items()}):
        run(model)
    return observers


def input_limits(
    model: nn.Module,
    inputs: Mapping[str, TensorScheme],
    observer: str,
    run: Run,
) -> dict[str, Limits]:
    """What the inputs of linears range over, in the eyes of one observer.

    Args:
        model: a model, or a single block of one.
        inputs: how each input is quantized, by module name.
        observer: a name that :func:`calib.observers.observer_named` takes.
        run: feeds batches without padding to the model.

    Returns:
        Least and greatest value of each input by name, float64: ``[]``, or with clusters those of
        each channel's cluster ``[in]``.

    Raises:
        QuantizationError: an unknown observer or one that cannot serve a scheme, NaN or Inf, or an
            unreached module.
        CheckpointError: a module does not exist.
    """
    make = observer_named(observer)
    observers = observe_inputs(model, list(inputs), lambda name: make(inputs[name]), run)
    return {name: found.limits() for name, found in observers.items()}


def observe_named(observer: Observer, name: str, x: Tensor) -> None:
    """Observe ``x``, and name where it came from if it cannot be.

    Raises:
        QuantizationError: ``x`` holds NaN or Inf.
    """
    try:
        observer.observe(x)
    except QuantizationError as error:
        raise QuantizationError(f"'{name}': {error.message}", hint=error.hint) from error
