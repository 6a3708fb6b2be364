"""The tensors of a ``tensorrt`` bundle as TensorRT's weights: filling a network, refitting an
engine.

Networks and engines name their weights; here the names are the bundle's keys. Everything is
compared before the first weight is set. TensorRT does not copy what it is given: a
:class:`BundleWeights` has to live until the engine is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from backends.base import RuntimeMissing
from backends.safetensors.differences import grouped
from backends.safetensors.prefix import network_prefix, prefix_tensors
from backends.safetensors.read import Bundle, open_bundle
from backends.safetensors.tensorrt.api import ConstantLayer, Engine, Logger, Network, Weights
from backends.safetensors.tensorrt.layout import unpacked_shape
from calib.architectures import wiring_of
from calib.artifact import Prefix
from calib.errors import BackendError
from calib.schemes import tensor_scheme_from_dict

_MODULES = ("tensorrt", "tensorrt_rtx")
_NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int8: "INT8",
    torch.int32: "INT32",
    torch.float8_e4m3fn: "FP8",
    torch.float8_e8m0fnu: "E8M0",
}
"""TensorRT's ``DataType`` by torch's dtype."""
_PACKED = {"int4": "INT4", "float4_e2m1": "FP4"}
"""The same by the number format of what is packed into uint8."""
_BITS = {"INT4": 4, "FP4": 4}


def tensorrt_module() -> ModuleType:
    """``tensorrt`` or ``tensorrt_rtx``, whichever is installed.

    Raises:
        RuntimeMissing: neither is.
    """
    for name in _MODULES:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise RuntimeMissing(
        "neither tensorrt nor tensorrt_rtx is installed", hint="pip install tensorrt-rtx"
    )


@dataclass(frozen=True)
class Form:
    """A constant as TensorRT sees it."""

    dtype: str
    """Name in ``trt.DataType``."""
    shape: tuple[int, ...]
    """Of the values; four-bit ones are stored packed."""

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Scales:
    """What the Q/DQ layers of one linear take, as :mod:`backends.safetensors.tensorrt.layout` has
    it.
    """

    weight: Tensor
    weight_second: Tensor | None
    input: Tensor | None


@dataclass
class BundleWeights:
    """An open bundle whose tensors are handed to TensorRT.

    Attributes:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        bundle: where the tensors are.
        forms: what each is to TensorRT, by key. A prefix has ``{attention}.prefix.key`` and
            ``.value``, which a network may have as constants, or have in its cache instead.
    """

    trt: ModuleType
    bundle: Bundle
    forms: Mapping[str, Form] = field(init=False)
    _held: dict[str, Tensor] = field(init=False)
    _optional: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._held = prefix_tensors(self.bundle, self.prefix)
        self._optional = frozenset(self._held)
        self.forms = _forms(self.bundle) | {
            key: Form(_NAMES[tensor.dtype], tuple(tensor.shape))
            for key, tensor in self._held.items()
        }

    @cached_property
    def prefix(self) -> Prefix | None:
        """What stands before the keys and values of every sequence: to fill the first p places of a
        cache with. The first token of a text is at position p, and sees them whatever its window.

        Keys ``[kv_heads, p, head_dim]`` by layer are as the network caches them: after RoPE, and
        after R3 where the attention has ``rotation.*``. Both are float, in the bundle's dtype.
        """
        return network_prefix(self.bundle)

    @property
    def required(self) -> frozenset[str]:
        """Keys that a whole network has a constant for."""
        return frozenset(self.forms) - self._optional

    def weights(self, key: str) -> Weights:
        """The ``trt.Weights`` of a tensor, whose memory this object keeps."""
        if key not in self._held:
            self._held[key] = self.bundle.tensors[key]
        tensor = self._held[key]
        form = self.forms[key]
        count = tensor.numel() * 8 // _BITS[form.dtype] if form.dtype in _BITS else tensor.numel()
        weights: Weights = self.trt.Weights(
            getattr(self.trt.DataType, form.dtype), tensor.data_ptr(), count
        )
        return weights

    def scales(self, linear: str) -> Scales:
        """The scales of a quantized linear, by its name in the source model.

        Raises:
            KeyError: the bundle holds no quantized linear of this name.
        """
        self.bundle.manifest.linears[linear]
        tensors = self.bundle.tensors
        second, input_scale = (
            tensors.get(f"{linear}.{part}") for part in ("weight_scale_2", "input_scale")
        )
        return Scales(tensors[f"{linear}.weight_scale"], second, input_scale)


def open_weights(folder: Path | str, trt: ModuleType | None = None) -> BundleWeights:
    """Open the bundle in ``folder`` for TensorRT.

    Args:
        folder: what ``rotq export --backend safetensors --target tensorrt`` wrote.
        trt: the module to make weights of; by default the one that is installed.

    Raises:
        BackendError: the bundle is damaged, written for another target or by a newer version.
        RuntimeMissing: TensorRT is not installed.
    """
    bundle = open_bundle(Path(folder), target="tensorrt", verify=True)
    return BundleWeights(tensorrt_module() if trt is None else trt, bundle)


def fill_network(network: Network, weights: BundleWeights, *, partial: bool = False) -> None:
    """Set the weights of every constant layer of ``network`` whose name is a key of the bundle.

    A constant under another name is the network's own if it has values, and lacks them if it has
    none.

    Args:
        network: a ``trt.INetworkDefinition`` with a constant layer for each tensor, of its dtype
            and shape.
        weights: the bundle; it must live until the engine is built.
        partial: the network may lack constants, as that of a single block does.

    Raises:
        BackendError: naming every constant that is missing, has no tensor, or is of another dtype
            or shape. The network is as it was then.
    """
    layers = _constants(network, weights.trt)
    # a constant without values waits for some, so it counts whether the bundle knows it or not
    empty = {name for name, layer in layers.items() if _size(layer) == 0}
    forms = {
        name: Form(layer.get_output(0).dtype.name, tuple(layer.shape))
        for name, layer in layers.items()
        if name in weights.forms or name in empty
    }
    _check("network", forms, weights, partial=partial)
    for name in forms:
        layers[name].weights = weights.weights(name)


def refit_engine(engine: Engine, weights: BundleWeights, logger: Logger) -> None:
    """Give a refittable engine the weights of the bundle, by name. Needs a GPU.

    Args:
        engine: a ``trt.ICudaEngine`` built with refitting on; its weights are named by the bundle's
            keys (``network.set_weights_name``).
        weights: the bundle.
        logger: a ``trt.ILogger``.

    Raises:
        BackendError: naming every weight without a tensor, or of another dtype or size; or TensorRT
            refuses. The engine is as it was then.
    """
    refitter = weights.trt.Refitter(engine, logger)
    names = list(refitter.get_all_weights())

    # all are compared before the first is set
    wrong = []
    for name in names:
        form = weights.forms.get(name)
        prototype = refitter.get_weights_prototype(name)
        if form is None:
            wrong.append(f"{name} is not in the bundle")
        elif (form.dtype, weights.weights(name).size) != (prototype.dtype.name, prototype.size):
            wrong.append(
                f"{name} is {form} and the engine has {prototype.size} values of"
                f" {prototype.dtype.name}"
            )

    if wrong:
        raise _does_not_fit("engine", "; ".join(wrong), weights)
    if not all(refitter.set_named_weights(name, weights.weights(name)) for name in names):
        raise _does_not_fit("engine", "TensorRT refused a weight; its log says why", weights)
    if not refitter.refit_cuda_engine():
        raise _does_not_fit("engine", "TensorRT could not refit it; its log says why", weights)


def _constants(network: Network, trt: ModuleType) -> dict[str, ConstantLayer]:
    layers: dict[str, ConstantLayer] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer  # the bindings return the base class
            layers[layer.name] = cast(ConstantLayer, layer)
    return layers


def _size(layer: ConstantLayer) -> int:
    """Values of a constant layer: numpy has no dtype for some of TensorRT's, which come as
    ``trt.Weights``.
    """
    return int(layer.weights.size)


def _check(what: str, forms: Mapping[str, Form], weights: BundleWeights, *, partial: bool) -> None:
    problems: dict[str, list[str]] = {}
    for name, form in forms.items():
        expected = weights.forms.get(name)
        if expected is None:
            problems.setdefault("not in the bundle", []).append(name)
        elif form != expected:
            problems.setdefault(f"{form} where the bundle has {expected}", []).append(name)

    if not partial and weights.required - forms.keys():
        problems["without a constant"] = sorted(weights.required - forms.keys())
    if problems:
        raise _does_not_fit(
            what,
            "; ".join(f"{text}: {', '.join(grouped(names))}" for text, names in problems.items()),
            weights,
        )


def _does_not_fit(what: str, problems: str, weights: BundleWeights) -> BackendError:
    bundle = weights.bundle
    return BackendError(
        f"the bundle '{bundle.folder}' of a '{bundle.manifest.model_type}' model does not fit the"
        f" {what}: {problems}",
        hint=(
            "name constants by the bundle's keys, with its dtypes and shapes (rotq inspect lists"
            " them)"
        ),
    )


def _forms(bundle: Bundle) -> dict[str, Form]:
    forms = {}
    manifest = bundle.manifest
    tables = {table.name for table in wiring_of(manifest.config).embeddings}
    for key, entry in manifest.tensors.items():
        if entry.torch_dtype is torch.uint8:
            name = key.removesuffix(".weight")
            scheme = tensor_scheme_from_dict(manifest.linears[name]["weight"])
            scales = manifest.tensors[f"{name}.weight_scale"].shape
            forms[key] = Form(
                _PACKED[scheme.format.name],
                unpacked_shape(entry.shape[0], scales, name not in tables),
            )
        else:
            forms[key] = Form(_NAMES[entry.torch_dtype], tuple(entry.shape))

    return forms
