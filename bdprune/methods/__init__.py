from bdprune.methods.base import (
    CurvePoint,
    Detector,
    Method,
    Phases,
    Purifier,
    Repair,
    Steps,
    accuracy_on,
    what_changed,
)
from bdprune.methods.held_out import hold_out
from bdprune.methods.retraining import Retraining
from bdprune.methods.stack import examine_stack
