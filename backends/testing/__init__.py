"""What the author of a backend runs against it: the conformance suite, and the tiny models that it
uses.

Needs pytest (``pip install "rotq[test]"``). ``docs/writing-a-backend.md`` shows how to use it.
"""

from backends.testing.conformance import BackendConformance
from backends.testing.models import FAMILIES, tiny_model

__all__ = ["FAMILIES", "BackendConformance", "tiny_model"]
