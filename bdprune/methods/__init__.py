from bdprune.methods.base import NO_CONVS, Detector, Method, Steps
from bdprune.methods.held_out import hold_out, mixed_views, shifted_views, sure_drop, views_drop
from bdprune.methods.purifier import CurvePoint, Phases, Purifier, Repair, accuracy_on, limits_of, what_changed
from bdprune.methods.retraining import Retraining
from bdprune.methods.stack import examine_stack
from bdprune.methods.trigger_purifier import TriggerPurifier
