"""Running in torch what a written folder holds, for backends without a runtime on this machine.

It is the reference of :mod:`calib.measure.reference` over the model as *read back*, so it shows
whether keys, packing, transposes and scales come back as they went in. What the target's own
kernels make of them it cannot show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calib.artifact import QuantizedModel
from calib.measure.reference import ReferenceLinear, build_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchModel:
    """A quantized model in torch; implements :class:`~backends.base.RuntimeModel`,
    ``StandIn`` and ``ProbedModel``.

    Args:
        model: the artifact, as read back from a written folder.
        not_run_in: see :class:`~backends.base.StandIn`.
    """

    runtime = "torch, from the file"
    note = ""

    def __init__(self, model: QuantizedModel, *, not_run_in: str = "") -> None:
        self.not_run_in = not_run_in
        self._network: Any = build_reference(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`~backends.base.RuntimeModel`."""
        logits, present = cached_pass(
            self._network, input_ids, attention_mask, position_ids, past or ()
        )
        return logits.float(), present

    @torch.no_grad()
    def probe(self, input_ids: Tensor, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """See :class:`~backends.base.ProbedModel`. Experts that no token was routed to are left
        out.
        """
        asked = set(names)
        observed: dict[str, tuple[Tensor, Tensor]] = {}

        def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                assert isinstance(module, ReferenceLinear)  # registered on nothing else
                entering = args[0] if module.rotation is None else module.rotation.apply(args[0])
                observed[name] = (entering, output)

            return hook

        handles = [
            module.register_forward_hook(look(module.source.name))
            for module in self._network.modules()
            if isinstance(module, ReferenceLinear) and module.source.name in asked
        ]
        try:
            self._network(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return {name: observed[name] for name in names if name in observed}


@torch.no_grad()
def cached_pass(
    network: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    past: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """One pass of a transformers model over ``input_ids`` after ``past``.

    Args:
        network: a causal LM.
        input_ids: int64 ``[B, S]``.
        attention_mask: int64 ``[B, P + S]``.
        position_ids: int64 ``[B, S]``.
        past: key, value of every layer in turn, ``[B, kv_heads, P, head_dim]`` each, in the dtype
            of the network.

    Returns:
        Logits ``[B, S, V]`` and the new cache, in the dtype of the network.
    """
    from transformers import DynamicCache  # here, because it takes seconds to import

    cache = DynamicCache()
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    output = network(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits, [
        tensor for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
