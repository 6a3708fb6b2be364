"""The safetensors backend's front: a :class:`~backends.base.Backend` that loads its heavy parts
when they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import RuntimeMissing, RuntimeModel, StoredTensor, WriteOptions
from backends.safetensors.file_names import INDEX_FILE, MANIFEST_FILE, MAX_SHARD_BYTES
from backends.safetensors.targets import TARGETS

if TYPE_CHECKING:
    from backends.safetensors.read import Bundle
    from backends.torch_model import TorchModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme


class SafetensorsBackend:
    """Writes bundles of weights and scales under a target's own keys, and reads them back."""

    name = "safetensors"
    targets = tuple(TARGETS)

    def refusal(self, scheme: LinearScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].refusal(scheme)

    def warning(self, scheme: LinearScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].warning(scheme)

    def cache_refusal(self, scheme: TensorScheme, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].cache_refusal(scheme)

    def rotation_refusal(self, kind: str, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].rotation_refusal(kind)

    def logits_refusal(self, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return "a bundle holds weights; which logits are computed is up to whoever loads it"

    def kv_buffer_refusal(self, target: str) -> str | None:
        """See :class:`~backends.base.Backend`."""
        return "a bundle holds weights; how a cache is kept is up to whoever loads it"

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme], target: str
    ) -> tuple[str, str] | None:
        """See :class:`~backends.base.Backend`."""
        return TARGETS[target].layout().model_refusal(config, linears)

    def compute_dtype(self, target: str) -> None:
        """The checkpoint's own: a bundle holds weights, and whoever loads it computes."""

    def files(
        self, options: WriteOptions, linears: Mapping[str, LinearScheme], nbytes: int
    ) -> Sequence[str]:
        """See :class:`~backends.base.Backend`."""
        target = TARGETS[options.target]
        limit = options.max_shard_bytes or MAX_SHARD_BYTES
        weights = "model.safetensors" if nbytes <= limit else "model-*-of-*.safetensors"
        quantized = target.quantized_files if linears else ()
        return (weights, INDEX_FILE, *target.files, *quantized, MANIFEST_FILE)

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        """See :class:`~backends.base.Backend`."""
        from backends.safetensors.bundle import write_bundle

        write_bundle(model, TARGETS[options.target].layout(), folder, options)

    def load(self, folder: Path, target: str, *, exact: bool) -> RuntimeModel:
        """See :class:`~backends.base.Backend`. Without a library of the target's own that can run
        it: in torch.
        """
        bundle = _open(folder, target, verify=True)
        if TARGETS[target].has_runner:
            with contextlib.suppress(RuntimeMissing):
                return TARGETS[target].run(folder, exact=exact)
        return _in_torch(bundle)

    def load_probed(self, folder: Path, target: str) -> TorchModel:
        """See :class:`~backends.base.Backend`; always in torch."""
        return _in_torch(_open(folder, target, verify=True))

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

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        """See :class:`~backends.base.Backend`; from the headers alone."""
        manifest = _open(folder, target, verify=False).manifest
        return [
            StoredTensor(key, entry.kind, entry.dtype, tuple(entry.shape), entry.nbytes)
            for key, entry in manifest.tensors.items()
        ]


def _open(folder: Path, target: str, *, verify: bool) -> Bundle:
    from backends.safetensors.read import open_bundle

    return open_bundle(folder, target=target, verify=verify)


def _in_torch(bundle: Bundle) -> TorchModel:
    from backends.safetensors.read import read_model
    from backends.torch_model import TorchModel

    return TorchModel(read_model(bundle, TARGETS[bundle.manifest.target].layout()))
