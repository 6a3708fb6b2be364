"""The model card: what a stranger who finds the folder must know before running it.

Metadata goes through huggingface_hub, whose fields the hub reads; the tables are those of the
console (:mod:`exporter.reporting.summary`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from string import Template

from exporter.recipe import EMBEDDED, Recipe
from exporter.reporting import summary
from exporter.reporting.report import CARD_FILE, Report, RotateReport
from exporter.reporting.summary import Table

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

_BANNERS = {
    "passed": (
        "> **Parity passed**: the exported model was run in its runtime and held every bound below."
    ),
    "stood in": (
        "> **Parity passed, but not in {not_run_in}**: the exported files were run in {ran_in} and"
        " held every bound below. What {not_run_in} makes of them was not seen."
    ),
    "failed": (
        "> **PARITY FAILED. Do not deploy this model.** These figures missed their bounds:"
        " {failures}."
    ),
    "unverified": (
        "> **Not verified**: the exported model was not run in its runtime. Run `rotq verify` where"
        " it can."
    ),
}

_ONNX_USAGE = Template("""\
```python
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
tokenizer = Tokenizer.from_file("tokenizer.json")
session = ort.InferenceSession("model.onnx")
ids = np.array([tokenizer.encode("Once upon a time").ids], dtype=np.int64)
feeds = {
    "input_ids": ids,
    "attention_mask": np.ones_like(ids),
    "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
}
for value in session.get_inputs():
    if value.name.startswith("past_key_values"):
        _, heads, _, size = value.shape
        feeds[value.name] = np.zeros((1, heads, $room, size), dtype=DTYPES[value.type])
logits = session.run(["logits"], feeds)[0]
print(tokenizer.decode([int(logits[0, -1].argmax())]))
```

$further
""")
_KV_BUFFERS = {
    "grown": {
        "room": "0",
        "further": (
            "To generate further tokens, feed the `present.*` outputs back as `past_key_values.*`."
        ),
    },
    "shared": {
        "room": "ids.shape[1]",
        "further": (
            "`past_key_values.*` are buffers, here with room for the prompt alone. To generate"
            " further tokens, make room for them too, and bind each `present.*` output to the"
            " memory of its input, as onnxruntime-genai does."
        ),
    },
}
"""How much the usage has in its caches before the first run, and what it says of the next, by
``--kv-buffer``.
"""

_OTHER_USAGE = "Load the folder in the runtime it was written for: `{target}`.\n"
_TRANSFORMERS_USAGE = """\
Needs the package `compressed-tensors`.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
"""
_READERS = {"transformers": _TRANSFORMERS_USAGE, "vllm": "```\nvllm serve FOLDER\n```\n"}
"""How to load the folder, by targets that are called what loads them."""


PICTURES = {
    "report-choice.png": "How the rotations were chosen",
    "report-values.png": "Inputs of linears before and after rotation",
}
"""Charts that a folder with a page has beside it, and what they show."""


def write_card(folder: Path, recipe: Recipe, report: Report) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        folder: the exported folder.
        recipe: the resolved recipe of the run.
        report: what the run found. Its status decides the banner, so write the card after the
            parity check.
    """
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    (folder / CARD_FILE).write_text(
        render_card(recipe, report, source_license(recipe), pictures), encoding="utf-8"
    )


def render_card(
    recipe: Recipe,
    report: Report,
    license_name: str | None = None,
    pictures: Collection[str] = (),
) -> str:
    """The card as text: YAML metadata between ``---`` lines, then Markdown.

    Args:
        recipe: the resolved recipe of the run.
        report: what the run found.
        license_name: of the source.
        pictures: those of :data:`PICTURES` that are in the folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        license=license_name,
        base_model=_base_model(report.model.source),
        library_name="rotq",
        pipeline_tag="text-generation",
        tags=["rotq", "quantized", report.scheme, report.backend, report.target],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(recipe, report, pictures)}"))


def render_rotated_card(
    recipe: Recipe, report: RotateReport, license_name: str | None = None
) -> str:
    """The card of a rotated float checkpoint."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        license=license_name,
        base_model=_base_model(report.model.source),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rotq", "rotated"],
    )
    parts = [
        f"# {title_of(report.model.source)}, rotated",
        (
            f"A {report.model.model_type} model of {report.model.parameters:,} parameters whose"
            f" norms and rotations (`{report.rotate}`) rotq folded into the weights, stored as"
            f" {report.dtype}. It computes what the original does and loads like it:"
            " `AutoModelForCausalLM.from_pretrained(FOLDER)`. Nothing is quantized; the rotations"
            f" were chosen for `{report.scheme}`."
        ),
        summary.quantized_words(report.model.quantized),
        "## Rotations",
        _markdown(summary.rotation_table(report)) or "None: the norms alone are folded.",
        _rotation_gate(report),
        "## Equivalence",
        "Logits of the reloaded folder against the original model in float32.",
        _markdown(summary.parity_table(report)) or "Not measured.",
        "## Recipe",
        (
            "`rotq rotate --recipe rotq.yaml` repeats this"
            f" run.\n\n```yaml\n{recipe.to_yaml().rstrip()}\n```"
        ),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def source_license(recipe: Recipe) -> str | None:
    """License that the source checkpoint's own card states, or ``None`` where it has none or cannot
    be read.

    A missing license is no reason to fail an export that took hours, so every trouble of the hub
    means ``None``.
    """
    if recipe.model == EMBEDDED:
        return "apache-2.0"
    from huggingface_hub import hf_hub_download

    path = Path(recipe.model) / CARD_FILE
    try:
        if not Path(recipe.model).is_dir():
            path = Path(hf_hub_download(recipe.model, CARD_FILE, revision=recipe.revision))
    except Exception:
        return None
    return stated_license(path)


def stated_license(card: Path) -> str | None:
    """License that a card states, or ``None`` where it states none or cannot be read."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) if card.is_file() else None
    except Exception:  # whatever YAML holds
        return None
    stated = (metadata or {}).get("license")
    return stated if isinstance(stated, str) else None


def _base_model(source: str) -> str | None:
    # The hub rejects a card whose base model is not a hub id; a local path would mean nothing to a
    # reader either.
    if source == EMBEDDED or Path(source).exists() or not _HUB_ID.fullmatch(source):
        return None
    return source


def title_of(source: str) -> str:
    """A model by its name alone: where it lies on a machine means nothing to a reader."""
    return (
        "Embedded example model" if source == EMBEDDED else _base_model(source) or Path(source).name
    )


def _body(recipe: Recipe, report: Report, pictures: Collection[str]) -> str:
    size = summary.size_words(report.layers.bytes_before, report.layers.bytes_after)
    parts = [
        f"# {title_of(report.model.source)}, {report.scheme} for {report.backend}/{report.target}",
        _banner(report),
        (
            f"A {report.model.model_type} model of {report.model.parameters:,} parameters, rotated"
            f" (`{report.rotate}`), calibrated and quantized (`{report.scheme}`) by rotq. Weights:"
            f" {size}."
        ),
        summary.quantized_words(report.model.quantized),
        "## How to run",
        _usage(recipe, report),
        "## Layers",
        "\n".join(f"* {line}" for line in (*summary.layer_lines(report), *report.warnings)),
        "## Rotations",
        _rotation_words(report),
        _markdown(summary.rotation_table(report)),
        _rotation_gate(report),
        "\n\n".join(f"![{PICTURES[name]}]({name})" for name in PICTURES if name in pictures),
    ]
    if report.gate:
        parts += [
            "### How the set was chosen",
            (
                "Candidates, quantized, on held-out tokens against the float model. The interval is"
                " that of the KL above the lowest one, from differences row by row; of the"
                " candidates whose interval reaches zero the simplest is taken, where one is close"
                " enough of those that are:"
            ),
            _markdown(summary.gate_table(report)),
            "\n".join(f"* {line}" for line in summary.gate_findings(report)),
        ]

    calibration = report.calibration
    parts += [
        "## Parity",
        (
            "Rung 1: original against rotated float model. Rung 2: simulated against exported"
            " model, in the runtime. Rung 3: original against exported model."
        ),
        _markdown(summary.parity_table(report)) or "Not measured.",
        "\n".join(f"* {line}" for line in summary.runtime_lines(report)),
        "## Calibration",
        (
            f"{summary.calibration_words(calibration)} of `{calibration.dataset}`"
            f" (SHA-256 of the token ids `{calibration.sha256}`). Source weights:"
            f" `{report.model.fingerprint}`. Limits of activations: `{calibration.observer}`;"
            f" rounding of weights: `{calibration.weights}`; smoothing: `{calibration.smoothing}`."
        ),
        "## Recipe",
        (
            "`rotq export --recipe rotq.yaml -o OUT` repeats this"
            f" run.\n\n```yaml\n{recipe.to_yaml().rstrip()}\n```"
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _banner(report: Report) -> str:
    stood_in = report.status == "passed" and report.not_run_in
    return _BANNERS["stood in" if stood_in else report.status].format(
        failures="; ".join(summary.failed_rows(report)),
        ran_in=summary.ran_in(report),
        not_run_in=report.not_run_in,
    )


def _usage(recipe: Recipe, report: Report) -> str:
    if report.backend == "onnx":
        return _ONNX_USAGE.substitute(_KV_BUFFERS[recipe.kv_buffer])
    return _READERS.get(report.target) or _OTHER_USAGE.format(target=report.target)


def _rotation_words(report: Report) -> str:
    if not report.rotations:
        changed = "folded norms and quantization" if report.norms_folded else "quantization"
        return f"None: the weights are those of the original model, apart from {changed}."
    if any(rotation.online for rotation in report.rotations):
        return (
            "Folded rotations cost nothing at run time. Online ones are part of the computation,"
            " before the layers they act on: whoever loads the weights elsewhere must apply them"
            " too."
        )
    return "All rotations are folded into the weights: a runtime needs to know nothing about them."


def _rotation_gate(report: Report | RotateReport) -> str:
    if not report.rotation_gate:
        return ""
    return "\n\n".join(
        (
            "### How each was chosen",
            (
                "Relative squared error of the quantizer of the scheme; of the candidates that are"
                " within noise of the lowest, the simplest is kept:"
            ),
            _markdown(summary.rotation_gate_table(report.rotation_gate)),
            "\n".join(f"* {line}" for line in summary.rotation_gate_findings(report.rotation_gate)),
        )
    )


def _markdown(table: Table) -> str:
    """A Markdown table; empty for a table without rows."""
    if not table.rows:
        return ""
    lines = ["---:" if index in table.right else "---" for index in range(len(table.header))]
    rows = [table.header, tuple(lines)]
    for index, row in enumerate(table.rows):
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
        rows.append(
            tuple(f"**{cell}**" if index in table.marked and cell else cell for cell in cells)
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
