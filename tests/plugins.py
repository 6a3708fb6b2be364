"""An installed distribution with two backends: one that writes nothing, and one that cannot be
imported.
"""

from __future__ import annotations

from pathlib import Path

STUB = """
class Stub:
    name = "stub"
    targets = ("one", "two", "own")

    def refusal(self, scheme, target):
        refused = (scheme.weight.format.name, target) == ("float8_e4m3", "one")
        return "no float8 kernels" if refused else None

    def warning(self, scheme, target):
        slow = (scheme.weight.format.name, target) == ("int4", "two")
        return "int4 weights are unpacked first" if slow else None

    def cache_refusal(self, scheme, target):
        return "no float8 cache" if scheme.format.name == "float8_e4m3" else None

    def rotation_refusal(self, kind, target):
        return "it has no place for one" if (kind, target) == ("r4", "two") else None

    def logits_refusal(self, target):
        return "it computes them all" if target == "two" else None

    def kv_buffer_refusal(self, target):
        return "its caches only grow" if target == "two" else None

    def model_refusal(self, config, linears, target):
        if config["vocab_size"] % 2:
            return "its vocabulary is odd", "pad the vocabulary"
        return None

    def files(self, options, linears, nbytes):
        return ["model.stub"]

    def compute_dtype(self, target):
        return {"one": "float32", "two": "float16", "own": None}[target]
"""
ENTRY_POINTS = "[rotq.backends]\nstub = stub_backend:Stub\nbroken = no_such_module:Thing\n"


def install_plugins(folder: Path) -> None:
    """Write the distribution into ``folder``, which then only has to be on the path."""
    (folder / "stub_backend.py").write_text(STUB)
    info = folder / "stub-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
