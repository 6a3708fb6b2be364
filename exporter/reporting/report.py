"""What a run found, as data: the content of ``report.json`` and of the summary that the console
prints.

Pure data and arithmetic-free: the pipeline fills it, :mod:`exporter.console` and
:mod:`exporter.reporting.card` show it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from calib.files.reading import read_json
from calib.files.sealed import seal_of
from exporter.output import replace_text
from exporter.reporting.evidence import Evidence, Frozen, joined

REPORT_FILE = "report.json"
ROTATE_REPORT_FILE = "rotation_report.json"
CARD_FILE = "README.md"
PAGE_FILE = "report.html"
SMOOTHING_FILE = "smoothing.safetensors"
"""The scales that smoothing folded into the weights."""
REPORT_FORMAT_VERSION = 1
COMPARED_ROWS = 8
"""Rows on which ``rotq rotate`` compares the folder it wrote with the original."""
PROOF_TOKENS, PROOF_ROWS = 2048, 4
"""How much rungs 1 and 2 run at least: an error of arithmetic is in every row, and whole rows are
compared, not means of many. What they would miss is a token or an expert that only other rows
reach; numbers of these are compared one by one in rung 0, and rows of embeddings in rung 1. What
only some text shows is rung 3's, which goes on until its figures are beyond doubt."""

_SEAL = "sha256"

Status = Literal["passed", "failed", "unverified"]


class GateRow(Frozen):
    """One candidate of ``--rotate auto``: quality of the quantized model on held-out tokens against
    the float model.
    """

    rotate: str
    """Rotations fused or online in this candidate, as ``--rotate`` takes them (``none``, ``r1,r2``,
    ``r1,r2,r4``); with ``, Hadamard`` where random Hadamard matrices stand in for trained ones."""
    norms_kept: bool = False
    """Whether norms keep their gains although the scheme would have them folded."""
    smoothing: str = "none"
    """What smooths this candidate although the recipe asks for nothing."""
    prefix: int = 0
    """Tokens before every sequence in this candidate."""
    wider: int = 0
    """Linears whose input has a wider form than the scheme's."""
    kl: float | None = None
    """Mean KL(float || quantized) per token, in nats; ``None``, as the next two, where a simpler
    candidate was close enough."""
    top1: float | None = None
    """Share of tokens whose most likely next token is the same, 0 to 1."""
    perplexity: float | None = None
    row_kls: list[float] = Field(default_factory=list)
    """``kl`` of each held-out row; empty, as the next, where it was not tried, and in reports of
    versions that did not keep them."""
    row_tokens: list[int] = Field(default_factory=list)
    """Tokens scored in each row."""
    margin: float | None = None
    """``kl`` above that of the candidate with the lowest one."""
    margin_low: float | None = None
    """Ends of the 95 % interval of ``margin``, from the differences row by row: where it reaches
    zero, nothing says that the other candidate is better."""
    margin_high: float | None = None
    chosen: bool = False

    @property
    def name(self) -> str:
        """The candidate in words."""
        words = [self.rotate]
        words += ["norms kept"] if self.norms_kept else []
        words += [self.smoothing] if self.smoothing != "none" else []
        words += ["prefix"] if self.prefix else []
        words += [f"{self.wider} wider"] if self.wider else []
        return " + ".join(words)


class RotationGateRow(Frozen):
    """One candidate of one rotation: the error that the exported quantizer makes on what it
    rotates.
    """

    rotation: str
    """``R1``, or ``R2`` for those of all layers."""
    candidate: str
    """``identity``, ``hadamard``, ``pca-hadamard`` or ``trained``."""
    error: float
    """Relative squared error; for R2 the mean over layers."""
    layers: list[float] = Field(default_factory=list)
    """The error of every layer; empty for R1."""
    margin: float | None = None
    """``error`` above the lowest one; ``None``, as the next two, in reports of versions that did
    not say."""
    margin_low: float | None = None
    """Ends of the 95 % interval of ``margin``, from the differences token by token and row by
    row."""
    margin_high: float | None = None
    measure: str
    """What was quantized, and how."""
    chosen: bool = False
    note: str = ""
    """What else there is to say of it: that training was stopped, as it would not have won."""


class TrainingSummary(Frozen):
    """How the training of one rotation went, whether it was taken or not."""

    rotation: str
    """``R1``, or ``R2`` for those of all layers."""
    objective: str
    losses: list[float]
    """Before each step, and last that of the rotation that training gave."""
    held_out_errors: list[float]
    """Relative squared quantization error of held-out tokens, at the start and after each epoch;
    empty where nothing was measured."""
    note: str = ""


Rung = Literal[0, 1, 2, 3]
"""0: the files, 1: the fold, 2: the runtime, 3: quality."""


class ParityRow(Frozen):
    """One figure of the parity check and the bound it is held to."""

    rung: Rung
    name: str
    """What was compared, in a few words."""
    metric: str
    """``relative L2``, ``KL``, ``top-1 agreement``, ``perplexity ratio``, ``tokens until they
    part``, ``repeated 4-grams, difference``, ``unfused``, ``altered``, ``steps``,
    ``of the largest of its row``, ``relative length``, ``share of ranges that do not fit`` or
    ``share of values clipped``."""
    measured: float | None
    """``None`` where the row could not be run; ``note`` then says why."""
    bound: float | None
    """``None``: reported only, not judged."""
    passed: bool | None
    note: str = ""
    runtime: str = ""
    """What ran the export, as its backend calls it; empty where torch alone ran, and where nothing
    did.
    """
    not_run_in: str = ""
    """Runtimes that the export is for and that did not run it, in words: :attr:`runtime` stood in
    for them."""
    session: dict[str, str] = Field(default_factory=dict)
    """Settings of the session that ran it, as it reported them; empty where it reports none."""
    evidence: Evidence | None = None


class KeptLayer(Frozen):
    """A linear left in float."""

    name: str
    reason: str


class ModelSummary(Frozen):
    """What went in."""

    source: str
    """Folder or hub id as given, or ``embedded``."""
    model_type: str
    how: Literal["table", "generic"] = "table"
    """Where it is known from how the model is wired: the table of families, or nowhere; versions
    that did not say took those of the table alone."""
    parameters: int
    fingerprint: str
    """SHA-256 over the names, shapes, dtypes and bytes of the source weights."""
    quantized: str | None = None
    """How the source was quantized, whose weights were read as floats; ``None``: it was float."""


class LayerSummary(Frozen):
    """What was quantized and how large it became."""

    quantized: int
    schemes: dict[str, int] = Field(default_factory=dict)
    """How many linears are quantized how, in words."""
    cache: str | None = None
    """Number format of the KV cache; ``None``: float."""
    kept: list[KeptLayer]
    bytes_before: int
    """Bytes of all source weights in the checkpoint's own dtype."""
    bytes_after: int
    """Bytes of all weights, scales and biases in the exported folder."""


class CalibrationSummary(Frozen):
    """Which tokens the statistics saw."""

    dataset: str
    rows: int
    tokens: int
    channels: int | None = None
    """Input channels of the widest quantized linear; ``None`` where nothing was quantized, and in
    reports of versions that did not say."""
    observer: str = "min_max"
    """What turned activations into limits."""
    weights: str = "rtn"
    """What rounded weights."""
    smoothing: str = "none"
    """What moved outliers from activations into weights."""
    sha256: str
    """Over the token ids, in order."""
    cpu: str = ""
    """What it was calibrated on; empty, as ``threads`` is ``None``, in reports of versions that did
    not say. Other sums of floats are rounded otherwise."""
    threads: int | None = None
    """Threads that torch computed with."""


class PrefixSummary(Frozen):
    """The tokens that stand before every sequence, as part of the model."""

    tokens: list[int]
    """Their ids."""
    words: list[str] = Field(default_factory=list)
    """What the tokenizer makes of each; empty where none was at hand."""
    reason: str = ""


class MassiveSummary(Frozen):
    """How far the largest token is from the median one, at the input of a linear."""

    name: str
    """Of the first linear that reads this input."""
    ratio: float
    """The largest magnitude of a token over the median of all tokens', in the float model."""
    with_prefix: float | None = None
    """The same with the prefix in place; ``None`` where there is none."""


class RotationSummary(Frozen):
    """One rotation of the result: what it acts on, whether a user meets it at run time, and how it
    was chosen.
    """

    name: str
    space: str
    order: int
    online: bool
    origin: str


class Remedy(Frozen):
    """A change of the recipe that would most likely mend a parity figure that missed its bound."""

    name: str
    """In a few words, as a folder may be called."""
    change: dict[str, Any]
    """Recipe values, by dotted key."""
    why: str
    """What speaks for it in this run, and what it costs."""
    expected: str = ""
    """What to expect of the figure; empty where nothing is known."""
    expected_ratio: float | None = None
    """The perplexity ratio to expect, where that is what was missed."""
    seconds: float | None = None
    """About how long a run with it takes, from what this one took; ``None`` where nothing says."""


class Report(Frozen):
    """Everything a later reader needs to judge, repeat or compare a run."""

    format_version: int = REPORT_FORMAT_VERSION
    status: Status
    backend: str
    target: str
    scheme: str
    rotate: str
    dtype: str = ""
    """What the target computes in; empty in reports of versions that did not say."""
    norms_folded: bool = True
    """Whether the norms were folded into the weights, as versions that did not say always did."""
    warnings: list[str] = Field(default_factory=list)
    """What the target expresses, but runs slower than the scheme promises."""
    model: ModelSummary
    layers: LayerSummary
    calibration: CalibrationSummary
    rotations: list[RotationSummary]
    prefix: PrefixSummary | None = None
    massive: list[MassiveSummary] = Field(default_factory=list)
    """Inputs with massive tokens, the largest first; empty where none are, or nothing looked."""
    gate: list[GateRow]
    rotation_gate: list[RotationGateRow] = Field(default_factory=list)
    training: list[TrainingSummary] = Field(default_factory=list)
    """Empty where nothing was trained, and in reports of versions that did not keep it."""
    parity: list[ParityRow]
    remedies: list[Remedy] = Field(default_factory=list)
    """What would most likely mend what failed, the most promising first; empty where nothing
    failed."""
    seconds: dict[str, float]
    """Wall-clock seconds by stage."""
    cpu_seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds of all processors by stage; empty in reports of versions that did not say."""
    peak_bytes: dict[str, int] = Field(default_factory=dict)
    """The most memory that was resident, by stage; empty where nothing says so."""
    versions: dict[str, str]
    cpu: str = ""
    """What the parity check ran on; empty in reports of versions that did not say."""
    stored: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the numbers of every quantized linear, of the cache and of float tensors, by name;
    empty in reports of versions that did not keep them."""
    checksums: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every other file in the folder, by relative path."""

    def __repr__(self) -> str:
        return f"Report({self.status}, {self.scheme} for {self.backend}/{self.target})"

    @property
    def not_run_in(self) -> str:
        """Runtimes that the export is for and that nothing was run in, in words; empty: there are
        none, or nothing was run at all."""
        return next((row.not_run_in for row in self.parity if row.not_run_in), "")

    @property
    def evidence(self) -> Evidence:
        """All that the rows of the parity check have seen beside their figures."""
        return joined(row.evidence for row in self.parity if row.evidence is not None)

    @property
    def export_sha256(self) -> str:
        """One SHA-256 over the whole export: over the paths and the SHA-256 of all files in
        :attr:`checksums` but the card, which a later check writes anew, as this report.
        """
        return seal_of({name: own for name, own in self.checksums.items() if name != CARD_FILE})

    def save(self, folder: Path) -> None:
        """Write ``report.json`` into ``folder``, in place of one that is there, with a SHA-256 over
        everything else in it.
        """
        values = self.model_dump(mode="json")
        text = json.dumps({**values, _SEAL: seal_of(values)}, indent=2, allow_nan=False)
        replace_text(folder / REPORT_FILE, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Read ``report.json`` from ``folder``.

        Raises:
            OSError, ValueError: it cannot be read, or is not as it was written; left to the caller,
                who knows what the folder should be.
        """
        values = read_json(folder / REPORT_FILE)
        seal = values.pop(_SEAL, None)  # versions before this had none
        report = cls.model_validate(values)
        if seal is not None and seal != seal_of(values):
            raise ValueError("its checksum does not fit: it is damaged or was edited")
        return report


class RotateReport(Frozen):
    """What ``rotq rotate`` found: how the rotations were chosen, and that the folder computes what
    the source does.
    """

    format_version: int = REPORT_FORMAT_VERSION
    model: ModelSummary
    dtype: str
    """Dtype of the written weights."""
    scheme: str
    """The scheme that the rotations were chosen for; nothing is quantized."""
    rotate: str
    rotations: list[RotationSummary]
    rotation_gate: list[RotationGateRow]
    parity: list[ParityRow]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float] = Field(default_factory=dict)
    peak_bytes: dict[str, int] = Field(default_factory=dict)
    versions: dict[str, str]
    cpu: str = ""
    """As :attr:`CalibrationSummary.cpu`, and so are the threads."""
    threads: int | None = None

    def save(self, folder: Path) -> None:
        """Write ``rotation_report.json`` into ``folder``: its model is a checkpoint, not an
        export.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False)
        (folder / ROTATE_REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def parity_status(rows: list[ParityRow]) -> Status:
    """``failed`` if a judged row failed; ``passed`` if, beside, the runtime's own logits were
    judged; else ``unverified``: that torch agrees with torch says nothing of a runtime that was not
    run.
    """
    if any(row.passed is False for row in rows):
        return "failed"
    ran = any(
        row.passed is not None and row.rung == 2 and row.metric == "relative L2" for row in rows
    )
    return "passed" if ran else "unverified"
