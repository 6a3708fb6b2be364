"""The options that commands share, in groups.

A field left at ``None`` (or ``False``) was not given: the recipe decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

MODEL = "Model"
QUANTIZATION = "Quantization"
DATA = "Calibration and evaluation text"
ROTATION = "Rotation"
RUN = "Run"
OUTPUT = "Output"
DANGEROUS = "Dangerous"


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how it is loaded."""

    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Hub id or folder. Not given: the embedded example model.",
            rich_help_panel=MODEL,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL),
    ] = None
    device: Annotated[
        str | None,
        typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"] | None,
        typer.Option(
            "--dtype",
            help="What the target computes in; auto: the backend's.",
            rich_help_panel=MODEL,
        ),
    ] = None
    ignore_unused: Annotated[
        bool,
        typer.Option(
            "--ignore-unused",
            help="Go on without tensors that the config does not call for.",
            rich_help_panel=MODEL,
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with the model.",
            rich_help_panel=DANGEROUS,
        ),
    ] = False


@dataclass(frozen=True)
class SchemeFlag:
    """What the linears become."""

    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", help="Quantization scheme, for example int8.", rich_help_panel=QUANTIZATION
        ),
    ] = None


@dataclass(frozen=True)
class QuantizationFlags:
    """Finer control over what is quantized, and how it is calibrated; the recipe has the rest."""

    kv: Annotated[
        Literal["int8", "int4", "float8"] | None,
        typer.Option("--kv", help="Quantize the KV cache.", rich_help_panel=QUANTIZATION),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="PATTERN=SCHEME (or =float) for the linears that match. Repeatable.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            help="Input features that share a weight scale.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    weight_algorithm: Annotated[
        str | None,
        typer.Option(
            "--weight-algorithm",
            help="rtn, mse, gptq or adaround.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    observer: Annotated[
        str | None,
        typer.Option(
            "--observer",
            help="Limits of activations: min_max, percentile:99.9, mse, ...",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    smoothing: Annotated[
        str | None,
        typer.Option(
            "--smoothing",
            help="none, smoothquant:auto, :ALPHA, or awq.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    overrides: Annotated[
        Literal["auto", "none"] | None,
        typer.Option(
            "--overrides",
            help="auto: wider inputs for the linears that hurt most, where it takes that.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            help="Tokens before every sequence, part of the model: auto, none or how many.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise",
            help="Calibrate block by block; memory of one block.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = False
    asym: Annotated[
        bool,
        typer.Option(
            "--asym",
            help="With --layerwise: calibrate on the quantized linears' outputs.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = False
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="With --layerwise: activations beyond this go to disk.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None


@dataclass(frozen=True)
class BackendFlags:
    """What is written."""

    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", help="What to write: see 'rotq backends'.", rich_help_panel=QUANTIZATION
        ),
    ] = None
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=(
                "Runtime it is for; default: the backend's first. Repeatable: a folder of -o each."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None


@dataclass(frozen=True)
class WritingFlags:
    """How it is written."""

    logits: Annotated[
        Literal["all", "last"] | None,
        typer.Option(
            "--logits",
            help="Of every token, or of the last one: enough to generate.",
            rich_help_panel=RUN,
        ),
    ] = None
    kv_buffer: Annotated[
        Literal["grown", "shared"] | None,
        typer.Option(
            "--kv-buffer",
            help=(
                "Keys and values: grown by each run, or written into one buffer that goes in and"
                " out."
            ),
            rich_help_panel=RUN,
        ),
    ] = None
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            help="Split files of weights beyond this: 5GB, 500MiB.",
            rich_help_panel=RUN,
        ),
    ] = None


@dataclass(frozen=True)
class DataFlags:
    """Which text the statistics see."""

    calib_dataset: Annotated[
        str | None,
        typer.Option(
            "--calib-dataset", help="Hub name or .txt/.jsonl/.parquet file.", rich_help_panel=DATA
        ),
    ] = None
    calib_column: Annotated[
        str | None,
        typer.Option(
            "--calib-column",
            help="Field with the text or messages; default: text, else messages.",
            rich_help_panel=DATA,
        ),
    ] = None
    calib_layout: Annotated[
        Literal["auto", "documents", "windows"] | None,
        typer.Option(
            "--calib-layout",
            help="A row is a document, or a window of joined text; auto: by their lengths.",
            rich_help_panel=DATA,
        ),
    ] = None
    nsamples: Annotated[
        int | None, typer.Option("--nsamples", help="Calibration rows.", rich_help_panel=DATA)
    ] = None
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens a row is cut at.", rich_help_panel=DATA)
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Rows in one forward pass.", rich_help_panel=DATA),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of sampling and of random starts.", rich_help_panel=DATA),
    ] = None


@dataclass(frozen=True)
class EvalDataFlag:
    """Which text parity is measured on."""

    eval_dataset: Annotated[
        str | None,
        typer.Option(
            "--eval-dataset",
            help="As --calib-dataset; default: rows held back.",
            rich_help_panel=DATA,
        ),
    ] = None
    eval_column: Annotated[
        str | None,
        typer.Option(
            "--eval-column", help="As --calib-column, for --eval-dataset.", rich_help_panel=DATA
        ),
    ] = None


@dataclass(frozen=True)
class RotationFlags:
    """Which rotations, and how they are trained; the recipe has the other hyper-parameters."""

    rotate: Annotated[
        str | None,
        typer.Option(
            "--rotate", help="auto, none, or some of r1,r2,r3,r4.", rich_help_panel=ROTATION
        ),
    ] = None
    rotations: Annotated[
        list[Path] | None,
        typer.Option(
            "--rotations",
            help=(
                "Use these instead of training: a rotq folder, r1.pt and r2.pt, or R.bin."
                " Repeatable."
            ),
            rich_help_panel=ROTATION,
        ),
    ] = None
    rotation_optimizer: Annotated[
        Literal["monotone", "qr", "riemannian-ns", "riemannian-cayley"] | None,
        typer.Option(
            "--rotation-optimizer",
            help="qr: the DartQuant reference's; monotone has no learning rate.",
            rich_help_panel=ROTATION,
        ),
    ] = None
    r1_lr: Annotated[
        float | None, typer.Option("--r1-lr", help="Learning rate of R1.", rich_help_panel=ROTATION)
    ] = None
    r1_epochs: Annotated[
        int | None, typer.Option("--r1-epochs", help="Epochs of R1.", rich_help_panel=ROTATION)
    ] = None
    r2_lr: Annotated[
        float | None, typer.Option("--r2-lr", help="Learning rate of R2.", rich_help_panel=ROTATION)
    ] = None
    r2_epochs: Annotated[
        int | None, typer.Option("--r2-epochs", help="Epochs of R2.", rich_help_panel=ROTATION)
    ] = None


@dataclass(frozen=True)
class RecipeFlag:
    """Where settings come from that no option gives."""

    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="YAML file or the name of a preset.", rich_help_panel=RUN),
    ] = None


@dataclass(frozen=True)
class ResumeFlags:
    """Work that need not be done again."""

    from_capture: Annotated[
        Path | None,
        typer.Option(
            "--from-capture", help="Folder of 'rotq capture': skips that step.", rich_help_panel=RUN
        ),
    ] = None
    work_dir: Annotated[
        Path | None,
        typer.Option("--work-dir", help="Keep intermediate results here.", rich_help_panel=RUN),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from what --work-dir holds.", rich_help_panel=RUN),
    ] = False


@dataclass(frozen=True)
class OutputFlags:
    """Where the result goes."""

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to create (required, except with --dry-run).",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a folder that rotq wrote.", rich_help_panel=OUTPUT
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print plan, sizes and recipe; do nothing.", rich_help_panel=OUTPUT
        ),
    ] = False


@dataclass(frozen=True)
class TalkFlags:
    """How much is said."""

    json_output: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document to stdout.", rich_help_panel=OUTPUT),
    ] = False
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="Show logs and warnings of all libraries.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quiet",
            help="No settings, bars or tables; errors only.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
