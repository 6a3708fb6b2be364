"""The options that decide numbers (scheme, quantization, rotations, text), in groups that commands
share.

A field left at ``None`` (or ``False``) was not given: the recipe decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from calib.schemes import SCHEMES
from calib.weights.algorithms import ALGORITHMS
from exporter.cli.options import DATA, QUANTIZATION, ROTATION

DEFAULT_SCHEME, DEFAULT_ALGORITHM = "int8", "rtn"


@dataclass(frozen=True)
class SchemeFlag:
    """What the linears become."""

    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help=(f"One of {', '.join(SCHEMES)}; default: {DEFAULT_SCHEME}."),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None


@dataclass(frozen=True)
class QuantizationFlags:
    """Finer control over what is quantized, and how it is calibrated; the recipe has the rest."""

    kv: Annotated[
        Literal["int8", "int4", "float8"] | None,
        typer.Option(
            "--kv", help="Quantize the KV cache; default: float.", rich_help_panel=QUANTIZATION
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN=SCHEME",
            help=(
                "Another scheme, or float, for the linears whose names match. Repeatable; "
                "not --overrides."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            metavar="N",
            help=(
                "Input features that share a weight scale; default: the scheme's (0), in an "
                "export by int4-weight-only 64, or 32 for narrow models."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    weight_algorithm: Annotated[
        str | None,
        typer.Option(
            "--weight-algorithm",
            metavar="NAME",
            help=(
                f"One of {', '.join(ALGORITHMS)}; default: {DEFAULT_ALGORITHM}; "
                "gptq for int4-weight-only."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    observer: Annotated[
        str | None,
        typer.Option(
            "--observer",
            metavar="NAME",
            help=(
                "Limits of activations: min_max, percentile:99.9, entropy, mse, ...; "
                "default: min_max."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    smoothing: Annotated[
        str | None,
        typer.Option(
            "--smoothing",
            metavar="NAME",
            help="none, smoothquant:auto, smoothquant:ALPHA or awq; default: none.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    overrides: Annotated[
        Literal["auto", "none"] | None,
        typer.Option(
            "--overrides",
            help=(
                "auto: the gate may give the linears that hurt most wider inputs; default: "
                "auto. Not --override."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            metavar="auto|none|N",
            help=(
                "Tokens before every sequence, part of the model; default: auto, those that help."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise",
            help="Calibrate block by block, with one block in memory.",
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
            metavar="SIZE",
            help=("With --layerwise: activations beyond this go to disk; default: 2GB."),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None


@dataclass(frozen=True)
class RotationFlags:
    """Which rotations, and how they are trained; the recipe has the other hyper-parameters."""

    rotate: Annotated[
        str | None,
        typer.Option(
            "--rotate",
            metavar="KINDS",
            help=("auto, none, or some of r1,r2,r3,r4; default: auto, the best on held-out rows."),
            rich_help_panel=ROTATION,
        ),
    ] = None
    rotations: Annotated[
        list[Path] | None,
        typer.Option(
            "--rotations",
            metavar="PATH",
            help=(
                "Use these instead of training: a rotq folder, r1.pt and r2.pt, or R.bin. "
                "Repeatable."
            ),
            rich_help_panel=ROTATION,
        ),
    ] = None
    rotation_optimizer: Annotated[
        Literal["monotone", "qr", "riemannian-ns", "riemannian-cayley"] | None,
        typer.Option(
            "--rotation-optimizer",
            help=("qr: the DartQuant reference's; default: monotone, which has no learning rate."),
            rich_help_panel=ROTATION,
        ),
    ] = None
    r1_lr: Annotated[
        float | None,
        typer.Option(
            "--r1-lr",
            metavar="RATE",
            help="Learning rate of R1; default: the optimizer's.",
            rich_help_panel=ROTATION,
        ),
    ] = None
    r1_epochs: Annotated[
        int | None,
        typer.Option(
            "--r1-epochs", metavar="N", help="Epochs of R1; default: 40.", rich_help_panel=ROTATION
        ),
    ] = None
    r2_lr: Annotated[
        float | None,
        typer.Option(
            "--r2-lr",
            metavar="RATE",
            help="Learning rate of R2; default: the optimizer's.",
            rich_help_panel=ROTATION,
        ),
    ] = None
    r2_epochs: Annotated[
        int | None,
        typer.Option(
            "--r2-epochs", metavar="N", help="Epochs of R2; default: 40.", rich_help_panel=ROTATION
        ),
    ] = None


@dataclass(frozen=True)
class DataFlags:
    """Which text the statistics see."""

    calib_dataset: Annotated[
        str | None,
        typer.Option(
            "--calib-dataset",
            metavar="TEXT",
            help=(
                "Hub name or .txt/.jsonl/.parquet file; default: the embedded text, for "
                "the example model."
            ),
            rich_help_panel=DATA,
        ),
    ] = None
    calib_column: Annotated[
        str | None,
        typer.Option(
            "--calib-column",
            metavar="NAME",
            help="Field with the text or messages; default: text, else messages.",
            rich_help_panel=DATA,
        ),
    ] = None
    calib_layout: Annotated[
        Literal["auto", "documents", "windows"] | None,
        typer.Option(
            "--calib-layout",
            help=(
                "A row is a document, or a window of joined text; default: auto, by their lengths."
            ),
            rich_help_panel=DATA,
        ),
    ] = None
    nsamples: Annotated[
        int | None,
        typer.Option(
            "--nsamples",
            metavar="ROWS",
            help="Calibration rows; default: 128.",
            rich_help_panel=DATA,
        ),
    ] = None
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            metavar="TOKENS",
            help="Tokens a row is cut at; default: 512, or what the model takes.",
            rich_help_panel=DATA,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="ROWS",
            help="Rows in one forward pass; default: 8.",
            rich_help_panel=DATA,
        ),
    ] = None
    gate_nsamples: Annotated[
        int | None,
        typer.Option(
            "--gate-nsamples",
            metavar="ROWS",
            help="Rows held back to compare candidates of --rotate auto on; default: 32.",
            rich_help_panel=DATA,
        ),
    ] = None
    eval_nsamples: Annotated[
        int | None,
        typer.Option(
            "--eval-nsamples",
            metavar="ROWS",
            help="Rows held back to check parity on; default: 32.",
            rich_help_panel=DATA,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Of sampling and of random starts; default: 0.",
            rich_help_panel=DATA,
        ),
    ] = None


@dataclass(frozen=True)
class EvalDataFlag:
    """Which text parity is measured on."""

    eval_dataset: Annotated[
        str | None,
        typer.Option(
            "--eval-dataset",
            metavar="TEXT",
            help="Text of parity, as --calib-dataset; default: rows held back.",
            rich_help_panel=DATA,
        ),
    ] = None
    eval_column: Annotated[
        str | None,
        typer.Option(
            "--eval-column",
            metavar="NAME",
            help=("As --calib-column, for --eval-dataset; default: text, else messages."),
            rich_help_panel=DATA,
        ),
    ] = None
