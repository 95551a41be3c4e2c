from __future__ import annotations

from ..data.conftest import encode, labels, pixels, unit, write_tree  # noqa: F401
