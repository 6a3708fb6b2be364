"""The front of the backend. Importing it imports neither torch nor numpy, so that ``rotq backends``
stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import Reason, Request, StoredTensor, WriteOptions
from backends.rules import Limits, Rule, first_reason, tensor_schemes

if TYPE_CHECKING:
    from torch import Tensor

    from backends.torch_model import TorchModel
    from calib.artifact import QuantizedCache, QuantizedLinear, QuantizedModel

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
LIMITS = Limits(
    linear=partial(first_reason, RULES),
    cache=lambda scheme: "the file has no place for it",
    options={
        "logits": "a file of arrays computes no logits",
        "kv_buffer": "a file of arrays keeps no keys and values",
    },
)


class NpzBackend:
    """Writes ``model.npz`` and ``model.json``."""

    name = "npz"
    targets = ("numpy",)
    contract = 2  # of backends.base, as a number: what this file was written for

    def refusals(self, request: Request) -> list[Reason]:
        return LIMITS.reasons(request)

    def compute_dtype(self, target: str) -> str:
        return "float32"

    def write(self, model: QuantizedModel, folder: Path, options: WriteOptions) -> None:
        from rotq_npz.files import write

        write(model, folder)

    def files(self, request: Request, nbytes: int) -> Sequence[str]:
        return ("model.npz", "model.json")

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

    def read_floats(self, folder: Path, target: str) -> Mapping[str, Tensor]:
        from rotq_npz.files import read

        return read(folder).floats

    def contents(self, folder: Path, target: str) -> Sequence[StoredTensor]:
        from rotq_npz.files import contents

        return contents(folder)
