"""Parquet files of other columns, and damaged ones."""

from __future__ import annotations

import io
from random import Random

from tests.fuzz.mutations import mutate_bytes


def mutate_parquet(data: bytes, rng: Random) -> bytes:
    """A parquet file, changed as bytes, or of another type."""
    if rng.random() < 0.8:
        return mutate_bytes(data, rng)
    import pyarrow
    from pyarrow import parquet

    values = rng.choice(
        (
            *([1, 2], [None, None], [b"\xff", b"x"], [["a"], []], [{"role": "user"}], [1.5], []),
            *([True], [[{"role": "user", "content": "x"}]], [[1, 2]], ["x" * 70000], [["x", None]]),
        )
    )
    written = io.BytesIO()
    compression = rng.choice(("none", "snappy", "gzip", "zstd"))
    name = rng.choice(("text", "messages", "", "\0"))
    parquet.write_table(pyarrow.table({name: values}), written, compression=compression)
    return mutate_bytes(written.getvalue(), rng) if rng.random() < 0.3 else written.getvalue()
