"""The contract between rotq and whatever writes a runtime's files. Importing this module imports no runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from calib.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from calib.artifact import QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme


@dataclass(frozen=True)
class WriteOptions:
    """What a backend may be told besides the model."""

    target: str
    """One of the backend's targets."""
    progress: Progress = field(default=silent, compare=False)


class RuntimeModel(Protocol):
    """An exported folder, running in its runtime. All tensors are CPU torch tensors."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass over ``input_ids`` ``[B, S]`` after ``past`` (keys and values, ``[B, kv_heads, P, head_dim]`` each).

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, P + S]``, 1 where a token is real.
            position_ids: int64 ``[B, S]``.
            past: key, value of every layer in turn, or ``None`` for an empty cache.

        Returns:
            Logits float32 ``[B, S, V]`` and the new cache, ``[B, kv_heads, P + S, head_dim]`` each.
        """


class ProbedModel(Protocol):
    """An exported folder that also shows what goes into and comes out of its linears, in the runtime itself."""

    def probe(self, input_ids: Tensor, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Input (after any online rotation, before it is quantized) and output of the linears ``names``, by name."""


@dataclass(frozen=True)
class Fusion:
    """How the runtime executes the linears."""

    quantized: int
    """Linears whose weight is stored quantized."""
    unfused: list[str]
    """Of these, the ones whose weight is dequantized on every run instead of feeding an integer kernel."""
    kernels: Mapping[str, int]
    """Count of each compute operator in the graph that the runtime really executes."""


class Backend(Protocol):
    """Writes a :class:`~calib.artifact.QuantizedModel` for a runtime and loads it back. Holds no state."""

    name: str
    targets: tuple[str, ...]
    """Runtimes it writes for; the first is the default."""

    def refusal(self, scheme: LinearScheme, target: str) -> str | None:
        """Why ``target`` cannot express a linear of ``scheme``, else ``None``. Torch-free."""

    def cache_refusal(self, scheme: TensorScheme, target: str) -> str | None:
        """Why ``target`` cannot express a KV cache of ``scheme``, else ``None``. Torch-free."""

    def compute_dtype(self, target: str) -> str:
        """Dtype the target computes in: ``float32``, ``float16`` or ``bfloat16``."""

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """Write the runtime's files into the empty, existing ``folder``. The model is not modified."""

    def load(self, folder: Path, *, exact: bool) -> RuntimeModel:
        """Open a written folder in its runtime.

        Args:
            folder: what :meth:`write` wrote.
            exact: ask for arithmetic as written, without the runtime's own approximations; else as a user runs it.
        """

    def load_probed(self, folder: Path) -> ProbedModel:
        """Open a written folder in its runtime so that its linears can be looked into."""

    def fusion(self, folder: Path) -> Fusion:
        """How the runtime executes the linears of a written folder."""

    def read_linears(self, folder: Path) -> Mapping[str, QuantizedLinear]:
        """Quantized linears as the written folder holds them, in the artifact's orientation."""
