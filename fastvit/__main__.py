"""``python -m fastvit``: the same as the ``fastvit`` command."""

from __future__ import annotations

import sys

from fastvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
