"""Which models vLLM and transformers read in the compressed-tensors format: what speaks against a
model as a whole, beside the schemes of its linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from backends.base import Reason, Request
from backends.safetensors.compressed_tensors.schemes import whole_rows
from backends.safetensors.names import Names
from backends.safetensors.source import input_widths
from calib.architectures import LinearSpec
from calib.network.skeleton import oriented_shapes

_KEY_PROJECTIONS = (".k_proj", ".qkv_proj")
"""How the library knows an attention (``is_cached_attention_module``)."""


def reasons(request: Request) -> list[Reason]:
    """What speaks against the model of ``request``, which has a config."""
    assert request.config is not None
    names = Names.of(request.config)
    return [reason for reads in _READERS[request.target] for reason in reads(request, names)]


def _vllm(request: Request, names: Names) -> Iterator[Reason]:
    apart = names.experts_apart(request.linears)
    if apart is not None:
        yield Reason(
            f"vLLM wants all experts in one scheme, and those of '{apart}' are left in float",
            "quantize all experts, or none",
        )
    refusal = _r4_refusal(names) if "r4" in request.rotations else None
    if refusal is not None:
        yield Reason(refusal, about="rotation", name="r4")


def _transformers(request: Request, names: Names) -> Iterator[Reason]:
    turned = next((name for name in request.linears if names.transposed(name)), None)
    if turned is not None:
        yield Reason(
            f"in transformers '{turned}' is a Conv1D, which the compressed-tensors library does not"
            " quantize",
            "use --target vllm, or --backend onnx",
        )
    if names.experts and request.linears and not _takes_experts(request, names):
        yield Reason(
            "of a model with experts transformers loads packed integer weights without zero points"
            " alone, all of one scheme",
            "use --scheme int8-weight-only without --override, or --target vllm",
        )
    if request.cache is not None and not any(
        name.endswith(_KEY_PROJECTIONS) for name in names.specs
    ):
        yield Reason(
            "of caches transformers quantizes those of attention with projections of keys of their"
            " own alone",
            "leave --kv out, or use --target vllm",
        )


_Reader = Callable[[Request, Names], Iterator[Reason]]
_READERS: Mapping[str, tuple[_Reader, ...]] = {
    "vllm": (_vllm,),
    "transformers": (_transformers,),
    "compressed-tensors": (_vllm, _transformers),
}


def _r4_refusal(names: Names) -> str | None:
    """Why vLLM does not apply R4 in this model; ``None`` if it does."""
    tensors = oriented_shapes(names.wiring)
    for spec in _down_projections(names):
        if spec.layout == "experts":
            return (
                f"vLLM 0.33 applies transforms to linears alone, not to the experts '{spec.name}'"
            )
        if f"{spec.name}.bias" in tensors:
            return f"vLLM 0.33 takes no transform of a linear with a bias, as '{spec.name}' has"
    return None


def _down_projections(names: Names) -> Iterator[LinearSpec]:
    for layer in range(names.wiring.sizes.layers):
        yield from names.wiring.ffn_readers(layer)


def _takes_experts(request: Request, names: Names) -> bool:
    """Whether transformers' converter of expert weights (``DecompressExperts``) suits the linears:
    one config group, packed, and no expert in float.
    """
    assert request.config is not None
    schemes, widths = set(request.linears.values()), input_widths(request.config)
    forms = {
        whole_rows(widths[name], scheme.weight)
        for name, scheme in request.linears.items()
        if name in widths
    }
    return (
        len(schemes) == 1
        and len(forms) <= 1
        and all(
            scheme.input is None
            and scheme.weight.format.kind == "integer"
            and scheme.weight.symmetric
            for scheme in schemes
        )
        and all(f"{parameter}.0" in request.linears for parameter in names.experts)
    )
