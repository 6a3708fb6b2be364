"""What metadata states, against what it should: the differences in words that a person can read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_OF_READERS = frozenset(
    {
        *("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config"),
        "transformers_version",
    }
)
"""Keys of a config that a target may set for its readers, and the one that says who wrote it."""
_ABSENT = "nothing"


def differing(stated: Mapping[str, object], expected: Mapping[str, object]) -> Iterator[str]:
    """Keys of ``expected`` that ``stated`` has otherwise or not at all; a key ``a.b`` is ``b``
    within ``a``.
    """
    for path, value in expected.items():
        found: Any = stated
        for key in path.split("."):
            found = found.get(key, _ABSENT) if isinstance(found, Mapping) else _ABSENT
        if found != value:
            yield f"'{path}' is {found!r} instead of {value!r}"


def config_differing(stated: Mapping[str, object], config: Mapping[str, object]) -> Iterator[str]:
    """The same of a Hugging Face config, but for what a target may set in it."""
    # both as a reader of JSON has them, whose keys are words
    found, wanted = (json.loads(json.dumps(dict(each))) for each in (stated, config))
    for key, value in wanted.items():
        if key not in _OF_READERS and found.get(key, _ABSENT) != value:
            yield f"'{key}' is {found.get(key, _ABSENT)!r} instead of {value!r}"
