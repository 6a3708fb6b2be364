"""Running a bundle in transformers, which reads the compressed-tensors format through the library
of that name.

Weights are dequantized after loading, activations are rounded in float before each matmul. Three
things of that differ from the artifact by convention, not by rounding:

* Scales of symmetric integers that are computed while running: ``amax / 127.5`` (half the number of
  levels) for INT8 and ``amax / 7.5`` for INT4, where rotq, ModelOpt and vLLM divide by 127 and 7.
  The file does not say which.
* MXFP4's scales of activations: a power of two by the rule ``floor(log2(amax)) - 2``, one more from
  ``1.75 · 2^k`` on, so that what lies between ``6 s`` and ``7 s`` is clipped; rotq, as ModelOpt,
  takes the least one that clips nothing.
* NVFP4 and MX weights are dequantized to bfloat16. For MX, whose scales are powers of two, that is
  exact.

Asked to be exact, everything is computed in float32, inputs of the first two kinds are quantized by
the artifact's rule before transformers' own linears take them, and NVFP4's weights are dequantized
in float32, by the library's functions. Otherwise it is what ``from_pretrained`` gives a user.

For vLLM it stands in where it reads a bundle as vLLM does.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backends.base import Request, RuntimeMissing
from backends.safetensors.compressed_tensors.library import require
from backends.safetensors.compressed_tensors.models import reasons
from backends.safetensors.file_names import CONFIG_FILE
from backends.safetensors.manifest import Manifest
from backends.torch_model import cached_pass
from calib.arithmetic.inputs import fake_quantize_input
from calib.errors import BackendError
from calib.files.reading import MALFORMED, is_failure, read_json, reason_of
from calib.rotations.files import load_rotations
from calib.schemes import LinearScheme, TensorScheme, tensor_scheme_from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NVFP4 = "nvfp4-pack-quantized"
_HINT = "nothing is to be done: what the file holds is run in torch instead"


class TransformersModel:
    """A bundle in transformers; implements ``RuntimeModel``, ``DescribedModel``, ``StandIn`` and
    ``ProbedModel`` of :mod:`backends.base`.
    """

    def __init__(self, network: PreTrainedModel, runtime: str, note: str, not_run_in: str) -> None:
        self._network = network
        self.precision = str(network.dtype).removeprefix("torch.")
        self.session = {"dtype": self.precision}
        self.runtime = runtime
        self.note = note
        self.not_run_in = not_run_in

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

    @torch.no_grad()
    def probe(self, input_ids: Tensor, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """See :class:`~backends.base.ProbedModel`. Experts, which are no modules, are left out."""
        entering: dict[str, Tensor] = {}
        observed: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for name in names:
            module = _module(self._network, name)
            if module is None:
                continue

            def enter(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                entering[name] = args[0]

            def leave(_: nn.Module, args: object, output: Tensor, name: str = name) -> None:
                observed[name] = (entering[name].float(), output.float())

            # before a hook that quantizes what enters
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            self._network(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return {name: observed[name] for name in names if name in observed}


def load(folder: Path, *, exact: bool, stands_in: bool, not_run_in: str) -> TransformersModel:
    """Open the bundle in ``folder``.

    Args:
        folder: holds ``config.json``, the weights and the manifest.
        exact: compute in float32, and round as the artifact says; else as a user runs it.
        stands_in: refuse what transformers does not read as another reader does.
        not_run_in: see :class:`~backends.base.StandIn`.

    Raises:
        RuntimeMissing: the library is not installed, or transformers may not stand in.
    """
    import transformers  # here, because it takes seconds to import

    described = _config(folder).get("quantization_config")
    runtime = f"transformers {transformers.__version__}"
    if described is not None:
        try:
            version = require("compressed_tensors").__version__
        except BackendError as error:
            raise RuntimeMissing(error.message, hint=error.hint) from error
        runtime += f", compressed-tensors {version}"
    try:
        note = "" if described is None else _note(described)
    except MALFORMED as error:
        raise BackendError(
            f"the quantization_config of '{folder / CONFIG_FILE}' is damaged: {reason_of(error)}",
            hint="export the model again",
        ) from error
    if stands_in:
        _check_stand_in(folder, note)
    try:
        with _quiet():
            network = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32 if exact else "auto", local_files_only=True
            )
        if described is not None:
            _decompress(network, exact=exact)
    except Exception as error:  # of config and tensors that do not fit each other
        if not is_failure(error):
            raise
        raise BackendError(
            f"transformers does not load '{folder}': {reason_of(error)}",
            hint="export the model again",
        ) from error
    if exact and note:
        _quantize_inputs_as_written(network, folder)
        note = ""
    return TransformersModel(network.eval(), runtime, note, not_run_in)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise BackendError(
            f"'{folder / CONFIG_FILE}' cannot be read: {reason_of(error)}",
            hint="export the model again",
        ) from error


def _check_stand_in(folder: Path, note: str) -> None:
    """Refuse a bundle that transformers does not read as vLLM does."""
    manifest = Manifest.load(folder)
    request = Request(
        "transformers",
        config=manifest.config,
        linears={name: _scheme(each) for name, each in manifest.linears.items()},
        cache=None if manifest.cache is None else tensor_scheme_from_dict(manifest.cache.scheme),
    )
    reason = next((each.reason for each in reasons(request)), note)
    if any(rotation.online for rotation in load_rotations(folder).values()):
        reason = "it passes over transform_config, and so over rotations while running"
    if reason:
        raise RuntimeMissing(f"transformers does not run '{folder}' as it is: {reason}", hint=_HINT)


def _scheme(description: Mapping[str, Any]) -> LinearScheme:
    entering = description["input"]
    return LinearScheme(
        tensor_scheme_from_dict(description["weight"]),
        None if entering is None else tensor_scheme_from_dict(entering),
    )


def _note(described: Mapping[str, Any]) -> str:
    """What transformers computes by another convention; empty if nothing."""
    inputs = [group["input_activations"] for group in described["config_groups"].values()]
    running = [
        entering for entering in inputs if entering is not None and entering["dynamic"] is True
    ]
    if any(entering["type"] == "int" and entering["symmetric"] for entering in running):
        return (
            "takes half the number of levels, not the largest integer, for scales computed while"
            " running"
        )

    if any(entering["type"] == "float" and entering["num_bits"] == 4 for entering in running):
        return (
            "takes powers of two for the scales of MXFP4 activations that may clip the largest"
            " value of a block"
        )

    return ""


def _quantize_inputs_as_written(network: PreTrainedModel, folder: Path) -> None:
    """Let inputs whose scales are computed while running be quantized by the rule of the artifact.

    The modules stay transformers' own, and so do their weights.
    """
    for name, description in Manifest.load(folder).linears.items():
        scheme, module = _scheme(description).input, _module(network, name)
        if scheme is None or scheme.needs_calibration or module is None:
            continue
        own: Any = module
        own.quantization_scheme = own.quantization_scheme.model_copy(
            update={"input_activations": None}
        )
        module.register_forward_pre_hook(partial(_quantized, scheme))


def _quantized(scheme: TensorScheme, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (fake_quantize_input(args[0], scheme),)


def _module(network: nn.Module, name: str) -> nn.Module | None:
    """The linear ``name``; ``None`` for that of an expert, which is no module."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


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
