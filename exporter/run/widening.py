"""Wider forms for the inputs of the few linears that a static scale hurts most: a scale for each
token, or float where the target has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from calib.quantizing.plan import Quantization
from calib.schemes import LinearScheme, PerToken
from calib.stats.static_noise import static_noise
from exporter.run.destination import Destination

NOISE = (1e-2, 1e-3)
"""Noise over signal of a typical token beyond which a linear is widened, the fewest linears first:
20 and 30 dB. Int8 with limits of 4 standard deviations has 41 dB."""
KEPT_WIDE = "float by choice of the gate: its static scale would drown typical tokens"


def fixes_limits(quantization: Quantization) -> bool:
    """Whether anything that depends on the text is quantized with limits fixed beforehand."""
    return quantization.cache is not None or any(
        scheme.input is not None and scheme.input.needs_calibration
        for scheme in quantization.linears.values()
    )


def wider_sets(
    model: nn.Module, quantization: Quantization, rows: Sequence[Tensor]
) -> list[tuple[str, ...]]:
    """Sets of linears to widen, each larger than the one before.

    Args:
        model: the fused network, its online rotations attached.
        quantization: what is done to its linears.
        rows: calibration rows, int64 ``[tokens]``.
    """
    inputs = {
        name: scheme.input
        for name, scheme in quantization.linears.items()
        if scheme.input is not None
    }
    noise = static_noise(model, inputs, rows)
    sets = [tuple(name for name, lost in noise.items() if lost > level) for level in NOISE]
    return list(dict.fromkeys(each for each in sets if each))


def widened(
    quantization: Quantization, names: Sequence[str], destination: Destination | None
) -> Quantization:
    """``quantization`` with a wider form for the inputs of ``names``.

    Args:
        quantization: what is done to all linears.
        names: those to widen, whose inputs have static scales.
        destination: what must be able to express it, if anything.
    """
    linears = dict(quantization.linears)
    kept = dict(quantization.kept)
    forms: dict[LinearScheme, LinearScheme | None] = {}

    for name in names:
        scheme = linears[name]
        if scheme not in forms:
            forms[scheme] = _wider(scheme, destination)
        wider = forms[scheme]
        if wider is None:
            del linears[name]
            kept[name] = KEPT_WIDE
        else:
            linears[name] = wider
    return replace(quantization, linears=linears, kept=kept)


def _wider(scheme: LinearScheme, destination: Destination | None) -> LinearScheme | None:
    """The first of these that every target can express: a scale for each token, the input in float,
    and (``None``) all of it in float.
    """
    assert scheme.input is not None  # it has a static scale
    per_token = replace(scheme.input, granularity=PerToken(), dynamic=True)
    forms = (replace(scheme, input=per_token), replace(scheme, input=None))
    return next(
        (form for form in forms if destination is None or destination.expresses(form)), None
    )
