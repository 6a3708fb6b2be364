"""What calibration found, from one prepared model to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from calib.errors import CheckpointError
from calib.fake_quant.prepare import fake_quantizers

_MARK = "_fake_quant."
"""What stands, in the name of a parameter, before that of the fake-quantizer's own entry."""


@dataclass(frozen=True)
class Unmatched:
    """A fake-quantizer whose parameters were not loaded.

    Attributes:
        name: its dotted name.
        reason: why.
    """

    name: str
    reason: str


def observer_params(model: nn.Module) -> dict[str, Tensor]:
    """Everything calibration found, by ``<dotted name of the fake-quantizer>.<low | high |
    observer.…>``.

    Dynamic quantizers have found nothing and are left out.

    Raises:
        QuantizationError: the model is not prepared, or a fake-quantizer was never calibrated.
    """
    return {
        f"{name}.{key}": value
        for name, quantizer in fake_quantizers(model)
        if quantizer.calibrated
        for key, value in quantizer.observer_params().items()
    }


def save_observer_params(model: nn.Module, path: Path) -> None:
    """Write :func:`observer_params` as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in observer_params(model).items()}, path)


def load_observer_params(
    source: nn.Module | Mapping[str, Tensor] | Path, model: nn.Module
) -> list[Unmatched]:
    """Load what calibration found into another prepared model, by name.

    Limits are taken over by every kind of fake-quantizer and observer. An observer that gathers the
    same kind of statistics goes on with those; another one starts from the limits as if it had
    observed them.

    Args:
        source: a calibrated model, its :func:`observer_params`, or the file they were saved to.
        model: a prepared model.

    Returns:
        What did not match, from both sides; nothing of it was loaded, and all else was. Empty if
        everything matched.

    Raises:
        QuantizationError: a model is not prepared or was never calibrated, or limits that are no
            range.
        CheckpointError: the file cannot be read.

    Source: the function of the same name in Horizon's plugin ("Calibration v2").
    """
    groups: dict[str, dict[str, Tensor]] = {}
    quantizers = {
        name: quantizer for name, quantizer in fake_quantizers(model) if quantizer.calibrated
    }
    for key, value in _params(source).items():
        head, mark, entry = key.partition(_MARK)
        groups.setdefault(head + mark.removesuffix("."), {})[entry] = value
    unmatched = [
        Unmatched(name, "not in the loaded parameters") for name in quantizers if name not in groups
    ]
    for name, params in groups.items():
        if name not in quantizers:
            unmatched.append(Unmatched(name, "not in the model"))
            continue
        shape = _shape(params)
        expected = list(quantizers[name].limits()[0].shape)
        if shape != expected:
            unmatched.append(Unmatched(name, f"limits of shape {shape} do not fit {expected}"))
            continue
        quantizers[name].load_observer_params(params)

    return unmatched


def _shape(params: Mapping[str, Tensor]) -> list[int] | None:
    """The shape of the limits; ``None`` where they are incomplete."""
    low, high = params.get("low"), params.get("high")
    return None if low is None or high is None or low.shape != high.shape else list(low.shape)


def _params(source: nn.Module | Mapping[str, Tensor] | Path) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return observer_params(source)
    if isinstance(source, Mapping):
        return source
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(source)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read observer parameters from {source}: {error}",
            hint="Save them with save_observer_params.",
        ) from error
