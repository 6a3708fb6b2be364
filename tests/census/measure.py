"""One type: exported to ONNX and held against transformers, in every way a model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from backends.base import RuntimeModel, WriteOptions
from backends.onnx.backend import OnnxBackend
from calib.architectures import Wiring, wiring_for
from calib.artifact import QuantizedModel
from calib.errors import RotqError
from calib.fusing import check_contents, fuse
from calib.network.checkpoint import open_checkpoint
from calib.network.layout import StockTensors
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.rotations.rotation_set import RotationSet
from calib.schemes import scheme_named
from tests.census.configs import VOCABULARY, seeded_model, tiny_config
from tests.tiny import PROVENANCE, relative_l2

LENGTHS = (20, 13, 9)
"""Of the rows; longer than a window, and the shorter ones padded on the left."""
PREFILL = 14
"""Tokens before the others follow one by one, or in a second chunk."""
SCHEMES = ("float", "int8-weight-only")
WAYS = ("prefill", "decode", "padded", "chunks")


@dataclass(frozen=True)
class Row:
    """What the census says of a type.

    Attributes:
        name: of the type.
        how: ``table``, ``generic`` or ``refused``.
        reason: of a refusal.
        errors: relative L2 of logits, by scheme and way.
        kept: what stays in float and does not have to, by reason.
    """

    name: str
    how: str
    reason: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest error."""
        return max((max(own.values()) for own in self.errors.values()), default=0.0)


def measured(name: str, folder: Path) -> Row:
    """Export the tiny model of type ``name`` and run it."""
    transformers.utils.logging.disable_progress_bar()
    config = tiny_config(name)
    try:
        wiring = wiring_for(config)
        model = seeded_model(config)
        model.save_pretrained(folder / "checkpoint")
        errors = {}
        for scheme in SCHEMES:
            quantized = _quantized(wiring, folder / "checkpoint", scheme)
            reason = OnnxBackend().refusals(_request(quantized))
            if reason:
                return Row(name, "refused", reason[0].reason)
            out = folder / scheme
            out.mkdir()
            OnnxBackend().write(quantized, out, WriteOptions("ort"))
            runtime = OnnxBackend().load(out, "ort", exact=True)
            with _holding(model, quantized, wiring):
                errors[scheme] = compared(runtime, model)
        return Row(
            name, wiring.architecture.how, errors=errors, kept=dict(wiring.architecture.kept)
        )
    except RotqError as error:
        return Row(name, "refused", error.message)


def _request(quantized: QuantizedModel) -> Any:
    from backends.base import Request

    return Request("ort", linears=quantized.schemes(), config=quantized.config)


def _quantized(wiring: Wiring, folder: Path, scheme: str) -> QuantizedModel:
    checkpoint = open_checkpoint(folder)
    check_contents(checkpoint, wiring, wiring.family)
    fused = fuse(checkpoint, wiring, RotationSet(), dtype=torch.float32, fold_norms=False)
    return quantize_model(fused, resolve(scheme_named(scheme), wiring), None, PROVENANCE)


@contextmanager
def _holding(model: Any, quantized: QuantizedModel, wiring: Wiring) -> Iterator[None]:
    """Inside, ``model`` has the weights that ``quantized`` stands for."""
    values = {f"{name}.weight": linear.values() for name, linear in quantized.linears.items()}
    for parameter in wiring.expert_parameters:
        if f"{parameter}.0" in quantized.linears:
            experts = range(wiring.experts)
            values[parameter] = torch.stack(
                [values.pop(f"{parameter}.{expert}.weight") for expert in experts]
            )
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(StockTensors(values, wiring), strict=False)
    try:
        yield
    finally:
        model.load_state_dict(own)


def compared(runtime: RuntimeModel, model: Any) -> dict[str, float]:
    """Relative L2 of logits by way."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    longest = max(LENGTHS)
    ids = torch.stack([pad(row, (longest - row.numel(), 0)) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (longest - row.numel(), 0)) for row in rows])
    one, full = ids[:1], mask[:1]
    ways: dict[str, tuple[Tensor, Tensor, list[slice]]] = {
        "prefill": (one, full, [slice(0, longest)]),
        "decode": (one, full, [slice(0, PREFILL), *_each(PREFILL, longest)]),
        "padded": (ids, mask, [slice(0, longest)]),
        "chunks": (ids, mask, [slice(0, PREFILL), slice(PREFILL, longest)]),
    }
    errors = {}
    for way, (tokens, seen, parts) in ways.items():
        real = seen.bool()
        found = _stepped(_in_runtime(runtime), tokens, seen, parts)
        wanted = _stepped(_in_transformers(model), tokens, seen, parts)
        errors[way] = relative_l2(found[real], wanted[real])
    return errors


def _each(start: int, stop: int) -> list[slice]:
    return [slice(step, step + 1) for step in range(start, stop)]


Step = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]


def _stepped(run: Step, ids: Tensor, mask: Tensor, parts: list[slice]) -> Tensor:
    positions, cache, logits = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for part in parts:
        found, cache = run(ids[:, part], mask[:, : part.stop], positions[:, part], cache)
        logits.append(found)
    return torch.cat(logits, dim=1)


def _in_runtime(runtime: RuntimeModel) -> Step:
    return lambda ids, mask, positions, cache: runtime.forward(ids, mask, positions, cache)


def _in_transformers(model: Any) -> Step:
    import inspect

    taken = inspect.signature(model.forward).parameters

    def run(ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        given = {"position_ids": positions} if "position_ids" in taken else {}
        with torch.no_grad():
            output = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given
            )
        return output.logits, output.past_key_values

    return run
