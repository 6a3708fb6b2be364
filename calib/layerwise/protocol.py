"""What the runner asks of whoever quantizes the linears; it knows no observer and no weight
algorithm itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from calib.layerwise.blocks import Block

Q = TypeVar("Q")
"""A quantized linear, as the calibrator represents it."""


class RunBlock(Protocol):
    """Runs every calibration batch through a block, without gradients."""

    def __call__(self, module: nn.Module | None = None) -> None:
        """Run ``module``, a copy of the block perhaps; by default the block itself."""


class BlockQuantizer(Protocol[Q]):
    """Quantizes linears whose inputs it may watch, and what lies in no block."""

    @property
    def looks_at_head(self) -> bool:
        """Whether :meth:`quantize_outside` runs what enters the output head."""

    def calibrate(self, block: Block, names: Sequence[str], run: RunBlock) -> Mapping[str, Q]:
        """Quantize the linears ``names`` (paths in the model) of ``block``.

        It may call ``run`` as often as it wants with hooks on the modules of the block, which must
        compute the float function while it does, and must have removed the hooks when it returns.
        It may change float tensors of the block in place (smoothing), and leaves out the linears
        that stay in float.
        """

    def quantize_outside(
        self, name: str, tensors: Mapping[str, Tensor], run: Callable[[nn.Module], None]
    ) -> Q | None:
        """Quantize a module that lies in no block, an embedding or the output head; ``None`` where
        it stays in float.

        Args:
            name: its path in the model.
            tensors: its own, by their names in the model.
            run: calls a module on what enters the output head, ``[rows, length, hidden]`` of every
                calibration batch.
        """

    def tensors(self, quantized: Q) -> Mapping[str, Tensor]:
        """Everything that is stored of a linear, its bias included, by local key: ``weight``,
        ``weight_scale`` ...
        """

    def extra(self, block: Block) -> Mapping[str, Tensor]:
        """What is stored of a calibrated block beside its linears, by full key."""

    def replacement(
        self, quantized: Q, linear: nn.Module, w_quant: bool, a_quant: bool
    ) -> Callable[[Tensor], Tensor]:
        """The function ``y(x)`` of ``linear`` with its weights, its inputs or both rounded as in
        ``quantized``.

        ``x`` has been through the online rotations already, and what rotates the output follows:
        those stay hooks of ``linear``.
        """
