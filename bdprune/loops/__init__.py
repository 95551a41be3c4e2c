from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.loops.fitting import CrossEntropy, Objective, Schedule, fit, machine, seeded
from bdprune.loops.pruned import PrunedPredictions, Pruning
from bdprune.loops.recovery import Recovered, RecoverSettings, recover
from bdprune.loops.resume import Checkpoint, digest
from bdprune.loops.sweep import Sweep, SweepPoint, below, sweep_models, sweep_thresholds
from bdprune.loops.together import recover_together, unlearn_together
from bdprune.loops.trajectory import flip_shares, halves, leaders, mean_shares, middle_half, sink_label, top_label
from bdprune.loops.unlearning import Unlearned, UnlearnSettings, unlearn
