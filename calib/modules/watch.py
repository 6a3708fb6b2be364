"""Watching what passes through the modules of a network while a loop runs: the one place where rotq
hooks into a forward pass.

    with watching(model, inputs={"model.layers.0.mlp.up_proj": observer.observe}):
        run(model)

Whoever counts something gives a function for each module. It is called with the module's own
tensors, which are not copied, and nothing is kept here: memory does not grow with the number of
tokens. Hooks are taken off however the loop ends. A loop that ends well must have shown each
function at least one token; modules that were never reached are refused by name, and so is NaN or
Inf. The network may be a whole model or a single block of one: names are paths in what is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import NotFiniteError, QuantizationError, UnsupportedModelError
from calib.modules.cached_attention import intercepted
from calib.modules.paths import get_submodule

Run = Callable[[nn.Module], None]
"""Runs the module it is given over all calibration data."""
InputLook = Callable[[Tensor], Tensor | None]
"""Gets the input of a module; a tensor that it returns takes the input's place."""
OutputLook = Callable[[Tensor, Tensor], None]
"""Gets the input of a module, as its pre-hooks have left it, and its output."""
CallLook = Callable[..., None]
"""Gets the arguments of a module."""
CacheLook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""Gets the keys and values ``[B, kv_heads, T, head_dim]`` that attention takes from the cache; a
pair that it returns takes their place.
"""


class Watch:
    """What a running :func:`watching` has seen.

    Attributes:
        expected: names of all that is watched.
        reached: names of what has been shown a token.
        last: name of what was entered last.
    """

    def __init__(self, expected: Collection[str]) -> None:
        self.expected = tuple(expected)
        self.reached: set[str] = set()
        self.last: str | None = None

    def require_reached(self) -> None:
        """Refuse what has not been reached so far; a long loop may ask after its first batch.

        Raises:
            QuantizationError: naming every module.
        """
        refuse_unreached([name for name in self.expected if name not in self.reached])

    def note(self, name: str, x: Tensor) -> None:
        """Take note that ``name`` is shown ``x``."""
        self.last = name
        if x.numel():
            self.reached.add(name)


@contextmanager
def watching(
    network: nn.Module,
    *,
    inputs: Mapping[str, InputLook] | None = None,
    outputs: Mapping[str, OutputLook] | None = None,
    calls: Mapping[str, CallLook] | None = None,
    caches: Mapping[str, CacheLook] | None = None,
    optional: bool = False,
    first: bool = False,
) -> Iterator[Watch]:
    """Inside, functions look at what passes through modules of ``network``, without gradients.

    Args:
        network: a model, or a block of one.
        inputs: what looks at the input of a module, by its dotted name: of a linear, say.
        outputs: what looks at its input and output.
        calls: what looks at all its arguments: of fused experts, which are given routes, say.
        caches: what looks at keys and values, by the name of the attention module.
        optional: modules may stay unreached.
        first: look at inputs before the pre-hooks that are there already, such as R4.

    Raises:
        CheckpointError: a module does not exist.
        UnsupportedModelError: a module is called without a tensor.
        NotFiniteError: a function found NaN or Inf, which is raised again with the module's name.
        QuantizationError: a module was never reached, or was given no token; all are named.
    """
    inputs, outputs, calls, caches = inputs or {}, outputs or {}, calls or {}, caches or {}
    watch = Watch(dict.fromkeys([*inputs, *outputs, *calls, *caches]))

    with ExitStack() as attached, torch.no_grad():
        for name, look in inputs.items():
            hook = partial(_enter, watch, name, look)
            module = get_submodule(network, name)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
            attached.callback(handle.remove)
        for name, look_at_call in calls.items():
            route = partial(_call, watch, name, look_at_call)
            module = get_submodule(network, name)
            attached.callback(module.register_forward_pre_hook(route, with_kwargs=True).remove)
        for name, look_at_output in outputs.items():
            leave = partial(_leave, watch, name, look_at_output)
            module = get_submodule(network, name)
            attached.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        attached.enter_context(
            intercepted(
                {
                    get_submodule(network, name): partial(_attend, watch, name, look_at_cache)
                    for name, look_at_cache in caches.items()
                }
            )
        )
        yield watch

    if not optional:
        watch.require_reached()


def refuse_unreached(names: Collection[str]) -> None:
    """Refuse to go on if modules were never reached.

    Raises:
        QuantizationError: naming them all.
    """
    if names:
        raise QuantizationError(
            f"calibration never reached {len(names)} module(s): {', '.join(names)}",
            hint=(
                "use more calibration rows (--nsamples), or check that the model runs these modules"
                " and does not compute past them"
            ),
        )


def require_finite(kept: Mapping[str, Tensor], of: str = "the input of ") -> None:
    """Check by what was kept that all of it was finite: NaN and Inf show in sums and extremes.

    Args:
        kept: statistics, by the name of the module.
        of: what of the module was watched.

    Raises:
        NotFiniteError: naming every module whose statistics are not finite.
    """
    broken = [name for name, values in kept.items() if not bool(torch.isfinite(values).all())]
    if broken:
        raise not_finite(f"{of}{', '.join(broken)}")


def not_finite(where: str) -> NotFiniteError:
    """The error of NaN or Inf in ``where``."""
    return NotFiniteError(
        f"calibration found NaN or Inf in {where}",
        hint=(
            "check the checkpoint's weights; a model that overflows in its dtype needs --dtype"
            " bfloat16 or float32"
        ),
    )


def _enter(
    watch: Watch,
    name: str,
    look: InputLook,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    x = _first_tensor(name, args, kwargs)
    watch.note(name, x)
    with _named(f"the input of {name}"):
        instead = look(x)
    if instead is None:
        return None
    return _replaced(args, x, instead), {
        key: instead if value is x else value for key, value in kwargs.items()
    }


def _call(
    watch: Watch,
    name: str,
    look: CallLook,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    watch.note(name, _first_tensor(name, args, kwargs))
    with _named(f"the input of {name}"):
        look(*args, **kwargs)


def _leave(
    watch: Watch,
    name: str,
    look: OutputLook,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    x = _first_tensor(name, args, kwargs)
    watch.note(name, x)
    with _named(f"the input or output of {name}"):
        look(x, output)


def _attend(
    watch: Watch, name: str, look: CacheLook, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    watch.note(name, key)
    with _named(f"keys or values of {name}"):
        instead = look(key, value)
    return (key, value) if instead is None else instead


def _first_tensor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is None:
        raise UnsupportedModelError(
            f"'{name}' is called without a tensor", hint="watch a module that is given one"
        )
    return x


def _replaced(args: tuple[Any, ...], x: Tensor, instead: Tensor) -> tuple[Any, ...]:
    return tuple(instead if value is x else value for value in args)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Whoever looks knows no name; an error about NaN or Inf gets it here."""
    try:
        yield
    except NotFiniteError as error:
        raise not_finite(where) from error
