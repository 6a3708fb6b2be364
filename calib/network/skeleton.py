"""Hugging Face models built from a config without allocating any weight, and given some or all of
their weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calib.architectures import Wiring, wiring_of
from calib.errors import CheckpointError
from calib.modules.paths import set_submodule
from calib.modules.tree import template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MIXED = "the folder mixes files of two models, or was edited after it was written"


def portable_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A Hugging Face config as a dictionary that says nothing of the machine it was loaded on."""
    values: dict[str, Any] = config.to_dict()
    values.pop("_name_or_path", None)
    return values


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The causal-LM module tree of ``config`` with every parameter and buffer on the meta device.

    Args:
        config: a Hugging Face config; it is left as it is. Its own dtype and where it was loaded
            from do not matter, and the module tree says nothing of the latter.
        dtype: of the floating-point tensors.
    """
    return deepcopy(template(config, dtype))


def expected_tensors(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor in the state dict of the model of ``config``, tied ones
    included.
    """
    model = template(config, torch.float32)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def oriented_shapes(wiring: Wiring) -> dict[str, tuple[int, ...]]:
    """:func:`expected_tensors` with the weights of linears ``[out, in]``, as
    :class:`~calib.fusing.FusedModel` has them.
    """
    return {
        name: tuple(reversed(shape)) if name in wiring.turned_weights else tuple(shape)
        for name, shape in expected_tensors(wiring.config).items()
    }


@torch.no_grad()
def fill_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) their
    values, on the CPU.

    They cannot be computed on the meta device. transformers recomputes them after loading in
    ``_init_weights`` of the innermost model around a module, which leaves tensors alone that are
    marked as initialised; this does the same.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    models = {name: each for name, each in model.named_modules() if hasattr(each, "_init_weights")}
    for path, module in model.named_modules():
        names = [
            name for name in module._non_persistent_buffers_set if module._buffers[name] is not None
        ]
        for name in names:
            setattr(module, name, torch.empty_like(module._buffers[name], device="cpu"))
        if names:
            around = (name for name in models if f"{path}.".startswith(f"{name}." if name else ""))
            models[max(around, key=len)]._init_weights(module)


def accept_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Make room, on the meta device, for those biases among ``names`` that the stock model lacks.

    They belong to linears that had to take the bias of their norm (:mod:`calib.fusing`).
    """
    own = model.state_dict()
    for name in names:
        if name not in own:
            linear = model.get_submodule(name.removesuffix(".bias"))
            weight = own[f"{name.removesuffix('.bias')}.weight"]
            bias = torch.empty(weight.shape[0], dtype=weight.dtype, device="meta")
            linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def build_skeleton(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, skip: Collection[str]
) -> nn.Module:
    """The causal LM of ``config`` in eval mode, holding ``tensors``, ``Identity`` where ``skip``
    names a module.

    Args:
        config: a Hugging Face config as a dictionary, with ``model_type``.
        tensors: parameters by checkpoint key, used without a copy.
        skip: dotted names of modules that the caller puts something else in place of.

    Raises:
        CheckpointError: a parameter outside ``skip`` is missing or has another shape, or
            ``tensors`` holds one that the model has not.
    """
    model: nn.Module = build_on_meta(wiring_of(config).config)
    for name in skip:
        set_submodule(model, name, nn.Identity())
    accept_biases(model, [name for name in _head_bias(model) if name in tensors])
    fill_buffers(model)
    try:
        result = model.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:  # a tensor of another shape
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the weights do not fit the config: {reason}", hint=_MIXED
        ) from error
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"the weights do not fit the config: missing {result.missing_keys[:4]}, "
            f"unexpected {result.unexpected_keys[:4]}",
            hint=_MIXED,
        )
    return model.eval().requires_grad_(False)


def _head_bias(model: PreTrainedModel) -> list[str]:
    """What the bias of the output head is called."""
    head = model.get_output_embeddings()
    return [f"{name}.bias" for name, module in model.named_modules() if module is head]
