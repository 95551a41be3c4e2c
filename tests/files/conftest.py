from __future__ import annotations

from ..model.conftest import fingerprint, saved, shake, small_model, small_network, write  # noqa: F401
