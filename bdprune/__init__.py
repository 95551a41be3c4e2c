"""bdprune tells backdoored neural networks from clean ones and repairs them.

Importing it is cheap: torch is imported only when one of the names below is first used.

>>> import bdprune
>>> result = bdprune.scan("model.pth", "clean_images/", detectors=["lipschitz"])
>>> result.verdict, result.model.arch, result.data.clean_accuracy
('inconclusive', 'resnet18_cifar', 1.0)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdprune.scan.engine import scan as scan
    from bdprune.scan.engine import scan_many as scan_many
    from bdprune.scan.intake import load as load
    from bdprune.scan.purify import purify as purify
    from bdprune.scan.result import Result as Result
    from bdprune.scan.score import score as score
    from bdprune.training.stack import stack as stack

__version__ = "0.1.0"

__all__ = ["Result", "__version__", "load", "purify", "scan", "scan_many", "score", "stack"]

_HOMES = {
    "Result": "bdprune.scan.result",
    "load": "bdprune.scan.intake",
    "purify": "bdprune.scan.purify",
    "scan": "bdprune.scan.engine",
    "scan_many": "bdprune.scan.engine",
    "score": "bdprune.scan.score",
    "stack": "bdprune.training.stack",
}
_ROOMS = ("purify", "scan")


class _CallableRoom(ModuleType):
    """A room whose name is also a public function: ``bdprune.scan(...)`` calls ``bdprune.scan.engine.scan``."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.__wrapped__(*args, **settings)

    @property
    def __wrapped__(self) -> Any:
        """The function behind the name; ``inspect.signature`` reads it."""
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """``bdprune`` itself. ``scan`` and ``purify`` name both a room and a function, and importing anything from such a
    room puts the module in the function's place; so these modules are made callable the moment they are imported.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
