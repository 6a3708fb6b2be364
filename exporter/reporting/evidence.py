"""What the parity check has seen beside its figures: the content of the charts, as part of
``report.json``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="forbid", frozen=True)


LOWEST_LOG2, HIGHEST_LOG2, BINS = -20.0, 20.0, 80
"""Of a histogram of magnitudes: a bin for every half of ``log2 |x|``."""
Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Counts = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=BINS, max_length=BINS)]


class Spread(Frozen):
    """How the values at one place of a model are spread."""

    absmax: Magnitude
    rms: Magnitude
    token_ratio: Magnitude
    """The largest magnitude of a token over that of the median token."""
    channel_ratio: Magnitude
    """The largest magnitude of a channel over that of the median channel."""
    histogram: Counts | None = None
    """Values by ``log2 |x|`` from :data:`LOWEST_LOG2` to :data:`HIGHEST_LOG2`, those beyond in the
    outer bins; ``None`` where it is not among those that are kept."""
    channels: list[Magnitude] = Field(default_factory=list)
    """Largest magnitude of each channel, in their order; of many, of neighbours together; empty as
    above."""


class InputFigures(Frozen):
    """The input of linears, in the float model before and after rotation, on held-out text."""

    name: str
    """Of the first linear that reads it."""
    kind: str
    """That name within its layer."""
    layer: int = Field(ge=0)
    original: Spread | None
    """``None`` where the original has no such module."""
    rotated: Spread


class NoiseFigure(Frozen):
    """What quantization does to one linear, by itself."""

    name: str
    kind: str
    layer: int
    noise: Magnitude
    """Relative L2 of its output: input and weight quantized, against float, on the input that the
    rotated float model gives it."""


class Continuation(Frozen):
    """How one prompt goes on, each token the most likely one."""

    prompt: str
    original: str | None
    """By the float model; ``None`` where it is never whole in memory, and writes nothing."""
    exported: str
    together: int
    """Tokens until they part."""


class Evidence(Frozen):
    """What a parity row has seen beside its figure, for those who want to look."""

    inputs: list[InputFigures] = Field(default_factory=list)
    noise: list[NoiseFigure] = Field(default_factory=list)
    continuations: list[Continuation] = Field(default_factory=list)
    perplexities: tuple[float, float] | None = None
    """Of the float model and of the export, on the rows that were scored."""


def joined(several: Iterable[Evidence]) -> Evidence:
    """That of several rows, as one."""
    seen = list(several)
    return Evidence(
        inputs=[each for own in seen for each in own.inputs],
        noise=[each for own in seen for each in own.noise],
        continuations=[each for own in seen for each in own.continuations],
        perplexities=next((own.perplexities for own in seen if own.perplexities), None),
    )
