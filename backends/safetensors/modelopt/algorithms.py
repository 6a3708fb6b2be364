"""The names of ModelOpt's formats (``quant_algo``), the schemes of rotq that they stand for, and
who loads them.

Torch-free. Names, keys and settings are those of ModelOpt 0.47's ``export_hf_checkpoint``. Who
loads what was read from vLLM 0.33 (``model_executor/layers/quantization/modelopt.py``) and from
``get_quant_method`` in TensorRT-LLM's ``_torch/modules/linear.py``; nothing was run in either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from calib.schemes import (
    FLOAT4,
    FLOAT8,
    INT4,
    INT8,
    LinearScheme,
    PerBlock,
    PerChannel,
    PerTensor,
    PerToken,
    TensorScheme,
)

_EITHER_SIZE = 128
"""Stands for any size of INT4 blocks, which the format states."""


@dataclass(frozen=True)
class Algorithm:
    """One of ModelOpt's formats.

    Attributes:
        name: its ``quant_algo``.
        weight: bits and type of the weights as ``config_groups`` has them.
        inputs: the same of the inputs; ``None``: not quantized.
        grouped: whether ``group_size`` is stated.
        awq: whether it is stated that inputs are multiplied by a ``pre_quant_scale`` where there is
            one.
        per_channel: whether the weights' ``strategy`` is stated.
        names_linears: whether a checkpoint of this format alone has ``config_groups``.
        readers: who loads it.
    """

    name: str
    weight: tuple[int, Literal["int", "float"]]
    inputs: tuple[int, Literal["int", "float"]] | None
    grouped: bool = False
    awq: bool = False
    per_channel: bool = False
    names_linears: bool = False
    readers: tuple[Literal["vLLM", "TensorRT-LLM"], ...] = ()

    def settings(self, block: int | None) -> dict[str, Any]:
        """What ``hf_quant_config.json`` says of it, for blocks of ``block``."""
        return {
            "quant_algo": self.name,
            **({"group_size": block} if self.grouped else {}),
            **({"has_zero_point": False, "pre_quant_scale": True} if self.awq else {}),
        }

    def group(self, block: int | None) -> dict[str, Any]:
        """An entry of ``config_groups`` without its targets."""
        grouping = {"group_size": block} if self.grouped else {}
        settings = (
            {} if self.inputs is None else {"input_activations": _numbers(*self.inputs) | grouping}
        )
        weights = (
            _numbers(*self.weight)
            | grouping
            | ({"strategy": "channel"} if self.per_channel else {})
        )
        return {**settings, "weights": weights}


def _numbers(bits: int, kind: str) -> dict[str, Any]:
    return {"dynamic": False, "num_bits": bits, "type": kind}


_NVFP4 = TensorScheme(FLOAT4, PerBlock(16), scale_format="e4m3")
_MXFP8 = TensorScheme(FLOAT8, PerBlock(32), scale_format="e8m0")
_INT8 = TensorScheme(INT8, PerChannel(0))
_INT4 = TensorScheme(INT4, PerBlock(_EITHER_SIZE))
_FP8 = TensorScheme(FLOAT8, PerTensor())

_ALGORITHMS: dict[LinearScheme, Algorithm] = {
    LinearScheme(_INT8, TensorScheme(INT8, PerTensor())): Algorithm(
        "W8A8_SQ_PER_CHANNEL", (8, "int"), (8, "int"), per_channel=True
    ),
    LinearScheme(_INT8, None): Algorithm("W8A16", (8, "int"), None, readers=("TensorRT-LLM",)),
    LinearScheme(_INT4, None): Algorithm(
        "W4A16_AWQ", (4, "int"), None, grouped=True, awq=True, readers=("TensorRT-LLM",)
    ),
    LinearScheme(_INT4, _FP8): Algorithm(
        "W4A8_AWQ", (4, "float"), (8, "float"), grouped=True, awq=True, readers=("TensorRT-LLM",)
    ),
    LinearScheme(_FP8, _FP8): Algorithm(
        "FP8", (8, "float"), (8, "float"), names_linears=True, readers=("vLLM", "TensorRT-LLM")
    ),
    LinearScheme(
        TensorScheme(FLOAT8, PerChannel(0)), TensorScheme(FLOAT8, PerToken(), dynamic=True)
    ): Algorithm(
        "FP8_PER_CHANNEL_PER_TOKEN",
        (8, "float"),
        (8, "float"),
        per_channel=True,
        readers=("vLLM", "TensorRT-LLM"),
    ),
    LinearScheme(_NVFP4, replace(_NVFP4, dynamic=True)): Algorithm(
        "NVFP4",
        (4, "float"),
        (4, "float"),
        grouped=True,
        names_linears=True,
        readers=("vLLM", "TensorRT-LLM"),
    ),
    LinearScheme(_NVFP4, None): Algorithm(
        "W4A16_NVFP4", (4, "float"), None, grouped=True, names_linears=True, readers=("vLLM",)
    ),
    LinearScheme(_MXFP8, replace(_MXFP8, dynamic=True)): Algorithm(
        "MXFP8", (8, "float"), (8, "float"), grouped=True, readers=("vLLM",)
    ),
}


def algorithm_of(scheme: LinearScheme) -> Algorithm | None:
    """The format of a linear of ``scheme``; ``None`` if ModelOpt has none."""
    return _ALGORITHMS.get(replace(scheme, weight=_any_size(scheme.weight)))


def _any_size(weight: TensorScheme) -> TensorScheme:
    if weight.format == INT4 and isinstance(weight.granularity, PerBlock):
        return replace(weight, granularity=PerBlock(_EITHER_SIZE))
    return weight
