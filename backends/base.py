"""The contract between rotq and whatever writes a runtime's files. Importing this module imports no
runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from calib.errors import BackendError
from calib.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme


@dataclass(frozen=True)
class WriteOptions:
    """What a backend may be told besides the model."""

    target: str
    """One of the backend's targets."""
    logits: Literal["all", "last"] = "all"
    """Logits of every token, or of the last one of each row alone: all that generating text needs.
    """
    kv_buffer: Literal["grown", "shared"] = "grown"
    """``grown``: each run returns keys and values that are longer by the new tokens. ``shared``:
    they go in as a buffer with room for all tokens and come out as that buffer, filled as far as
    the attention mask is long, the new tokens last: in place where the runtime binds input and
    output to one memory."""
    max_shard_bytes: int | None = None
    """Files of weights are split beyond this size; ``None``: the backend's own limit."""
    progress: Progress = field(default=silent, compare=False)


class RuntimeMissing(BackendError):
    """The runtime that would run a written folder is not installed, or needs hardware that is not
    there.
    """


class RuntimeModel(Protocol):
    """An exported folder, running in its runtime. All tensors are CPU torch tensors."""

    runtime: str
    """What runs it, for tables: ``ONNX Runtime 1.31.1 (CPU)``, ``transformers``, ``torch, from the
    file``.
    """
    note: str
    """What this runtime computes otherwise than the file says, of its own accord (``quantizes the
    inputs of weight-only linears to int8``); empty: nothing. What has a note is reported, and what
    has none is held to the bounds."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass over ``input_ids`` ``[B, S]`` after ``past`` (keys and values, ``[B, kv_heads,
        P, head_dim]`` each).

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, P + S]``, 1 where a token is real.
            position_ids: int64 ``[B, S]``.
            past: key, value of every layer in turn, or ``None`` for an empty cache.

        Returns:
            Logits float32 ``[B, S, V]``, or ``[B, 1, V]`` where only those of the last token were
            written, and the new cache, ``[B, kv_heads, P + S, head_dim]`` each.
        """


class ProbedModel(Protocol):
    """An exported folder that also shows what goes into and comes out of its linears, in the
    runtime itself.
    """

    def probe(self, input_ids: Tensor, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Input (after any online rotation, before it is quantized) and output of the linears
        ``names``, by name.
        """


@dataclass(frozen=True)
class Fusion:
    """How the runtime executes the linears."""

    quantized: int
    """Linears whose weight is stored quantized."""
    unfused: list[str]
    """Of these, the ones whose weight is dequantized on every run instead of feeding an integer
    kernel.
    """
    kernels: Mapping[str, int]
    """Count of each compute operator in the graph that the runtime really executes."""


ContentKind = Literal["quantized weight", "scale", "zero point", "float weight", "other"]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a written folder, as ``rotq inspect`` counts it."""

    name: str
    kind: ContentKind
    dtype: str
    """As the runtime calls it: ``int4``, ``float16``, ``float8_e4m3fn``."""
    shape: tuple[int, ...]
    nbytes: int
    """On disk, packed."""


class Backend(Protocol):
    """Writes a :class:`~calib.artifact.QuantizedModel` for a runtime and loads it back. Holds no
    state.
    """

    name: str
    targets: tuple[str, ...]
    """Runtimes it writes for; the first is the default."""

    def refusal(self, scheme: LinearScheme, target: str) -> str | None:
        """Why ``target`` cannot express a linear of ``scheme``, else ``None``. Torch-free."""

    def warning(self, scheme: LinearScheme, target: str) -> str | None:
        """What a linear of ``scheme`` that ``target`` can express falls back to where it is slow,
        else ``None``.

        Torch-free.
        """

    def cache_refusal(self, scheme: TensorScheme, target: str) -> str | None:
        """Why ``target`` cannot express a KV cache of ``scheme``, else ``None``. Torch-free."""

    def rotation_refusal(self, kind: str, target: str) -> str | None:
        """Why ``target`` cannot express rotations of ``kind`` (``r1`` to ``r4``), else ``None``.
        Torch-free.

        R1 and R2 are in the weights, and no concern of a target but where it fixes the
        architecture; R3 and R4 are computed while the model runs.
        """

    def logits_refusal(self, target: str) -> str | None:
        """Why ``target`` cannot be written with the logits of the last token alone, else ``None``.
        Torch-free.
        """

    def kv_buffer_refusal(self, target: str) -> str | None:
        """Why ``target`` cannot be written with keys and values in one shared buffer, else
        ``None``. Torch-free.
        """

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme], target: str
    ) -> tuple[str, str] | None:
        """Why ``target`` cannot express this model, and what to do; else ``None``. May import
        torch.

        Args:
            config: Hugging Face config as a dictionary.
            linears: how what is quantized is, by module name: linears, experts, embeddings.
            target: one of the targets.
        """

    def compute_dtype(self, target: str) -> str | None:
        """Dtype the target computes in: ``float32``, ``float16`` or ``bfloat16``; ``None``: that of
        the checkpoint.
        """

    def files(
        self, options: WriteOptions, linears: Mapping[str, LinearScheme], nbytes: int
    ) -> Sequence[str]:
        """Names of the files that :meth:`write` will give, for a plan. Torch-free.

        Args:
            options: as for :meth:`write`.
            linears: how what is quantized is, by module name.
            nbytes: of all weights and scales, about.

        Returns:
            Paths below the folder; ``*`` stands for the number of a shard, and for how many there
            are.
        """

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """Write the runtime's files into the empty, existing ``folder``. The model is not modified.

        Files of the checkpoint that travel along (tokenizer, generation config) are not its
        business, and neither is ``config.json``, unless the runtime wants one of its own: what it
        writes is kept.
        """

    def load(self, folder: Path, target: str, *, exact: bool) -> RuntimeModel:
        """Open a written folder in its runtime, or in the nearest thing to it that this machine
        has.

        Args:
            folder: what :meth:`write` wrote.
            target: what it was written for.
            exact: ask for arithmetic as written, without the runtime's own approximations; else as
                a user runs it.

        Raises:
            RuntimeMissing: nothing on this machine can run it.
            BackendError: the folder is damaged.
        """

    def load_probed(self, folder: Path, target: str) -> ProbedModel:
        """Open a written folder in its runtime so that its linears can be looked into; errors as
        for :meth:`load`.
        """

    def fusion(self, folder: Path, target: str) -> Fusion | None:
        """How the runtime executes the linears of a written folder; ``None`` where it does not
        tell.
        """

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        """Quantized linears as the written folder holds them, in the artifact's orientation."""

    def read_cache(self, folder: Path, target: str) -> QuantizedCache | None:
        """The quantized KV cache as the written folder holds it, if there is one."""

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        """Every tensor that the written folder holds."""
