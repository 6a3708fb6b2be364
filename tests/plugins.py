"""An installed distribution with two backends: one that writes nothing, and one that cannot be
imported.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

STUB = """
from backends.base import Reason
from backends.rules import Limits

class Stub:
    name = "stub"
    targets = ("one", "two", "own")
    contract = 2

    def refusals(self, request):
        target = request.target
        options = {"logits": "it computes them all", "kv_buffer": "its caches only grow"}
        limits = Limits(
            linear=lambda scheme: self.refuses(scheme, target),
            slow=lambda scheme: self.warns(scheme, target),
            cache=lambda scheme: (
                "no float8 cache" if scheme.format.name == "float8_e4m3" else None
            ),
            rotation=lambda kind: (
                "it has no place for one" if (kind, target) == ("r4", "two") else None
            ),
            options=options if target == "two" else {},
        )
        odd = request.config is not None and request.config["vocab_size"] % 2
        return limits.reasons(request) + (
            [Reason("its vocabulary is odd", "pad the vocabulary")] if odd else []
        )

    def refuses(self, scheme, target):
        refused = (scheme.weight.format.name, target) == ("float8_e4m3", "one")
        return "no float8 kernels" if refused else None

    def warns(self, scheme, target):
        slow = (scheme.weight.format.name, target) == ("int4", "two")
        return "int4 weights are unpacked first" if slow else None

    def compute_dtype(self, target):
        return {"one": "float32", "two": "float16", "own": None}[target]


class Old:  # speaks version 1: it has no number, and a method for each question
    name = "old"
    targets = ("one",)

    def refusal(self, scheme, target):
        return None


class Newer(Stub):
    name = "newer"
    contract = 1000
"""
ENTRY_POINTS = "[rotq.backends]\nstub = stub_backend:Stub\nbroken = no_such_module:Thing\n"


def install_plugins(folder: Path, others: Collection[str] = ()) -> None:
    """Write the distribution into ``folder``, which then only has to be on the path; with
    ``others`` of the module's classes as backends, too.
    """
    (folder / "stub_backend.py").write_text(STUB)
    info = folder / "stub-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        ENTRY_POINTS + "".join(f"{name.lower()} = stub_backend:{name}\n" for name in others)
    )
