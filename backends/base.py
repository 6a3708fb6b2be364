"""The contract between rotq and whatever writes a runtime's files. Importing this module imports no
runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from calib.errors import BackendError
from calib.process.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme

__all__ = [
    "CONTRACT_VERSION",
    "OLDEST_CONTRACT",
    "About",
    "Backend",
    "BlocksRotations",
    "ContentKind",
    "Dtype",
    "Fusion",
    "Int8Weights",
    "KvBuffer",
    "ListsFiles",
    "LoadsUnrounded",
    "Logits",
    "NeedsLibraries",
    "ProbedModel",
    "ReadsMetadata",
    "Reason",
    "Request",
    "RuntimeMissing",
    "RuntimeModel",
    "Severity",
    "StandIn",
    "StoredTensor",
    "WriteOptions",
]

CONTRACT_VERSION = 4
"""Of what this module says. It is raised by a new option of :class:`Request`, which a backend of an
older version need not know, and by what no older backend satisfies."""
OLDEST_CONTRACT = 2
"""The oldest version whose backends this rotq still takes. Version 1 asked six questions, each in a
method of its own, and no release of rotq had it."""

Logits = Literal["all", "last"]
KvBuffer = Literal["grown", "shared"]
Int8Weights = Literal["auto", "signed", "unsigned"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
About = Literal["linear", "cache", "rotation", "option", "model"]
Severity = Literal["refused", "slow"]

_SINCE = "since"
"""In the metadata of a field of :class:`Request`: the version of the contract that brought this
option."""


@dataclass(frozen=True)
class Request:
    """What is asked of a target: all of a model, or the part of it that is known so far.

    Every field but the target has a default, which means that nothing is asked of the kind. So a
    new one breaks no backend: while it has its default no backend need know it, and rotq itself
    refuses any other value to a backend of a version of the contract before it.
    """

    target: str
    """One of the backend's targets."""
    _: KW_ONLY
    linears: Mapping[str, LinearScheme] = field(default_factory=dict)
    """How what is quantized is, by module name: linears, experts, embeddings. Names may be patterns
    or presets where no model is known."""
    cache: TensorScheme | None = None
    """How the KV cache is quantized, if it is."""
    rotations: tuple[str, ...] = ()
    """Kinds among ``r1`` to ``r4``. R1 and R2 are in the weights, and no concern of a target but
    where it fixes the architecture; R3 and R4 are computed while the model runs."""
    config: Mapping[str, Any] | None = None
    """Hugging Face config as a dictionary. Where it is ``None`` no model is known, and an answer
    takes no torch."""
    logits: Logits = field(default="all", metadata={_SINCE: 2})
    """See :class:`WriteOptions`."""
    kv_buffer: KvBuffer = field(default="grown", metadata={_SINCE: 2})
    """See :class:`WriteOptions`."""
    max_shard_bytes: int | None = field(default=None, metadata={_SINCE: 2})
    """See :class:`WriteOptions`."""
    dtype: Dtype = field(default="auto", metadata={_SINCE: 2})
    """What the target shall compute in; ``auto``: :meth:`Backend.compute_dtype`."""
    prefix: int = field(default=0, metadata={_SINCE: 3})
    """How many tokens stand before every sequence, as constant keys and values of the model
    (:class:`~calib.artifact.Prefix`)."""
    int8_weights: Int8Weights = field(default="auto", metadata={_SINCE: 4})
    """See :class:`WriteOptions`."""

    def options(self, *, newer_than: int = 0) -> dict[str, object]:
        """The options that do not have their defaults, by field.

        Args:
            newer_than: only those that came after this version of the contract.
        """
        return {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.metadata.get(_SINCE, 0) > newer_than
            and getattr(self, option.name) != option.default
        }


@dataclass(frozen=True)
class Reason:
    """Something that speaks against a :class:`Request`."""

    reason: str
    """One sentence about the target, without a full stop."""
    hint: str = ""
    """What to do, if there is something better than to leave out what is refused."""
    about: About = "model"
    """What of the request it is about; ``model``: parts of it together."""
    name: str = ""
    """Which one: the name of a linear, the kind of a rotation, the field of an option."""
    severity: Severity = "refused"
    """``refused``: the target cannot express it. ``slow``: it can, and falls back to what the
    reason says."""


@dataclass(frozen=True)
class WriteOptions:
    """What a backend may be told besides the model."""

    target: str
    """One of the backend's targets."""
    logits: Logits = "all"
    """Logits of every token, or of the last one of each row alone: all that generating text needs.
    """
    kv_buffer: KvBuffer = "grown"
    """``grown``: each run returns keys and values that are longer by the new tokens. ``shared``:
    they go in as a buffer with room for all tokens and come out as that buffer, filled as far as
    the attention mask is long, the new tokens last: in place where the runtime binds input and
    output to one memory."""
    max_shard_bytes: int | None = None
    """Files of weights are split beyond this size; ``None``: the backend's own limit."""
    int8_weights: Int8Weights = "auto"
    """``signed``: int8 weights that are multiplied by int8 inputs are stored as they are.
    ``unsigned``: in uint8, 128 above, which multiplies exactly on every CPU, and more slowly on
    those that multiply signed ones exactly as well. ``auto``: signed where this CPU's kernels are
    exact with them."""
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


@runtime_checkable
class DescribedModel(Protocol):
    """A running folder that was asked how its session computes. A :class:`RuntimeModel` need not be
    one: it then computes in the dtype of the file."""

    precision: str
    """Dtype that the session really computes in where the file has floats (``bfloat16``): what it
    was set to, or what it chose for this CPU of its own accord."""
    session: Mapping[str, str]
    """Settings in force, by the names that the runtime has for them, as the session itself reports
    them.
    """


@runtime_checkable
class StandIn(Protocol):
    """A running folder that may run elsewhere than where it is going to be deployed. A
    :class:`RuntimeModel` need not be one: it then is the target's own runtime.
    """

    not_run_in: str
    """Runtimes that the folder is for and that did not run it, in words; empty: there are none."""


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

    contract: int
    """The :data:`CONTRACT_VERSION` that it was written for: a number, never the constant."""

    def refusals(self, request: Request) -> Sequence[Reason]:
        """What speaks against ``request``; empty: its target can express it, and runs it fast.

        Torch-free where the request has no config. A linear, a cache and so on has one reason at
        most, and what is refused is not called slow as well.
        """

    def compute_dtype(self, target: str) -> str | None:
        """Dtype the target computes in: ``float32``, ``float16`` or ``bfloat16``; ``None``: that of
        the checkpoint.
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


@runtime_checkable
class ListsFiles(Protocol):
    """A backend that can tell its files before it writes them; :class:`Backend` asks for no such
    thing.
    """

    def files(self, request: Request, nbytes: int) -> Sequence[str]:
        """Every file that :meth:`Backend.write` would write for ``request``. Torch-free.

        Args:
            request: what would be written.
            nbytes: of all weights and scales, about: whether they would be split.

        Returns:
            Paths below the folder; ``*`` stands for the number of a shard, and for how many there
            are. Those of ``rotations.*``, which every export has, may be left out.
        """


@runtime_checkable
class NeedsLibraries(Protocol):
    """A backend that writes with optional libraries; :class:`Backend` asks for no such thing."""

    def libraries(self, target: str) -> Mapping[str, str]:
        """Modules that writing for ``target`` imports and rotq does not depend on, and how to
        install each. Torch-free.
        """


@runtime_checkable
class ReadsFloats(Protocol):
    """A backend that can read back what it stores in float; :class:`Backend` asks for no such
    thing.
    """

    def read_floats(self, folder: Path, target: str) -> Mapping[str, Tensor]:
        """Float tensors of a written folder, memory-mapped where they can be.

        Returns:
            By the name that the artifact's have; weights of linears ``[out, in]`` or ``[in, out]``.
            What the folder holds in another form is left out.
        """


@runtime_checkable
class ReadsMetadata(Protocol):
    """A backend that can read back what the files beside the weights say of a model;
    :class:`Backend` asks for no such thing.
    """

    def contradictions(
        self, folder: Path, target: str, model: QuantizedModel
    ) -> Mapping[str, Sequence[str]]:
        """What each metadata file of a written folder states otherwise than it is.

        It is read with other code than wrote it, and held against the stored tensors, the graph or
        ``model``: comparing it with what would be written again would find no fault of the writer.

        Args:
            folder: what :meth:`Backend.write` wrote.
            target: what it was written for.
            model: what it was written from, in the dtype that the target computes in.

        Returns:
            Statements in words by file name, for every file that was read; none where all agree. A
            file that should be there and is not is one of them.
        """


@runtime_checkable
class LoadsUnrounded(Protocol):
    """A backend that can run a written folder without the rounding of activations;
    :class:`Backend` asks for no such thing.
    """

    def load_unrounded(self, folder: Path, target: str) -> RuntimeModel | None:
        """As :meth:`Backend.load` with ``exact``, but what enters linears is not rounded.

        Rounding amplifies the last bits of floats, and so hides small faults of everything around
        it: without, a whole model can be held to the bound of one linear.

        Returns:
            The running folder; ``None`` where something is rounded on the way nevertheless.
        """


@runtime_checkable
class BlocksRotations(Protocol):
    """A backend with targets that take online rotations of a limited order; :class:`Backend` asks
    for no such thing.
    """

    def online_block(self, target: str) -> int | None:
        """Largest order of the Hadamard matrices on the diagonal of an R4, a power of two;
        ``None``: any. Torch-free.
        """
