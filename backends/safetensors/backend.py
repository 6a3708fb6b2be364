"""The safetensors backend's front: a :class:`~backends.base.Backend` that loads its heavy parts
when they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from backends.base import (
    ProbedModel,
    Reason,
    Request,
    RuntimeMissing,
    RuntimeModel,
    StoredTensor,
    WriteOptions,
)
from backends.rules import Limits
from backends.safetensors.compressed_tensors.library import HINT
from backends.safetensors.file_names import (
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_SHARD_BYTES,
    PREFIX_FILES,
    WEIGHTS_FILE,
    WEIGHTS_SHARDS,
)
from backends.safetensors.targets import TARGETS
from calib.architectures import architecture_of

if TYPE_CHECKING:
    from torch import Tensor

    from backends.safetensors.read import Bundle
    from backends.torch_model import TorchModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel

_Running = TypeVar("_Running")
_OF_BUNDLES = Limits(
    options={
        "logits": "a bundle holds weights; which logits are computed is up to whoever loads it",
        "kv_buffer": "a bundle holds weights; how a cache is kept is up to whoever loads it",
        "int8_weights": "the layout of a bundle says how int8 weights are stored",
    }
)
"""What no target of a bundle can be written with."""
_NOT_IN_TABLE = (
    "how runtimes call the weights of a {!r} model, and which of them they merge, is known of the"
    " families in the architecture table alone"
)


class SafetensorsBackend:
    """Writes bundles of weights and scales under a target's own keys, and reads them back."""

    name = "safetensors"
    targets = tuple(TARGETS)
    contract = 4

    def refusals(self, request: Request) -> list[Reason]:
        """See :class:`~backends.base.Backend`."""
        target = TARGETS[request.target]
        reasons = target.limits.reasons(request) + _OF_BUNDLES.reasons(request)
        if request.config is None:
            return reasons
        family = architecture_of(request.config)
        if family.how == "generic":
            return [*reasons, Reason(_NOT_IN_TABLE.format(family.name), "use --backend onnx")]
        whole = _in_one_piece(request)
        return [*reasons, *target.reasons(request)] if whole is None else [*reasons, whole]

    def compute_dtype(self, target: str) -> None:
        """The checkpoint's own: a bundle holds weights, and whoever loads it computes."""

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """See :class:`~backends.base.Backend`."""
        from backends.safetensors.bundle import write_bundle

        write_bundle(model, TARGETS[options.target].layout(), folder, options)

    def files(self, request: Request, nbytes: int) -> Sequence[str]:
        """See :class:`~backends.base.ListsFiles`."""
        target = TARGETS[request.target]
        limit = request.max_shard_bytes or MAX_SHARD_BYTES
        weights = WEIGHTS_FILE if nbytes <= limit else WEIGHTS_SHARDS
        quantized = target.quantized_files if request.linears else ()
        prefix = PREFIX_FILES if request.prefix else ()
        return (weights, INDEX_FILE, *target.files, *quantized, *prefix, MANIFEST_FILE)

    def load(self, folder: Path, target: str, *, exact: bool) -> RuntimeModel:
        """See :class:`~backends.base.Backend`. A target that is a library is run there and nowhere
        else; another in a library that reads it the same way, or in torch.
        """
        bundle = _open(folder, target, verify=True)
        return _either(target, lambda: TARGETS[target].run(folder, exact=exact), bundle)

    def load_probed(self, folder: Path, target: str) -> ProbedModel:
        """See :class:`~backends.base.Backend`; where :meth:`load` runs it."""
        bundle = _open(folder, target, verify=True)
        return _either(target, lambda: TARGETS[target].run_probed(folder), bundle)

    def online_block(self, target: str) -> int | None:
        """See :class:`~backends.base.BlocksRotations`."""
        return TARGETS[target].online_block

    def fusion(self, folder: Path, target: str) -> None:
        """Which kernels run is decided by whoever loads the bundle."""

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        """See :class:`~backends.base.Backend`."""
        from backends.safetensors.read import read_linears

        return read_linears(_open(folder, target, verify=True), TARGETS[target].layout())

    def read_cache(self, folder: Path, target: str) -> QuantizedCache | None:
        """See :class:`~backends.base.Backend`."""
        from backends.safetensors.read import read_cache

        return read_cache(_open(folder, target, verify=True), TARGETS[target].layout())

    def read_floats(self, folder: Path, target: str) -> Mapping[str, Tensor]:
        """See :class:`~backends.base.ReadsFloats`."""
        from backends.safetensors.read import read_floats

        return read_floats(_open(folder, target, verify=False), TARGETS[target].layout())

    def contradictions(
        self, folder: Path, target: str, model: QuantizedModel
    ) -> Mapping[str, Sequence[str]]:
        """See :class:`~backends.base.ReadsMetadata`."""
        from backends.safetensors.metadata import contradictions

        return contradictions(_open(folder, target, verify=False), TARGETS[target], model)

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        """See :class:`~backends.base.Backend`; from the headers alone."""
        manifest = _open(folder, target, verify=False).manifest
        return [
            StoredTensor(key, entry.kind, entry.dtype, tuple(entry.shape), entry.nbytes)
            for key, entry in manifest.tensors.items()
        ]

    def libraries(self, target: str) -> Mapping[str, str]:
        """See :class:`~backends.base.NeedsLibraries`."""
        own = TARGETS[target].module
        return {own: HINT} if own == "compressed_tensors" else {}


def _open(folder: Path, target: str, *, verify: bool) -> Bundle:
    from backends.safetensors.read import open_bundle

    return open_bundle(folder, target=target, verify=verify)


def _either(target: str, run: Callable[[], _Running], bundle: Bundle) -> _Running | TorchModel:
    """``bundle`` in the runner of ``target``, or in torch where that is no reader of it."""
    runner = TARGETS[target].runner
    if runner == "own":
        return run()
    if runner == "stand-in":
        with contextlib.suppress(RuntimeMissing):
            return run()
    return _in_torch(bundle)


def _in_torch(bundle: Bundle) -> TorchModel:
    from backends.safetensors.read import read_model
    from backends.torch_model import TorchModel

    target = TARGETS[bundle.manifest.target]
    return TorchModel(read_model(bundle, target.layout()), not_run_in=target.not_run_in)


def _in_one_piece(request: Request) -> Reason | None:
    """Why the quantized experts of this family have no place in a bundle."""
    from backends.safetensors.names import Names

    assert request.config is not None
    parameter = Names.of(request.config).in_one_piece(request.linears)
    if parameter is None:
        return None
    return Reason(
        f"checkpoints of this family hold '{parameter}' in one piece, and a bundle has scales for"
        " single experts alone",
        "leave experts in float: --override '*.experts.*=float', or use --backend onnx",
    )
