"""Running a bundle in transformers, which reads the compressed-tensors format through the library
of that name.

Weights are dequantized after loading, activations are rounded in float before each matmul. Three
things of that differ from the artifact by convention, not by rounding:

* Scales of integers that are computed while running: ``amax / 127.5`` (half the number of levels)
  for INT8 and ``amax / 7.5`` for INT4, where rotq, ModelOpt and vLLM divide by 127 and 7. The file
  does not say which.
* MXFP4's scales of activations: a power of two by the rule ``floor(log2(amax)) - 2``, one more from
  ``1.75 · 2^k`` on, so that what lies between ``6 s`` and ``7 s`` is clipped; rotq, as ModelOpt,
  takes the least one that clips nothing.
* NVFP4 and MX weights are dequantized to bfloat16. For MX, whose scales are powers of two, that is
  exact.

Asked to be exact, a bundle with one of the first two is refused, so that it is run in torch from
the file; NVFP4's weights are dequantized in float32, by the library's functions, and everything is
computed in float32.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.base import RuntimeMissing
from backends.safetensors.compressed_tensors.library import require
from backends.safetensors.names import Names
from backends.torch_model import cached_pass
from calib.errors import BackendError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NVFP4 = "nvfp4-pack-quantized"
_BFLOAT16_ONLY = (_NVFP4, "mxfp4-pack-quantized", "mxfp8-quantized")
_HINT = "nothing is to be done: what the file holds is run in torch instead"


class TransformersModel:
    """A bundle in transformers; implements ``RuntimeModel`` and ``DescribedModel`` of
    :mod:`backends.base`.
    """

    def __init__(self, network: PreTrainedModel, runtime: str, note: str) -> None:
        self._network = network
        self.precision = str(network.dtype).removeprefix("torch.")
        self.session = {"dtype": self.precision}
        self.runtime = runtime
        self.note = note

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`~backends.base.RuntimeModel`."""
        stored = [tensor.to(self._network.dtype) for tensor in past or ()]
        logits, present = cached_pass(
            self._network, input_ids, attention_mask, position_ids, stored
        )
        return logits.float(), [tensor.float() for tensor in present]


def load(folder: Path, *, exact: bool) -> TransformersModel:
    """Open the bundle in ``folder``.

    Args:
        folder: holds ``config.json`` and the weights.
        exact: compute in float32, and refuse what transformers rounds by another convention; else
            as a user runs it.

    Raises:
        RuntimeMissing: the library is not installed, or transformers does not run what this bundle
            says.
    """
    import transformers  # here, because it takes seconds to import

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described = config.pop("quantization_config", None)
    if described is None:
        raise RuntimeMissing(
            f"'{folder}' holds no quantization_config: nothing of it is quantized", hint=_HINT
        )
    try:
        version = require("compressed_tensors").__version__
    except BackendError as error:
        raise RuntimeMissing(error.message, hint=error.hint) from error
    note = _note(described)
    reason = _unread(described, Names.of(config)) or (note if exact else "")
    if reason:
        raise RuntimeMissing(f"transformers does not run '{folder}' as it is: {reason}", hint=_HINT)
    rounded = any(
        group["format"] in _BFLOAT16_ONLY for group in described["config_groups"].values()
    )
    as_is = torch.bfloat16 if rounded else getattr(torch, config["dtype"])
    with _quiet():
        network = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if exact else as_is, local_files_only=True
        )
    _decompress(network, exact=exact)
    runtime = f"transformers {transformers.__version__}, compressed-tensors {version}"
    return TransformersModel(network.eval(), runtime, note)


def _unread(described: Mapping[str, Any], names: Names) -> str:
    """What of a bundle transformers 5 leaves out or does not load; empty if nothing."""
    if described.get("transform_config"):
        return "it passes over transform_config, and so over online rotations"
    if any(spec.layout == "conv1d" for spec in names.specs.values()):
        return "its GPT-2 is made of Conv1D, which the library does not quantize"
    if names.experts and not _takes_experts(described):
        return (
            "of experts it loads packed integer weights without zero points alone, all of one"
            " scheme"
        )

    if described["kv_cache_scheme"] is not None and not _has_key_projection(names):
        return (
            "of caches it quantizes those of attention with projections of keys of their own alone"
        )

    return ""


def _note(described: Mapping[str, Any]) -> str:
    """What transformers computes by another convention; empty if nothing."""
    inputs = [group["input_activations"] for group in described["config_groups"].values()]
    running = [
        entering for entering in inputs if entering is not None and entering["dynamic"] is True
    ]
    if any(entering["type"] == "int" for entering in running):
        return (
            "takes half the number of levels, not the largest integer, for scales computed while"
            " running"
        )

    if any(entering["num_bits"] == 4 for entering in running):
        return (
            "takes powers of two for the scales of MXFP4 activations that may clip the largest"
            " value of a block"
        )

    return ""


def _takes_experts(described: Mapping[str, Any]) -> bool:
    """Whether transformers' converter of expert weights (``DecompressExperts``) suits this
    bundle.
    """
    groups = list(described["config_groups"].values())
    return (
        len(groups) == 1
        and groups[0]["format"] == "pack-quantized"
        and groups[0]["weights"]["symmetric"]
        and groups[0]["input_activations"] is None
        and not any(".experts." in name for name in described["ignore"])
    )


def _has_key_projection(names: Names) -> bool:
    """Whether the library finds the attention modules, by what it asks of them
    (``is_cached_attention_module``).
    """
    return any(name.endswith((".k_proj", ".qkv_proj")) for name in names.specs)


def _decompress(network: PreTrainedModel, *, exact: bool) -> None:
    """Dequantize every weight, as the library does before the first pass; where ``exact``, to
    float32.
    """
    library = require("compressed_tensors.compressors")
    for module in network.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        weight = _float32_nvfp4(module) if exact and scheme.format == _NVFP4 else None
        library.decompress_module(module)
        if exact:
            weight = module.weight.data.float() if weight is None else weight
            module.weight = torch.nn.Parameter(weight, requires_grad=False)

    network.hf_quantizer.compressor.remove_decompression_hook(network)


def _float32_nvfp4(module: Any) -> Tensor:
    """The NVFP4 weight of a compressed module in float32; the library rounds it to bfloat16."""
    compressors, quantization = (
        require("compressed_tensors.compressors"),
        require("compressed_tensors.quantization"),
    )
    packed = module.weight_packed.data
    weight: Tensor = quantization.dequantize(
        compressors.unpack_fp4_from_uint8(
            packed, packed.shape[0], 2 * packed.shape[1], torch.float32
        ),
        module.weight_scale.data.float(),
        args=module.quantization_scheme.weights,
        global_scale=module.weight_global_scale.data,
    )

    return weight


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library draws progress bars whatever it is told."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
