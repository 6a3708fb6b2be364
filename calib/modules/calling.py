"""Calling models whose forwards take different arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def taken(model: nn.Module, arguments: Mapping[str, object]) -> dict[str, Any]:
    """Those of ``arguments`` that the forward of ``model`` has by name: some models number the
    positions of tokens themselves, and some cannot compute the logits of the last alone.
    """
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in names}
