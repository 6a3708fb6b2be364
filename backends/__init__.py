"""Writers and loaders of what deployment runtimes read.

The loaders of Tripy modules are here directly; each imports what it needs on first use, so that
``import backends`` stays light.

Public for those who write a backend are :mod:`backends.base`, :mod:`backends.rules`,
:mod:`backends.testing` and :mod:`backends.torch_model`; for those who use one,
:mod:`backends.registry` and :mod:`backends.asking`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.safetensors.tripy.huggingface import load_quant_weights_from_hf
    from backends.safetensors.tripy.loader import load_bundle

__all__ = ["load_bundle", "load_quant_weights_from_hf"]

_HOMES = {
    "load_bundle": "backends.safetensors.tripy.loader",
    "load_quant_weights_from_hf": "backends.safetensors.tripy.huggingface",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'backends' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
