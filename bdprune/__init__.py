"""bdprune finds backdoored neural networks and repairs them.

The import is cheap: the first use of one of the names below imports torch.

>>> import bdprune
>>> result = bdprune.scan("model.pth", "clean_images/", detectors=["lipschitz"])
>>> result.verdict, result.model.arch, result.data.clean_accuracy
('inconclusive', 'resnet18_cifar', 1.0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdprune.analysis import Analysis as Analysis
    from bdprune.analysis import Case as Case
    from bdprune.analysis import attach_triggers as attach_triggers
    from bdprune.analysis import stack as stack
    from bdprune.data import CleanData as CleanData
    from bdprune.errors import BdpruneError as BdpruneError
    from bdprune.errors import DataError as DataError
    from bdprune.errors import OptionError as OptionError
    from bdprune.errors import OutputError as OutputError
    from bdprune.fleet import Scanner as Scanner
    from bdprune.fleet import StackOptions as StackOptions
    from bdprune.fleet import scan as scan
    from bdprune.fleet import scan_many as scan_many
    from bdprune.loops import FineTuneSettings as FineTuneSettings
    from bdprune.loops import InvertSettings as InvertSettings
    from bdprune.loops import RecoverSettings as RecoverSettings
    from bdprune.loops import SweepSettings as SweepSettings
    from bdprune.loops import Trigger as Trigger
    from bdprune.loops import UnlearnSettings as UnlearnSettings
    from bdprune.methods import CurvePoint as CurvePoint
    from bdprune.methods import Detector as Detector
    from bdprune.methods import Phases as Phases
    from bdprune.methods import Purifier as Purifier
    from bdprune.methods import Repair as Repair
    from bdprune.model import Model as Model
    from bdprune.model import Normalization as Normalization
    from bdprune.pipeline import Repaired as Repaired
    from bdprune.pipeline import inspect as inspect
    from bdprune.pipeline import invert as invert
    from bdprune.pipeline import load as load
    from bdprune.pipeline import load_trigger as load_trigger
    from bdprune.pipeline import purify as purify
    from bdprune.pipeline import save_trigger as save_trigger
    from bdprune.pipeline import score as score
    from bdprune.record import Attachment as Attachment
    from bdprune.record import Evidence as Evidence
    from bdprune.record import InspectResult as InspectResult
    from bdprune.record import InvertResult as InvertResult
    from bdprune.record import MethodInfo as MethodInfo
    from bdprune.record import Needs as Needs
    from bdprune.record import PurifyResult as PurifyResult
    from bdprune.record import Result as Result
    from bdprune.record import Rule as Rule
    from bdprune.record import ScoreResult as ScoreResult
    from bdprune.record import ScreenResult as ScreenResult
    from bdprune.record import TriggerInfo as TriggerInfo
    from bdprune.registry import detector as detector
    from bdprune.registry import purifier as purifier
    from bdprune.report import Writer as Writer
    from bdprune.report import html_fragment as html_fragment
    from bdprune.report import html_page as html_page
    from bdprune.runtime import Budget as Budget
    from bdprune.screening import screen as screen
    from bdprune.screening import screen_many as screen_many

__version__ = "0.2.0"

_HOMES = {
    "analysis": ("Analysis", "Case", "attach_triggers", "stack"),
    "data": ("CleanData",),
    "errors": ("BdpruneError", "DataError", "OptionError", "OutputError"),
    "fleet": ("Scanner", "StackOptions", "scan", "scan_many"),
    "loops": ("FineTuneSettings", "InvertSettings", "RecoverSettings", "SweepSettings", "Trigger", "UnlearnSettings"),
    "methods": ("CurvePoint", "Detector", "Phases", "Purifier", "Repair"),
    "model": ("Model", "Normalization"),
    "pipeline": ("Repaired", "inspect", "invert", "load", "load_trigger", "purify", "save_trigger", "score"),
    "record": (
        "Attachment",
        "Evidence",
        "InspectResult",
        "InvertResult",
        "MethodInfo",
        "Needs",
        "PurifyResult",
        "Result",
        "Rule",
        "ScoreResult",
        "ScreenResult",
        "TriggerInfo",
    ),
    "registry": ("detector", "purifier"),
    "report": ("Writer", "html_fragment", "html_page"),
    "runtime": ("Budget",),
    "screening": ("screen", "screen_many"),
}
"""Public names by the package that defines them."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"bdprune.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
