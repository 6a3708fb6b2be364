"""The recipe: everything a run needs, in one validated, frozen object that is saved with the output
as ``rotq.yaml``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    field_validator,
    model_validator,
)

from calib.rotations.rotate import AUTO, Rotate
from exporter.recipe.scope import COST, EACH_RUN, WRITING, Scope, scope_of

RECIPE_FILE = "rotq.yaml"
EMBEDDED = "embedded"
CAREFUL_SCHEMES = ("int4-weight-only",)
"""Schemes whose weights are rounded by GPTQ where nothing else is said and there is text like the
model's own: rounded one by one they lose three times as much."""
NEVER_IN_FILES = ("trust_remote_code",)
"""Keys that a file, which somebody else may have written, does not decide."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def _parsed(value: Any) -> Any:
    if isinstance(value, Rotate):
        return value
    if not isinstance(value, str):
        raise ValueError("expected text such as auto, none or r1,r2")
    return Rotate.parse(value)


PrefixField = Literal["auto", "none"] | Annotated[int, Field(ge=1, strict=True)]
"""How many tokens stand before every sequence; ``auto``: as many as help, if any do."""

RotateField = Annotated[
    InstanceOf[Rotate], BeforeValidator(_parsed), PlainSerializer(str, return_type=str)
]
"""A :class:`~calib.rotations.rotate.Rotate`; in files, the text that ``--rotate`` takes."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Section):
    """Which text the statistics see."""

    dataset: str = EMBEDDED
    """Hub data-set name, local .txt/.jsonl/.parquet file, or ``embedded``: the example text that
    ships with rotq.
    """
    column: str | None = None
    """Field or column that holds the text, or conversations; null: ``text``, else ``messages``."""
    nsamples: int = Field(128, ge=1)
    """Rows for capture and amax."""
    seqlen: int = Field(512, ge=2)
    """Tokens a row is cut at; never beyond what the model's positions allow."""
    batch_size: int = Field(8, ge=1)
    layout: Literal["auto", "documents", "windows"] = "auto"
    """``documents``: a row is one document; ``windows``: text is joined and cut into rows of
    exactly ``seqlen``; ``auto``: documents where three in four have ``seqlen / 4`` tokens.
    """


class Gate(_Section):
    """Held-out rows, disjoint from calibration, on which ``--rotate auto`` compares its
    candidates.
    """

    nsamples: int = Field(32, ge=1)


class Evaluation(_Section):
    """Rows, disjoint from the other two splits, on which parity and quality are measured.

    What is kept apart for them is not calibrated on, so they decide the numbers of the model.
    """

    dataset: str | None = None
    """As ``calibration.dataset``; ``None`` keeps rows of the calibration text apart (the embedded
    text has its own).
    """
    column: str | None = None
    """As ``calibration.column``, for a text of its own."""
    nsamples: int = Field(32, ge=1)


class Training(_Section):
    """How one kind of rotation is trained; the fields of :class:`calib.rotations.train.TrainConfig`
    that a user sets.

    The preset ``int8-reference`` holds DartQuant's published values (NeurIPS 2025).
    """

    objective: Literal["auto", "whip", "lp", "kurtosis", "range", "scheme"] = "auto"
    """What to minimise; ``auto`` picks by the scheme that is exported."""
    optimizer: Literal["qr", "riemannian-ns", "riemannian-cayley", "monotone"] = "monotone"
    """``qr``: the reference's QR-orthogonalised latent; ``monotone``: the learning-rate-free polar
    step.
    """
    start: Literal["auto", "identity", "random", "hadamard", "pca-hadamard", "pca-ones"] = "auto"
    """``auto``: ``pca-ones`` where every token gets a zero point of its own, else ``hadamard``."""
    epochs: int = Field(40, ge=0)
    batch_size: int | None = Field(None, ge=1)
    """Tokens a step; null: all of them."""
    subset: float = Field(1.0, gt=0, le=1)
    """Share of the batches seen in an epoch."""
    accumulation_steps: int = Field(1, ge=1)
    lr: float | None = Field(None, gt=0)
    """Learning rate; null: the optimizer's default. ``monotone`` has none."""
    momentum: float = Field(0.9, ge=0, lt=1)
    update: Literal["sgd", "adam"] = "sgd"
    cosine: bool = False
    normalize: bool = True
    """Scale samples to unit mean square first."""


class RotationSettings(_Section):
    """Capture and training of R1 and R2."""

    r1: Training = Training()
    r2: Training = Training()
    r1_tokens: int = Field(16384, ge=2)
    """Rows of the R1 reservoir, over all of its sites together."""
    r2_tokens: int = Field(1024, ge=2)
    """Tokens of the R2 reservoir, per layer."""
    massive_fraction: float = Field(0.125, ge=0, le=0.5)
    """Share of either reservoir that is reserved for the tokens of largest magnitude."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the reservoirs on which trained rotations are judged, never trained."""
    select: bool = True
    """Compare each trained rotation with identity, Hadamard and PCA-Hadamard, and keep the one with
    the lowest error; false keeps the trained one, whatever it is worth."""
    fold_norms: bool | Literal["auto"] = "auto"
    """Fold the gains of norms into the weights that read them where no R1 needs it; ``auto``: where
    inputs are quantized, for which it smooths, not where weights alone are, for which it hurts."""
    files: Annotated[
        list[str], BeforeValidator(lambda files: [files] if isinstance(files, str) else files)
    ] = []
    """Rotations made elsewhere, used instead of training: a folder or rotations.safetensors of
    rotq, DartQuant's r1.pt and r2.pt, SpinQuant's R.bin."""


class Weights(_Section):
    """How weights are rounded, beyond what the scheme says."""

    algorithm: str = "rtn"
    """With ``int4-weight-only`` ``gptq`` by default, unless the text is the embedded one and the
    model is not. ``rtn``, ``mse``, ``gptq`` or ``adaround``, with settings after a colon:
    ``gptq:act_order=false,damping=0.1``.
    """
    block_size: Annotated[int | None, BeforeValidator(lambda size: None if size == 0 else size)] = (
        Field(None, ge=1)
    )
    """Input features that share a scale; null or 0: the scheme's, but 64 (32 below a hidden size of
    1024) in an export by ``int4-weight-only`` whose targets run that."""
    symmetric: bool | None = None
    """False: with zero points, for targets that can express them; null: the scheme's."""


class Activations(_Section):
    """How activations are quantized, beyond what the scheme says."""

    observer: str = "min_max"
    """What turns calibration activations into limits: ``min_max``, ``percentile:99.99``,
    ``entropy``, ``mse``, ``clip_std:3``, ``moving_average:0.9``, ``clip:6``, ``fixed_scale:0.05``.
    """
    symmetric: bool | None = None
    """False: with a zero point; null: the scheme's."""
    granularity: str | None = None
    """``tensor`` (static), ``token`` (dynamic) or ``cluster:K`` (static, K sets of channels); null:
    the scheme's.
    """


class Layerwise(_Section):
    """Calibration block by block, with no more of the model in memory than one block."""

    enabled: bool = False
    asym: bool = False
    """Calibrate each linear on the outputs of the already quantized ones instead of the float
    model's.
    """
    quantize_weights: bool = True
    """With ``asym``: the linears before are run with rounded weights."""
    quantize_activations: bool = True
    """With ``asym``: the linears before are run with rounded activations."""
    max_memory: Annotated[str, COST] = "2GB"
    """Activations between blocks go to disk beyond this."""

    @field_validator("max_memory")
    @classmethod
    def _known_size(cls, value: str) -> str:
        parse_size(value)
        return value


class Recipe(_Section):
    """One run of rotq."""

    model: Annotated[str, EACH_RUN] = EMBEDDED
    """Checkpoint folder or hub id; ``embedded``: the example model that ships with rotq."""
    revision: Annotated[str | None, EACH_RUN] = None
    trust_remote_code: Annotated[bool, WRITING] = False
    """Run Python code that comes with the model. Said on the command line or from Python alone: it
    is neither written to a file nor believed of one."""
    ignore_unused: Annotated[bool, COST] = False
    """Go on without tensors of the checkpoint that its config does not call for, and without an
    adapter beside it.
    """
    backend: Annotated[str, WRITING] = "onnx"
    target: Annotated[str | list[str] | None, WRITING] = None
    """Runtime the output is for, or several of them; ``None``: the backend's default."""
    logits: Annotated[Literal["all", "last"], WRITING] = "all"
    """Logits of every token, or of the last one alone, which is all that generating text needs."""
    kv_buffer: Annotated[Literal["grown", "shared"], WRITING] = "grown"
    """Keys and values are ``grown`` by the new tokens on each run, or written into one ``shared``
    buffer with room for all of them."""
    int8_weights: Annotated[Literal["auto", "signed", "unsigned"], WRITING] = "auto"
    """Whether a graph stores int8 weights that are multiplied by int8 inputs ``signed``, which is
    fastest on processors that multiply them exactly, or ``unsigned``, which is exact on all;
    ``auto``: as this machine's is."""
    max_shard_size: Annotated[str | None, WRITING] = None
    """Files of weights are split beyond this size (``2GB``, ``500MiB``); ``None``: the backend's
    own limit.
    """
    scheme: str = "int8"
    overrides: dict[str, str] = {}
    """Other schemes, or ``float``, for linears whose name matches a pattern; the last match counts.
    The output head and embeddings are named in full."""
    kv: Literal["int8", "int4", "float8"] | None = None
    """Quantize the KV cache, with one static scale each for keys and values of a layer."""
    weights: Weights = Weights()
    activations: Activations = Activations()
    smoothing: str = "none"
    """Move outliers from activations into weights: ``none``, ``smoothquant:0.5`` or ``awq``."""
    prefix: PrefixField = "auto"
    """Tokens whose keys and values, in float, stand before every sequence as part of the model, so
    that no token of a text becomes a massive one: ``auto`` (those that help, where the targets can
    have them), ``none``, or how many."""
    widen: Literal["auto", "none"] = "auto"
    """Whether the linears that a static scale hurts most get a wider form (a scale for each token,
    or float) where nothing cheaper is close enough to the float model."""
    layerwise: Layerwise = Layerwise()
    rotate: RotateField = AUTO
    """``auto``, ``none`` or a comma-separated subset of r1, r2, r3, r4."""
    device: Annotated[str, EACH_RUN] = "auto"
    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], EACH_RUN] = "auto"
    """Dtype the target computes in; folded weights are rounded to it, once. ``auto``: the target's,
    or where it has none that of the checkpoint."""
    seed: int = Field(0, ge=0)
    calibration: Calibration = Calibration()
    gate: Gate = Gate()
    evaluation: Evaluation = Evaluation()
    rotation: RotationSettings = RotationSettings()

    @model_validator(mode="after")
    def _careful_weights(self) -> Self:
        """What is done to the weights of a scheme of few bits where nothing is said. It does not
        count as said: with another scheme or text the recipe decides anew
        (:func:`exporter.recipe.with_values`).
        """
        own = self.weights
        at_hand = self.model == EMBEDDED or self.calibration.dataset != EMBEDDED
        if self.scheme in CAREFUL_SCHEMES and at_hand and "algorithm" not in own.model_fields_set:
            careful = Weights.model_construct(
                own.model_fields_set, **{**dict(own), "algorithm": "gptq"}
            )
            object.__setattr__(self, "weights", careful)  # the recipe is frozen for its users
        return self

    @field_validator("target")
    @classmethod
    def _distinct_targets(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and (not value or len(set(value)) != len(value)):
            raise ValueError("expected one or more distinct targets")
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @field_validator("max_shard_size")
    @classmethod
    def _known_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @property
    def targets(self) -> tuple[str | None, ...]:
        """Every target; ``None`` stands for the backend's default."""
        return tuple(self.target) if isinstance(self.target, list) else (self.target,)

    @property
    def certain_prefix(self) -> int:
        """Tokens that the result has before every sequence whatever is measured: none with
        ``auto``."""
        return self.prefix if isinstance(self.prefix, int) else 0

    @property
    def max_shard_bytes(self) -> int | None:
        """:attr:`max_shard_size` in bytes."""
        return None if self.max_shard_size is None else parse_size(self.max_shard_size)

    @classmethod
    def scope(cls, key: str) -> Scope:
        """How far the setting with this dotted key reaches."""
        return scope_of(key, cls)

    def to_yaml(self) -> str:
        """As YAML, which :func:`exporter.recipe.load_recipe` reads back to an equal recipe, but for
        what no file may say."""
        values = self.model_dump(mode="json", exclude=set(NEVER_IN_FILES))
        return yaml.safe_dump(values, sort_keys=False)


def parse_size(text: str) -> int:
    """Bytes in ``512MB``, ``2GiB``, ``1.5G`` or a plain number.

    Raises:
        ValueError: it is none of these.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise ValueError("this is no size: write 512MB, 2GB or 1.5GiB")
    return size
