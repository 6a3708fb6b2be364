"""The options of the command line by the recipe keys that they set, so that whoever speaks of a
setting can say it as a user types it. Imports nothing but the standard library.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

RECIPE_KEYS = {
    "model": "model",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "ignore_unused": "ignore_unused",
    "device": "device",
    "dtype": "dtype",
    "backend": "backend",
    "target": "target",
    "logits": "logits",
    "kv_buffer": "kv_buffer",
    "int8_weights": "int8_weights",
    "max_shard_size": "max_shard_size",
    "scheme": "scheme",
    "kv": "kv",
    "override": "overrides",
    "block_size": "weights.block_size",
    "weight_algorithm": "weights.algorithm",
    "observer": "activations.observer",
    "smoothing": "smoothing",
    "prefix": "prefix",
    "overrides": "widen",
    "layerwise": "layerwise.enabled",
    "asym": "layerwise.asym",
    "max_memory": "layerwise.max_memory",
    "calib_dataset": "calibration.dataset",
    "calib_column": "calibration.column",
    "calib_layout": "calibration.layout",
    "nsamples": "calibration.nsamples",
    "seqlen": "calibration.seqlen",
    "batch_size": "calibration.batch_size",
    "eval_dataset": "evaluation.dataset",
    "eval_column": "evaluation.column",
    "gate_nsamples": "gate.nsamples",
    "eval_nsamples": "evaluation.nsamples",
    "seed": "seed",
    "rotate": "rotate",
    "r1_lr": "rotation.r1.lr",
    "r1_epochs": "rotation.r1.epochs",
    "r2_lr": "rotation.r2.lr",
    "r2_epochs": "rotation.r2.epochs",
    "rotations": "rotation.files",
}
"""Recipe key by option, with underscores. ``--rotation-optimizer`` sets two, which is the command
line's business.
"""


def option_of(key: str) -> str:
    """The option that overrides the recipe key ``key``, for messages."""
    if key.endswith(".optimizer"):
        return "--rotation-optimizer"
    field = next(name for name, dotted in RECIPE_KEYS.items() if dotted == key)
    return "--" + field.replace("_", "-")


def flags_of(change: Mapping[str, object]) -> list[str]:
    """``change``, values by recipe key, as words of a command line that make it.

    A switch that is turned off, and what is left to a default, has no option: ``None`` and
    ``False`` are passed over.
    """
    words: list[str] = []
    for key, value in change.items():
        option = option_of(key)
        match value:
            case None | False:
                continue
            case True:
                words.append(option)
            case Mapping():
                for pattern, scheme in value.items():
                    words += [option, f"{pattern}={scheme}"]
            case list() | tuple():
                for each in value:
                    words += [option, str(each)]
            case _:
                words += [option, str(value)]
    return words


def command(*words: object) -> str:
    """``words`` as a line that a shell reads back as they are."""
    return shlex.join(str(word) for word in words)
