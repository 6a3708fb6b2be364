"""The torch model that an exported artifact must reproduce: fake quantization computed from the
artifact alone.

Every quantized linear becomes

    y = Q(x R) W_dq^T + b,   Q(x) = (clamp(round(x / s_x) + z_x) - z_x) s_x,   W_dq = (W_q - z_w)
    s_w

with the artifact's numbers and scales, in float32; Q as :mod:`calib.arithmetic.inputs` says.
Nothing of ModelOpt is left in it: it defines the numbers that a runtime has to give.

In float16 or bfloat16 the same model is the naive path of a graph in that dtype: every value that a
layer passes on is rounded to it. What that loses against float32 is what a runtime may lose.

The same model with every matmul summed in two halves, ``y = x_1 W_1^T + x_2 W_2^T`` (linears,
attention, head), is just as right: addition of floats fixes no order. So it computes within
:func:`split_sums`; :mod:`calib.measure.floor` measures what the two differ by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.architectures import wiring_of
from calib.arithmetic.inputs import fake_quantize_input
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.modules.attention import attend, registered
from calib.modules.paths import set_submodule
from calib.network.experts import Experts
from calib.network.gather_experts import gather_experts
from calib.network.kv_cache import attach_cache
from calib.network.layout import StockTensors
from calib.network.online import attach_online
from calib.network.prefix import attach_prefix
from calib.network.skeleton import build_skeleton
from calib.rotations.rotation_set import Rotation, RotationSet

_ATTENTION = "rotq_reference_"


class ReferenceLinear(nn.Module):
    """Fake-quantized linear of a :class:`QuantizedLinear`; input ``[..., in]``, output ``[...,
    out]`` in ``dtype``.
    """

    def __init__(
        self,
        linear: QuantizedLinear,
        rotation: Rotation | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.source = linear
        self.rotation = rotation
        self.register_buffer("weight", linear.values().to(dtype), persistent=False)
        self.register_buffer(
            "bias", None if linear.bias is None else linear.bias.to(dtype), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Rotate (where an online rotation acts), quantize, multiply."""
        if self.rotation is not None:
            x = self.rotation.apply(x)
        return self.matmul(self.quantize(x))

    def quantize(self, x: Tensor) -> Tensor:
        """The values that the integer kernel sees, in float."""
        source = self.source
        if source.input_scheme is None:
            return x
        scale = None if source.input_scale is None else source.input_scale.to(x)
        zero = None if source.input_zero_point is None else source.input_zero_point.to(x)
        return fake_quantize_input(x, source.input_scheme, scale, zero).to(x.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """``x W^T + b`` on already quantized values."""
        linear = _split_linear if _split(self) else functional.linear
        return linear(x, cast(Tensor, self.weight), cast("Tensor | None", self.bias))


class LazyReferenceLinear(ReferenceLinear):
    """The same, its weight computed from the artifact whenever it is asked for, and not kept: a
    model of these holds the integers alone.
    """

    def __init__(
        self,
        linear: QuantizedLinear,
        rotation: Rotation | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        self.source = linear
        self.rotation = rotation
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` in the dtype of the model."""
        return self.source.values().to(self._dtype)

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, if there is one."""
        bias = self.source.bias
        return None if bias is None else bias.to(self._dtype)


class _FloatLinear(nn.Linear):
    """A float linear whose products can be summed in two halves."""

    def forward(self, x: Tensor) -> Tensor:
        linear = _split_linear if _split(self) else functional.linear
        return linear(x, self.weight, self.bias)


def build_reference(model: QuantizedModel, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Hugging Face model of ``model.config`` in eval mode on the CPU, its quantized linears
    fake-quantized; of one that was quantized block by block, each weight only while it multiplies.

    Args:
        model: the artifact. Any rotation may be in it; :mod:`calib.network.online` attaches those
            outside the linears.
        dtype: what it computes in; anything but float32 is the naive path of such a graph.
    """
    wiring = wiring_of(model.config)
    tables = {table.name for table in wiring.embeddings}
    floats = {name: tensor.to(dtype) for name, tensor in model.floats.items()}
    floats |= {
        f"{name}.weight": model.linears[name].values().to(dtype)
        for name in tables & model.linears.keys()
    }
    modules: dict[str, nn.Module] = {}
    kind = LazyReferenceLinear if model.by_blocks else ReferenceLinear
    for name, linear in model.linears.items():
        if name not in tables:
            rotation = model.rotations[linear.online_rotation] if linear.online_rotation else None
            modules[name] = kind(linear, rotation, dtype=dtype)
    gather_experts(modules, floats, wiring, model.rotations)
    stock = StockTensors(floats, wiring)
    network = build_skeleton(model.config, stock, skip=set(modules))
    for name, module in modules.items():
        set_submodule(network, name, module)
    within = (
        module for module in network.modules() if isinstance(module, ReferenceLinear | Experts)
    )
    inside = {module.rotation.name for module in within if module.rotation is not None}
    # the rest: R3, and the R4 of float linears and experts
    outside = RotationSet(
        rotation for name, rotation in model.rotations.items() if name not in inside
    )
    attach_online(network, wiring, outside)
    _open_sums(network)
    if model.prefix is not None:  # within what rounds the cache: it stays in float
        attach_prefix(network, wiring, model.prefix.to(dtype))
    if model.cache is not None:
        attach_cache(network, wiring, model.cache)

    return network.eval()


@contextmanager
def split_sums(reference: nn.Module) -> Iterator[None]:
    """Within the block, ``reference``, of :func:`build_reference`, sums every matmul in two
    halves.
    """
    modules: list[Any] = list(reference.modules())
    for module in modules:
        module.split_sums = True
    try:
        yield
    finally:
        for module in modules:
            del module.split_sums


@contextmanager
def unrounded_inputs(reference: nn.Module) -> Iterator[None]:
    """Within the block, the linears of ``reference``, of :func:`build_reference`, take their inputs
    as they are.
    """
    linears = [module for module in reference.modules() if isinstance(module, ReferenceLinear)]
    sources = [linear.source for linear in linears]
    for linear in linears:
        linear.source = replace(linear.source, input_scheme=None)
    try:
        yield
    finally:
        for linear, source in zip(linears, sources, strict=True):
            linear.source = source


def _split(module: nn.Module) -> bool:
    return getattr(module, "split_sums", False)


def _open_sums(network: Any) -> None:
    """Let the float linears and the attention of ``network`` follow :func:`split_sums`."""
    from transformers import AttentionInterface  # here, because it takes seconds to import

    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = _FloatLinear

    whole = network.config._attn_implementation
    attention = AttentionInterface()[whole]

    def either(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        function = _split_attention if _split(module) else attention
        result: tuple[Tensor, Tensor | None] = function(module, *args, **kwargs)
        return result

    network.set_attn_implementation(registered(_ATTENTION + whole, either, masks=whole))


def _split_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    half = weight.shape[1] // 2
    total = functional.linear(x[..., :half], weight[:, :half]) + functional.linear(
        x[..., half:], weight[:, half:]
    )
    return total if bias is None else total + bias


def _split_matmul(a: Tensor, b: Tensor) -> Tensor:
    half = a.shape[-1] // 2
    return a[..., :half] @ b[..., :half, :] + a[..., half:] @ b[..., half:, :]


def _split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, each of its products summed in two halves."""
    return attend(_split_matmul, query, key, value, attention_mask, scaling, softcap), None
