"""Modules that behave one way in training and another in evaluation.

Observers see what the model computes while they watch. If that is not what it computes later, their
limits belong to another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib.data.forward_loop import evaluating

_DIFFERS = 1e-5
"""Relative distance of two outputs beyond other orders of float32 sums (evaluation may take other
kernels).
"""


def check_modes(
    model: nn.Module, sample: Tensor | Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Name the modules of which ``train()`` and ``eval()`` differ.

    By rule: dropout with a probability above zero, as a module or as an attribute of the module
    that applies it; normalisations that keep running statistics; randomised ReLU. With a ``sample``
    also by running: each module is called twice on the input it has in evaluation, once with itself
    alone in training mode, and the outputs compared. Running finds what no rule knows, but no
    difference that the sample does not bring out.

    Args:
        model: stays as it is, with its running statistics and the random state of the process.
        sample: what the model is called with: one tensor, or keyword arguments. A language model
            needs ``use_cache=False`` among these.

    Returns:
        The reason by dotted name (the model itself is ``""``), in the order of ``named_modules``.
    """
    reasons = {
        name: reason
        for name, module in model.named_modules()
        if (reason := _by_rule(module)) is not None
    }
    if sample is None:
        return reasons
    found = dict.fromkeys(_by_running(model, sample), "its outputs differ on the sample") | reasons
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _by_rule(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"dropout, p = {module.p:g}" if module.p > 0 else None
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return (
            f"{type(module).__name__} with running statistics"
            if module.track_running_stats
            else None
        )
    if isinstance(module, nn.RReLU):
        return "random slopes" if module.lower != module.upper else None
    for key, value in vars(module).items():
        if "drop" in key and isinstance(value, float) and value > 0:
            return f"{key} = {value:g}"
    return None


def _by_running(model: nn.Module, sample: Tensor | Mapping[str, Any]) -> list[str]:
    """The modules whose own mode, with that of all they contain left in evaluation, changes their
    output.
    """
    calls: dict[str, tuple[Any, Any]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (_copied(args), _copied(kwargs)))

        return hook

    with evaluating(model), torch.no_grad():
        handles = [
            module.register_forward_pre_hook(watch(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        try:
            model(sample) if isinstance(sample, Tensor) else model(**sample)
        finally:
            for handle in handles:
                handle.remove()
        return [
            name
            for name, module in model.named_modules()
            if name in calls and _differs(module, *calls[name])
        ]


def _differs(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether ``module``, in evaluation mode, gives something else once its own mode is
    training.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {
        parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"
    }
    outputs = []
    try:
        with torch.random.fork_rng(devices=list(devices)):
            for training in (False, True):
                module.training = training
                torch.manual_seed(0)
                outputs.append(_tensors(module(*_copied(args), **_copied(kwargs))))
    finally:  # the module may refuse to run in training mode
        module.training = False
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    evaluated, trained = outputs
    return len(evaluated) != len(trained) or any(
        _distant(a, b) for a, b in zip(evaluated, trained, strict=True)
    )


def _distant(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    return bool((a.double() - b.double()).norm() > _DIFFERS * a.double().norm())


def _copied(value: Any) -> Any:
    """``value`` with its tensors cloned, so that an in-place operation cannot change what was
    seen.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, tuple | list)
        else ()
    )
    return [tensor for item in items for tensor in _tensors(item)]
