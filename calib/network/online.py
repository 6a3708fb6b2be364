"""Attaching the online rotations R3 and R4 to a transformers model, leaving every module and its
name in place.

R4 multiplies the input of a down projection, whose weight holds the inverse: ``(x R4) (W R4)^T = x
W^T``. It is a forward pre-hook on the module; experts that transformers keeps as 3-D parameters
have no such module, so their loop is replaced through transformers' own registry of expert
implementations.

R3 multiplies queries and keys per head, after RoPE and *before* the KV cache, so that cached keys
and whatever quantizes them are rotated: ``(q R3) (k R3)^T = q k^T``. transformers has no hook at
that point, so the function ``apply_rotary_pos_emb`` of the modeling module is wrapped once, and
hooks on an attention module switch the wrapper on for the duration of its forward. Layers without
RoPE are rotated at the output of the query and key projections, or of the norms behind them.

Hooks survive ``copy.deepcopy``, ``torch.export`` and ModelOpt's replacement of modules, whose
quantizers see the rotated activations.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from calib.architectures import LinearSpec, Space, Wiring
from calib.errors import RotationError, UnsupportedModelError
from calib.network.experts import mix_experts
from calib.rotations.rotation_set import Rotation, RotationSet

_ROPE_FUNCTION = "apply_rotary_pos_emb"
_EXPERTS_FUNCTION = "rotq"
_active = threading.local()


def attach_online(model: nn.Module, wiring: Wiring, rotations: RotationSet) -> None:
    """Attach the R3 and R4 of ``rotations`` to ``model``, whose weights must come from
    :func:`calib.fusing.fuse`.

    Raises:
        RotationError: online rotations are attached to this model already, or do not fit it.
        UnsupportedModelError: the attention of this model has no RoPE function to wrap.
    """
    online = RotationSet(rotation for rotation in rotations.values() if rotation.online)
    if not online:
        return
    online.validate(wiring)
    if getattr(model, "_rotq_online", False):
        raise RotationError(
            "online rotations are attached to this model already",
            hint="materialize the fused model again",
        )

    model._rotq_online = True  # type: ignore[assignment]
    sizes = wiring.sizes
    for layer in range(sizes.layers):
        for spec in wiring.ffn_readers(layer):
            rotation = online.r4(layer, spec.branch)
            if rotation is not None:
                _attach_r4(model, spec, rotation)
        rotation = online.r3(layer)
        if rotation is None:
            continue
        if wiring.uses_rope(layer):
            attention = model.get_submodule(wiring.attention(layer))
            _attach_r3_after_rope(attention, rotation)
        else:
            _attach_r3_without_rope(model, wiring, layer, rotation)


@dataclass(frozen=True)
class _RotateInput:
    """Forward pre-hook: ``x -> x R4``."""

    rotation: Rotation

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.rotation.apply(args[0]), *args[1:])


def _attach_r4(model: nn.Module, spec: LinearSpec, rotation: Rotation) -> None:
    if spec.layout != "experts":
        model.get_submodule(spec.name).register_forward_pre_hook(_RotateInput(rotation))
        return
    # here, because it takes seconds to import
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_FUNCTION, _rotated_experts)
    experts: Any = model.get_submodule(spec.name.rpartition(".")[0])
    experts._rotq_r4 = rotation
    # A config of its own: ModelOpt, and set_experts_implementation, set the model's config back to
    # another loop, which would drop R4 without a word.
    experts.config = deepcopy(experts.config)
    experts.config._experts_implementation = _EXPERTS_FUNCTION


def _rotated_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The eager loop over experts (transformers ``MixtralExperts.forward``) with R4 before the down
    projection.

    Args:
        experts: module with ``gate_up_proj [E, 2 f, h]``, ``down_proj [E, h, f]`` and ``act_fn``.
        hidden_states: ``[tokens, h]``.
        top_k_index: chosen experts, ``[tokens, k]``.
        top_k_weights: their weights, ``[tokens, k]``.
    """
    rotation = rotation_of_experts(experts)

    def expert(index: int, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, experts.gate_up_proj[index]).chunk(2, dim=-1)
        inner = experts.act_fn(gate) * up
        inner = inner if rotation is None else rotation.apply(inner)
        return nn.functional.linear(inner, experts.down_proj[index])

    return mix_experts(hidden_states, top_k_index, top_k_weights, expert)


def rotation_of_experts(experts: nn.Module) -> Rotation | None:
    """The R4 that :func:`attach_online` attached to a module with 3-D expert parameters."""
    return getattr(experts, "_rotq_r4", None)


@dataclass(frozen=True)
class _Activate:
    """Forward pre-hook of an attention module: from here on RoPE is followed by R3."""

    rotation: Rotation

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _active.rotation = self.rotation


def _deactivate(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    _active.rotation = None


def _attach_r3_after_rope(attention: nn.Module, rotation: Rotation) -> None:
    modeling = sys.modules[type(attention).__module__]
    rope = getattr(modeling, _ROPE_FUNCTION, None)
    if rope is None:
        raise UnsupportedModelError(
            f"R3 cannot be attached: {modeling.__name__} has no {_ROPE_FUNCTION}",
            hint="leave r3 out of --rotate",
        )
    if not hasattr(rope, "_rotq_wraps"):
        setattr(modeling, _ROPE_FUNCTION, _followed_by_r3(rope))
    attention.register_forward_pre_hook(_Activate(rotation))
    # always_call: an exception inside the attention must not leave the rotation switched on for
    # another model.
    attention.register_forward_hook(_deactivate, always_call=True)


def _followed_by_r3(
    rope: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``apply_rotary_pos_emb`` that rotates its results while an attention module with R3 is
    running.
    """

    @functools.wraps(rope)
    def wrapper(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query, key = rope(*args, **kwargs)
        rotation: Rotation | None = getattr(_active, "rotation", None)
        return (query, key) if rotation is None else (rotation.apply(query), rotation.apply(key))

    wrapper._rotq_wraps = rope  # type: ignore[attr-defined]
    return wrapper


@dataclass(frozen=True)
class _RotateHeads:
    """Forward hook of a projection, or of a norm per head: rotate the heads that lie in ``slices``
    of its output features.
    """

    rotation: Rotation
    slices: tuple[slice, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        order = self.rotation.order
        assert order is not None  # R3 is a Hadamard matrix
        result = output.clone()
        for part in self.slices:
            heads = output[..., part]
            heads = heads.reshape(*heads.shape[:-1], -1, order)
            result[..., part] = self.rotation.apply(heads).flatten(-2)
        return result


def _attach_r3_without_rope(
    model: nn.Module, wiring: Wiring, layer: int, rotation: Rotation
) -> None:
    """At the norms of queries and keys if there are any, else at their projections."""
    norms = wiring.query_key_norms(layer)
    for name in norms:
        model.get_submodule(name).register_forward_hook(_RotateHeads(rotation, (slice(None),)))
    for spec in [] if norms else wiring.layer_linears(layer):
        slices: tuple[slice, ...] = (slice(None),) if spec.writes is Space.QUERY_KEY else ()
        for part in spec.parts:
            if part.space is Space.QUERY_KEY:
                slices += tuple(spec.part(part.role, wiring.sizes))
        if slices:
            model.get_submodule(spec.name).register_forward_hook(_RotateHeads(rotation, slices))
