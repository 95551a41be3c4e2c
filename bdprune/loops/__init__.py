from bdprune.loops.activation import ActivationSettings, raise_features
from bdprune.loops.adversarial_mask import AdversarialMaskSettings, learn_masks
from bdprune.loops.distillation import AttentionDistillation, FeatureMap, attention, last_maps
from bdprune.loops.finetune import FineTuneSettings, KeptPruned, TuningObjective, fine_tune
from bdprune.loops.fitting import CrossEntropy, Objective, Schedule, fit, machine
from bdprune.loops.growth import GrowthSettings, grow
from bdprune.loops.implicit import ImplicitSettings, unlearn_perturbations
from bdprune.loops.inversion.candidates import PenaltyRule
from bdprune.loops.inversion.hypotheses import Hypothesis, every_target
from bdprune.loops.inversion.scoring import size_score, size_scores
from bdprune.loops.inversion.search import invert, split_images
from bdprune.loops.inversion.settings import Inversion, InvertSettings, Recovery, Stage
from bdprune.loops.inversion.trigger import Trigger, largest_size
from bdprune.loops.isolation import Ascent, IsolationSettings, Trapping, isolate
from bdprune.loops.margin import Cut, MarginSettings, cut_at, largest_margins, margins
from bdprune.loops.perturbation import ChangeSettings, Found, PerturbSettings, smallest_triggers, universal_change
from bdprune.loops.predictions import PrunedPredictions, Pruning
from bdprune.loops.recovery import Recovered, RecoverSettings, recover, recover_stack
from bdprune.loops.resume import Checkpoint, digest
from bdprune.loops.sharpness import SharpnessAware
from bdprune.loops.soft_mask import SoftMasks, SoftMaskSettings, soft_masks
from bdprune.loops.stamping import StampedAndTaught, StampedLabels, Stamper, Stamping, TargetAscent, TargetComplement
from bdprune.loops.sweeping import Sweep, SweepPoint, SweepSettings, below, sweep, sweep_stack
from bdprune.loops.unlearning import (
    Unlearned,
    UnlearnSettings,
    UnlearnStep,
    flip_shares,
    halves,
    leaders,
    mean_shares,
    middle_half,
    sink_label,
    top_label,
    unlearn,
    unlearn_stack,
)
