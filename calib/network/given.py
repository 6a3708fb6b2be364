"""A model object that somebody gives, taken out of its wrappers and held against the model that its
config describes.

rotq builds models from configs and tensors. What an object has beside these (another activation,
rotary frequencies that were rounded, quantizers, hooks, a ``forward`` of its own) would be lost
without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import UnsupportedModelError
from calib.network.skeleton import build_on_meta, fill_buffers

_TOLERANCE = 1e-6
"""Of buffers that another device has computed, relative."""
_PASSING = (
    "training",
    "gradient_checkpointing",
    "max_seq_len_cached",
    "original_max_seq_len",
    "name_or_path",
    "loss_type",
    # the tensors themselves have the sizes, and are held against the config elsewhere
    "vocab_size",
    "num_embeddings",
    "out_features",
    # gradients and training alone
    "padding_idx",
    "layerdrop",
    "jitter_noise",
)
"""Attributes of modules that change with use, or that no logits depend on. Those of dropout pass
as well.
"""
_CURES = {
    "peft": "merge first: model = model.merge_and_unload()",
    "modelopt": "give the float model here; rotq.export and rotq.calibrate take it as it is",
    "calib.fake_quant": "give the float model; rotq quantizes it by itself",
}
"""What to do about modules, by the package that their class is from."""
_RELOAD = "give the model as from_pretrained loads it, with the config that it was made from"
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
"""Where a module keeps what it calls around its ``forward``, and what that is."""
_LIBRARY = "transformers."
"""Package whose hooks only watch: they record outputs, and ask for gradients."""


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, also
    where single modules of it are compiled. Parameters are shared; ``model`` is left as it is.
    """
    model = _inner(model)
    if not isinstance(model, nn.Module):
        return model
    if any(_inner(module) is not module for module in model.modules()):
        return _rebuilt(model)
    return model


def check_given(model: nn.Module) -> None:
    """Refuse a model object that is not what its config describes.

    Args:
        model: a Hugging Face causal LM, out of its wrappers.

    Raises:
        UnsupportedModelError: it names the first module that differs, and how.
    """
    given: Any = model
    expected = build_on_meta(given.config, given.dtype)
    fill_buffers(expected)
    difference = next(_differences(model, expected), None)
    if difference is None:
        return
    found, module = difference
    package = type(module).__module__
    cures = [cure for prefix, cure in _CURES.items() if package.startswith(prefix)]
    if "_hf_hook" in vars(module):
        cures.append("load it without device_map: accelerate has replaced its forward")
    raise UnsupportedModelError(
        f"the model given is not the one that its config describes: {found}",
        hint=next(iter(cures), _RELOAD),
    )


def _differences(model: nn.Module, expected: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What differs, in words, and the module where it does."""
    theirs, ours = dict(model.named_modules()), dict(expected.named_modules())
    for name, module in theirs.items():
        called = name or "it"
        if name not in ours:
            yield f"it has a module {name} ({_class(module)}) beside", module
            return
        if type(module) is not type(ours[name]):
            yield f"{called} is {_class(module)}, expected {_class(ours[name])}", module
            return
        yield from _behaviour(called, module, ours[name])
        if name:
            yield from _settings(name, module, ours[name])
        yield from _buffers(name, module, ours[name])
    for name in ours.keys() - theirs.keys():
        yield f"it has no module {name}", model


def _behaviour(
    called: str, module: nn.Module, expected: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """What runs with the module, or in place of its methods, and is in no class."""
    for key, what in _HOOKS.items():
        for hook in getattr(module, key).values():
            if not str(getattr(hook, "__module__", "")).startswith(_LIBRARY):
                yield (
                    f"{called} has {what} ({_function(hook)}), which rotq cannot take along",
                    module,
                )
    own = vars(expected)
    for key, value in vars(module).items():
        if key not in own and callable(value) and callable(getattr(type(module), key, None)):
            yield f"{called}.{key} was replaced ({_function(value)})", module


def _settings(name: str, module: nn.Module, expected: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Numbers and words that the module computes with."""
    if isinstance(expected, nn.Dropout):
        return
    for key, ours in vars(expected).items():
        if key.startswith("_") or key in _PASSING or "dropout" in key:
            continue
        if not isinstance(ours, int | float | str):
            continue
        theirs = getattr(module, key, None)
        if theirs != ours:
            yield f"{name}.{key} is {theirs!r:.60}, expected {ours!r:.60}", module


def _buffers(name: str, module: nn.Module, expected: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Tensors that follow from the config and are in no checkpoint: rotary frequencies, scales."""
    for key in sorted(expected._non_persistent_buffers_set):
        ours, theirs = expected._buffers[key], module._buffers.get(key)
        if ours is None or _moves(key, expected):
            continue
        where = f"{name}.{key}"
        if theirs is None:
            yield f"{where} is missing", module
        elif theirs.dtype != ours.dtype:
            # .half() and .to(bfloat16) convert buffers, from_pretrained(dtype=...) does not
            yield (
                f"{where} is {theirs.dtype}, rounded by .to() or .half(), expected {ours.dtype}",
                module,
            )
        elif not _same(theirs, ours):
            yield f"{where} has other values than the config says", module


def _moves(key: str, module: nn.Module) -> bool:
    """Whether a forward pass changes the buffer: frequencies that depend on the length."""
    kinds = str(getattr(module, "rope_type", ""))
    moving = "dynamic" in kinds or "longrope" in kinds
    return moving and key.endswith("inv_freq") and not key.endswith("original_inv_freq")


def _same(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.shape != ours.shape:
        return False
    return torch.allclose(theirs.detach().cpu(), ours, rtol=_TOLERANCE, atol=0.0)


def _function(function: object) -> str:
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _inner(module: Any) -> Any:
    """What is in the wrappers around ``module`` itself."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule":  # of torch.compile
            module = module._orig_mod
        else:
            return module


def _rebuilt(module: nn.Module) -> nn.Module:
    """A copy of the tree without wrappers, which shares all tensors."""
    own: nn.Module = copy.copy(_inner(module))
    own._modules = {
        name: None if child is None else _rebuilt(child) for name, child in own._modules.items()
    }
    return own
