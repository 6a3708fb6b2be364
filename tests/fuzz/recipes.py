"""Changes of YAML."""

from __future__ import annotations

from random import Random

import yaml

from tests.fuzz.mutations import mutate_bytes, mutate_value

_LINES = (
    *("a: &a [x, *a]", "? [a, b]\n: c", "seed: 1_000", "seed: 0x1F", "seed: 1:30:00"),
    *("seed: 2026-99-99", "seed: !!python/name:os.system", "seed: !!set {a, b}", "seed: .inf"),
    *("<<: {seed: 1}", "seed: =", "seed: !!binary aGk=", "seed: !!timestamp x", "seed: !!int x"),
    *("seed: !!float 1e", "seed: 0o9", "{seed: 1", "seed: '", "\tseed: 1", "!<tag:x> seed: 1"),
    *("- seed", "%TAG ! x", "--- 1\n--- 2", "null: null", "1: 2", "2001-01-01: 3"),
    *("overrides: {'*': [int8]}", "overrides: {'[': float}", "rotation: {r1: {epochs: 1e400}}"),
    *('model: "\\0"', 'calibration: {dataset: "\\ud800"}', "? {a: b}\n: c", "seed: !!omap [a]"),
    *("trust_remote_code: yes", "seed: " + "9" * 9999, "a: " + "[" * 2000),
)


def mutate_yaml(data: bytes, rng: Random) -> bytes:
    """A recipe, changed as bytes, as what it says, or by a line that YAML reads its own way."""
    match rng.randrange(3):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            lines = data.decode(errors="replace").split("\n")
            for _ in range(rng.choice((1, 2))):
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(_LINES))
            return "\n".join(lines).encode()
    try:
        value = yaml.safe_load(data)
        return yaml.safe_dump(mutate_value(value, rng), sort_keys=False).encode()
    except (yaml.YAMLError, ValueError, RecursionError):
        return mutate_bytes(data, rng)
