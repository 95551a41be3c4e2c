"""bdprune tells backdoored neural networks from clean ones and repairs them.

Importing it is cheap: torch is imported only when one of the names below is first used.

>>> import bdprune
>>> result = bdprune.scan("model.pth", "clean_images/", detectors=["lipschitz"])
>>> result.verdict, result.model.arch, result.data.clean_accuracy
('inconclusive', 'resnet18_cifar', 1.0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdprune.analysis import stack as stack
    from bdprune.fleet import scan as scan
    from bdprune.fleet import scan_many as scan_many
    from bdprune.pipeline import load as load
    from bdprune.pipeline import purify as purify
    from bdprune.pipeline import score as score
    from bdprune.record import Result as Result

__version__ = "0.1.0"

_HOMES = {
    "Result": "record",
    "load": "pipeline",
    "purify": "pipeline",
    "scan": "fleet",
    "scan_many": "fleet",
    "score": "pipeline",
    "stack": "analysis",
}
__all__ = ["Result", "__version__", "load", "purify", "scan", "scan_many", "score", "stack"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"bdprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
