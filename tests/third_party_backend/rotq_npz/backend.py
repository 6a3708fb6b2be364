"""The front of the backend. Importing it imports neither torch nor numpy, so that ``rotq backends``
stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import StoredTensor, WriteOptions
from backends.rules import Rule, first_reason, tensor_schemes

if TYPE_CHECKING:
    from backends.torch_model import TorchModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel
    from calib.schemes import LinearScheme, TensorScheme

RULES = (
    Rule(
        lambda scheme: any(part.format.kind == "float" for part in tensor_schemes(scheme)),
        "numpy has no float8",
    ),
    Rule(
        lambda scheme: any(not part.symmetric for part in tensor_schemes(scheme)),
        "this format has no zero points",
    ),
)


class NpzBackend:
    """Writes ``model.npz`` and ``model.json``."""

    name = "npz"
    targets = ("numpy",)

    def refusal(self, scheme: LinearScheme, target: str) -> str | None:
        return first_reason(RULES, scheme)

    def warning(self, scheme: LinearScheme, target: str) -> str | None:
        return None

    def cache_refusal(self, scheme: TensorScheme, target: str) -> str | None:
        return "the file has no place for it"

    def rotation_refusal(self, kind: str, target: str) -> str | None:
        return None

    def logits_refusal(self, target: str) -> str | None:
        return "a file of arrays computes no logits"

    def kv_buffer_refusal(self, target: str) -> str | None:
        return "a file of arrays keeps no keys and values"

    def model_refusal(
        self, config: Mapping[str, Any], linears: Mapping[str, LinearScheme], target: str
    ) -> tuple[str, str] | None:
        return None

    def compute_dtype(self, target: str) -> str:
        return "float32"

    def files(
        self, options: WriteOptions, linears: Mapping[str, LinearScheme], nbytes: int
    ) -> Sequence[str]:
        return ("model.npz", "model.json")

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        from rotq_npz.files import write

        write(model, folder)

    def load(self, folder: Path, target: str, *, exact: bool) -> TorchModel:
        from backends.torch_model import TorchModel
        from rotq_npz.files import read

        return TorchModel(read(folder))

    def load_probed(self, folder: Path, target: str) -> TorchModel:
        return self.load(folder, target, exact=True)

    def fusion(self, folder: Path, target: str) -> None:
        return None

    def read_linears(self, folder: Path, target: str) -> Mapping[str, QuantizedLinear]:
        from rotq_npz.files import read

        return read(folder).linears

    def read_cache(self, folder: Path, target: str) -> QuantizedCache | None:
        return None

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        from rotq_npz.files import contents

        return contents(folder)
