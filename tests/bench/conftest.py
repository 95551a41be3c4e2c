"""Makes bench/, which is not installed, importable. The end of the path keeps an installed bdprune first."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.append(_ROOT)
