"""The options that commands share, in groups: model, target, run and output. Those that decide
numbers are in :mod:`exporter.cli.number_options`.

A field left at ``None`` (or ``False``) was not given: the recipe decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

TARGETS_IN_WORDS = (
    "ort, openvino, tensorrt (onnx); tripy, tensorrt, modelopt, vllm, transformers,"
    " compressed-tensors (safetensors)"
)
"""Those of rotq's own backends; ``rotq backends`` lists all that are installed."""

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
            metavar="MODEL",
            help="Hub id or folder; default: the embedded example model.",
            rich_help_panel=MODEL,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="NAME",
            help="Branch, tag or commit on the hub; default: its main branch.",
            rich_help_panel=MODEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N; default: auto, CUDA where there is one.",
            rich_help_panel=MODEL,
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"] | None,
        typer.Option(
            "--dtype",
            help=(
                "What the target computes in; default: auto, the target's own, else the "
                "checkpoint's."
            ),
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
            help="Run Python code that comes with the model; default: never.",
            rich_help_panel=DANGEROUS,
        ),
    ] = False


@dataclass(frozen=True)
class BackendFlags:
    """What is written."""

    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help=(
                "What to write: onnx or safetensors; default: the one that has --target, else onnx."
            ),
            rich_help_panel=QUANTIZATION,
        ),
    ] = None
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help=(
                f"Runtime it is for: {TARGETS_IN_WORDS}; default: the backend's first. "
                "Repeatable: a folder of -o each."
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
            help=("Of every token, or of the last one, enough to generate; default: all."),
            rich_help_panel=RUN,
        ),
    ] = None
    kv_buffer: Annotated[
        Literal["grown", "shared"] | None,
        typer.Option(
            "--kv-buffer",
            help=(
                "Keys and values: grown by each run, or written into one buffer that goes "
                "in and out; default: grown."
            ),
            rich_help_panel=RUN,
        ),
    ] = None
    int8_weights: Annotated[
        Literal["auto", "signed", "unsigned"] | None,
        typer.Option(
            "--int8-weights",
            help=(
                "How a graph stores them: signed is fastest on CPUs with VNNI, unsigned is "
                "exact on all; default: auto, as this CPU multiplies."
            ),
            rich_help_panel=RUN,
        ),
    ] = None
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help=(
                "Split files of weights beyond this, such as 5GB or 500MiB; default: the "
                "backend's limit."
            ),
            rich_help_panel=RUN,
        ),
    ] = None


@dataclass(frozen=True)
class RecipeFlag:
    """Where settings come from that no option gives."""

    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help=(
                "YAML file, or a preset: int8, int4-gptq, ...; default: none. Options win over it."
            ),
            rich_help_panel=RUN,
        ),
    ] = None


@dataclass(frozen=True)
class ResumeFlags:
    """Work that need not be done again."""

    from_capture: Annotated[
        Path | None,
        typer.Option(
            "--from-capture",
            metavar="FOLDER",
            help="Of 'rotq capture': skips that step.",
            rich_help_panel=RUN,
        ),
    ] = None
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            metavar="FOLDER",
            help="Keep intermediate results here; default: nowhere.",
            rich_help_panel=RUN,
        ),
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
            metavar="FOLDER",
            help=("To create; default: out/ and a name made of model, scheme and target."),
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
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="Write where time, pages and memory went, stage by stage, as JSON.",
            rich_help_panel=OUTPUT,
        ),
    ] = None


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
    json_events: Annotated[
        Path | None,
        typer.Option(
            "--json-events",
            metavar="FILE",
            help="Write progress for machines, one JSON object a line; default: nowhere.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            max=1024,
            help="Threads of one operator; default: a core each, as far as a container may use"
            " them up.",
            rich_help_panel=RUN,
        ),
    ] = None
