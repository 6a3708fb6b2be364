"""From a Hugging Face model to a filled Tripy module in one call: read, calibrate, quantize,
fill.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from backends.asking import check
from backends.base import Request
from backends.registry import get_backend
from backends.safetensors.differences import grouped
from backends.safetensors.tripy.dtypes import float_dtype, tripy_dtype
from backends.safetensors.tripy.layout import TripyLayout
from backends.safetensors.tripy.loader import fill, quantized_modules
from calib.architectures import Wiring, wiring_for
from calib.artifact import Provenance, QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.data.rows import calibration_rows
from calib.data.tokens import Tokenizer, clamp_seqlen
from calib.errors import BackendError, CheckpointError
from calib.fusing import FusedModel
from calib.fusing.contents import source_tensors
from calib.network.checkpoint import load_config, open_checkpoint
from calib.network.layout import oriented
from calib.network.skeleton import expected_tensors
from calib.process.progress import Progress, silent
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.rotations.rotation_set import RotationSet
from calib.schemes import FLOAT, scheme_named

if TYPE_CHECKING:
    import nvtripy as tp
    from transformers import PretrainedConfig


def load_quant_weights_from_hf(
    model: tp.Module,
    model_type: str,
    dtype: tp.dtype,
    quant_mode: str,
    *,
    tokenizer: Tokenizer | None = None,
    dataset_name: str = "cnn_dailymail",
    num_samples: int = 64,
    batch_size: int = 8,
    seqlen: int = 512,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Any:
    """Quantize a Hugging Face model and fill a Tripy module with its weights and scales.

    The model is quantized as it is, without rotations; for a rotated one, export a bundle and use
    :func:`~backends.safetensors.tripy.loader.load_bundle`. Linears that ``model`` leaves in float
    stay in float.

    Args:
        model: a ``tp.Module`` with the keys of the Hugging Face model.
        model_type: a hub id such as ``gpt2``, or a folder.
        dtype: Tripy's dtype of weights and scales.
        quant_mode: ``int8-weight-only``, ``int4-weight-only``, ``float8``, or another scheme that
            Tripy can express.
        tokenizer: of calibration text; by default the model's own.
        dataset_name: data set or local file of calibration text. Weight-only modes read none.
        num_samples: the most rows of it.
        batch_size: the most rows in a batch.
        seqlen: the most tokens in a row.
        seed: chooses the rows.
        device: where calibration runs.
        progress: called after every unit of work.

    Returns:
        ``model``, which is left as it was if anything fails.

    Raises:
        BackendError: Tripy cannot express the mode, the dtype or the model, or the module does not
            fit.
        RotqError: the model or the calibration text cannot be read.

    Source: ``load_quant_weights_from_hf`` of the nanoGPT example in NVIDIA's TensorRT-Incubator.
    """
    scheme, layout = scheme_named(quant_mode), TripyLayout()
    if scheme.linear is None:
        raise BackendError(
            f"'{quant_mode}' quantizes nothing",
            hint="choose int8-weight-only, int4-weight-only, float8",
        )

    request = Request("tripy", linears={quant_mode: scheme.linear})
    check(get_backend("safetensors"), request, called=quant_mode)
    compute_dtype = float_dtype(dtype)
    quantized = _quantized_linears(model, quant_mode, tripy_dtype(scheme.linear.weight))
    config = load_config(model_type)
    refusal = layout.model_refusal(config.to_dict(), dict.fromkeys(quantized, scheme.linear))

    if refusal is not None:
        raise BackendError(refusal.reason, hint=refusal.hint)

    source = _as_it_is(model_type, config, compute_dtype)
    outside = {source.wiring.head.name} & quantized
    left = set(source.wiring.linear_names) - quantized
    overrides = {**dict.fromkeys(sorted(outside), quant_mode), **dict.fromkeys(sorted(left), FLOAT)}
    loop = None

    if not scheme.weight_only:
        rows = calibration_rows(
            dataset_name,
            tokenizer or _tokenizer(model_type),
            seqlen=clamp_seqlen(seqlen, config),
            nsamples=num_samples,
            seed=seed,
        )
        loop = forward_loop_over(length_batches(rows, batch_size), progress=progress)

    artifact = _quantized(source, quant_mode, overrides, loop, device, progress)
    tensors = {entry.key: entry.read() for entry in layout.entries(artifact)}
    described = {name: linear.description() for name, linear in artifact.linears.items()}

    return fill(model, tensors, described, f"the '{config.model_type}' model '{model_type}'")


def _quantized_linears(model: tp.Module, quant_mode: str, expected: str) -> set[str]:
    """Names of the linears of ``model`` that are quantized.

    Raises:
        BackendError: there are none, or some have another format than ``wanted``: the module was
            built for another mode, and calibrating for this one would be in vain.
    """
    dtypes = quantized_modules(model)
    others = [name for name, dtype in dtypes.items() if dtype != expected]
    if dtypes and not others:
        return set(dtypes)

    reason = (
        f"quantized otherwise are {', '.join(grouped(others))}"
        if dtypes
        else "none of its linears is quantized"
    )
    raise BackendError(
        f"the {type(model).__name__} module is not one for '{quant_mode}', which has {expected}"
        f" weights: {reason}",
        hint=(
            "backends.safetensors.tripy.modules.build.module_for_config(config, dtype, quant_mode)"
            " builds one"
        ),
    )


def _as_it_is(model_type: str, config: PretrainedConfig, dtype: torch.dtype) -> FusedModel:
    """The float model in ``dtype`` with nothing folded into it, under the names of the module
    tree.
    """
    wiring = wiring_for(config)
    expected = expected_tensors(config)
    tensors = source_tensors(open_checkpoint(model_type), wiring, expected)
    untied = deepcopy(config)
    untied.tie_word_embeddings = False
    untied.dtype = dtype
    state = {name: tensors.read(name).to(dtype) for name in expected}
    return FusedModel(
        oriented(state, wiring),
        Wiring(wiring.architecture, untied),
        RotationSet(),
        dtype,
        tuple(tensors.unused()),
        (),
        norms_folded=False,
    )


def _quantized(
    source: FusedModel,
    quant_mode: str,
    overrides: dict[str, str],
    loop: ForwardLoop | None,
    device: torch.device | str,
    progress: Progress,
) -> QuantizedModel:
    quantization = resolve(scheme_named(quant_mode), source.wiring, overrides=overrides)
    # The artifact only lives until the module is filled, so nobody asks where it came from.
    provenance = Provenance("", "", {}, 0, 0, 0, 0, "", {})
    return quantize_model(source, quantization, loop, provenance, device=device, progress=progress)


def _tokenizer(model_type: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(model_type)
    # transformers raises OSError, ValueError or a tokenizers exception of its own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot load the tokenizer of '{model_type}': {reason}", hint="pass tokenizer="
        ) from error
    return tokenizer
