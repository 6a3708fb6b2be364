"""Filling a Tripy module, from a bundle or straight from a Hugging Face model.

Everything is compared before the first parameter is set: a module that does not fit stays as it
was. nvtripy is imported when a module is filled, which can only be where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.base import RuntimeMissing
from backends.safetensors.differences import differences, grouped
from backends.safetensors.prefix import network_prefix, prefix_tensors
from backends.safetensors.read import Form, open_bundle
from backends.safetensors.tripy.dtypes import tripy_name
from calib.errors import BackendError

if TYPE_CHECKING:
    import nvtripy as tp

_HINT = (
    "backends.safetensors.tripy.modules.build.module_for_bundle(folder) builds the module that a"
    " bundle fills; or export the model that you have"
)


def load_bundle(model: tp.Module, folder: Path | str) -> Any:
    """Fill a Tripy module with the weights and scales of a bundle.

    Args:
        model: a ``tp.Module`` with the bundle's keys: one of
            :mod:`backends.safetensors.tripy.modules`, or one like that of NVIDIA's nanoGPT example.
        folder: what ``rotq export --backend safetensors --target tripy`` wrote.

    Returns:
        ``model``, which is left as it was if anything fails.

    Raises:
        BackendError: the bundle is damaged, written for another target or by a newer version; or it
            does not fit the module, with everything that does not fit; or it has a prefix, and the
            module no place for one.
    """
    bundle = open_bundle(Path(folder), target="tripy", verify=True)
    what = f"the bundle '{bundle.folder}' of a '{bundle.manifest.model_type}' model"
    prefix = network_prefix(bundle)
    before = prefix_tensors(bundle, prefix)
    _nvtripy_of(model)

    # without it, what the bundle was calibrated for is another model
    if prefix is not None and not before.keys() & model.state_dict().keys():
        raise BackendError(
            f"{what} has a prefix of {prefix.length} tokens, and the {type(model).__name__} module"
            " has no place for one",
            hint=f"{_HINT}, with --prefix none",
        )

    return fill(model, {**bundle.tensors, **before}, bundle.manifest.linears, what)


def fill(
    model: tp.Module,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Mapping[str, Any]],
    what: str,
) -> Any:
    """Fill a Tripy module through ``load_state_dict(strict=True)``.

    Tensors that a module made itself (the causal mask of NVIDIA's example) are left alone.

    Args:
        model: the ``tp.Module``.
        tensors: what to fill it with, by key.
        described: :meth:`~calib.artifact.QuantizedLinear.description` of every quantized linear, by
            its key.
        what: the source of the tensors, as the error calls it.

    Returns:
        ``model``.

    Raises:
        BackendError: as for :func:`load_bundle`.
    """
    tp = _nvtripy_of(model)
    state = model.state_dict()
    owners = _modules(model)

    # what the module made itself stays; all the rest must be given, and nothing else may be
    own = _made_by_the_module(state, owners, tensors)
    forms = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    expected = _expected({key: value for key, value in state.items() if key not in own}, forms)
    # shapes alone need not show how a linear is quantized
    problems = [differences(forms, expected), *_other_quantization(owners, described)]

    if any(problems):
        raise BackendError(
            f"{what} does not fit the {type(model).__name__} module:"
            f" {'; '.join(filter(None, problems))}",
            hint=_HINT,
        )

    loaded = {key: tp.Tensor(tensor.detach().cpu().contiguous()) for key, tensor in tensors.items()}
    model.load_state_dict({**{key: state[key] for key in own}, **loaded}, strict=True)

    return model


def quantized_modules(model: tp.Module) -> dict[str, str]:
    """Tripy's name of the quantized dtype of every linear of ``model`` that has one, by name.

    Raises:
        BackendError: ``model`` is no Tripy module.
    """
    _nvtripy_of(model)
    dtypes = {
        name: getattr(module, "quant_dtype", None) for name, module in _modules(model).items()
    }
    return {name: dtype.name for name, dtype in dtypes.items() if dtype is not None}


def _nvtripy_of(model: tp.Module) -> Any:
    """``nvtripy``, which ``model`` is a module of."""
    try:
        import nvtripy as tp  # here, because the package is optional
    except ImportError as error:
        raise RuntimeMissing(
            f"nvtripy cannot be imported: {error}", hint="install it as its documentation says"
        ) from error
    if not isinstance(model, tp.Module):
        raise BackendError(
            f"only a tp.Module can be filled, and this is a '{type(model).__name__}'", hint=_HINT
        )
    return tp


def _modules(model: tp.Module, prefix: str = "") -> dict[str, Any]:
    """``model`` and every module in it, by dotted name."""
    by_name = {prefix: model}
    for name, child in model.named_children():
        by_name |= _modules(child, f"{prefix}.{name}" if prefix else name)
    return by_name


def _made_by_the_module(
    state: Mapping[str, Any], owners: Mapping[str, Any], filled: Mapping[str, Any]
) -> set[str]:
    """Keys of tensors that a module set itself and that nobody is to load: they belong to no layer
    of Tripy's own.

    A parameter of a layer stays one when it has been filled: a second bundle that lacks it does not
    fit.
    """
    import nvtripy as tp  # here, because the package is optional

    from backends.safetensors.tripy.modules.layers import Prefix, RMSNorm
    from backends.safetensors.tripy.modules.linear import BlockLinear, Hadamard

    layers = (tp.Linear, tp.Embedding, tp.LayerNorm, BlockLinear, Hadamard, Prefix, RMSNorm)
    return {
        key
        for key, value in state.items()
        if key not in filled
        and isinstance(value, tp.Tensor)
        and not isinstance(_owner(key, owners), layers)
    }


def _owner(key: str, owners: Mapping[str, Any]) -> Any:
    """The innermost module that the parameter ``key`` belongs to; parameters in lists have another
    number behind.
    """
    while key not in owners:
        key = key.rpartition(".")[0]
    return owners[key]


def _expected(state: Mapping[str, Any], forms: Mapping[str, Form]) -> dict[str, Form]:
    """Dtype and shape of what the module takes. Optional parameters count where they are given."""
    from nvtripy.frontend.module.parameter import OptionalParameter

    expected: dict[str, Form] = {}
    for key, value in state.items():
        if isinstance(value, OptionalParameter) and key not in forms:
            continue
        # Tripy leaves scales per tensor without a shape, and refuses any but [] only when it
        # traces.
        shape = () if value.shape is None else value.shape
        name = "float8_e4m3fn" if value.dtype.name == "float8" else value.dtype.name
        expected[key] = (getattr(torch, name), tuple(int(size) for size in shape))
    return expected


def _other_quantization(
    owners: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Linears that the module quantizes in another way than they were calibrated for, which shapes
    need not show.
    """
    import nvtripy as tp  # here, because the package is optional

    expected = {name: tripy_name(entry["weight"]["format"]) for name, entry in described.items()}
    wrong: dict[str, list[str]] = {}
    for name, module in owners.items():
        if not hasattr(module, "quant_dtype"):
            continue
        has = None if module.quant_dtype is None else module.quant_dtype.name
        if has == "int4" and isinstance(module, tp.Linear):
            wrong.setdefault(
                "tp.Linear with int4 blocks its output features, use BlockLinear", []
            ).append(name)
        elif has != expected.get(name):
            text = f"quantized as {has or 'float'} instead of {expected.get(name, 'float')}"
            wrong.setdefault(text, []).append(name)
    return [f"{what}: {', '.join(grouped(names))}" for what, names in sorted(wrong.items())]
