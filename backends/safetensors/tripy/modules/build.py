"""Building the Tripy module that a bundle fills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.asking import check
from backends.base import Request
from backends.registry import get_backend
from backends.safetensors.manifest import dtype_name
from backends.safetensors.read import open_bundle, read_prefix
from backends.safetensors.tripy.dtypes import NamedDtype, float_dtype
from backends.safetensors.tripy.models import LLAMA, family_of, refusal_of
from backends.safetensors.tripy.modules.gpt import GPT
from backends.safetensors.tripy.modules.llama import Llama
from backends.safetensors.tripy.modules.plan import ModulePlan, plan_of_bundle, plan_of_config
from calib.errors import BackendError
from calib.schemes import scheme_named


def module_for_bundle(folder: Path | str) -> Any:
    """The module that the bundle in ``folder`` fills, its parameters, a prefix among them, not set
    yet.

    Raises:
        BackendError: the folder holds no sound Tripy bundle, or there is no module for its model.
    """
    bundle = open_bundle(Path(folder), target="tripy")
    prefix = read_prefix(bundle)
    return _built(plan_of_bundle(bundle.manifest, 0 if prefix is None else prefix.length))


def module_for_config(
    config: Mapping[str, Any], dtype: NamedDtype, quant_mode: str, *, prefix: int = 0
) -> Any:
    """A module of the model of ``config``, its parameters not set yet.

    Args:
        config: a Hugging Face config as a dictionary, with ``model_type``.
        dtype: Tripy's dtype of weights and scales, such as ``tp.float16``.
        quant_mode: a scheme that Tripy can express, such as ``int8-weight-only``; ``float`` for
            none.
        prefix: how many tokens of a bundle's prefix it shall have a place for.

    Raises:
        BackendError: there is no module for this model, no such linear, or ``dtype`` is not one of
            weights.
        QuantizationError: no scheme has this name.
    """
    scheme = scheme_named(quant_mode).linear
    if scheme is not None:
        request = Request("tripy", linears={quant_mode: scheme})
        check(get_backend("safetensors"), request, called=quant_mode)
    return _built(plan_of_config(config, dtype_name(float_dtype(dtype)), scheme, prefix))


def _built(plan: ModulePlan) -> Any:
    refusal = refusal_of(plan.config)
    if refusal is not None:
        raise BackendError(refusal.reason, hint=refusal.hint)
    return (Llama if family_of(plan.config.model_type) is LLAMA else GPT)(plan)
