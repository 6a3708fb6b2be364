"""``python -m exporter.cli`` is ``rotq``, for where the script is not on the path."""

from __future__ import annotations

import sys

from exporter.cli.app import main

sys.exit(main())
