from bdprune.runtime.batches import Batches, crop_and_flip, passes
from bdprune.runtime.budget import Budget, parse_budget
from bdprune.runtime.evaluate import BATCH, attack_success_rate, clean_accuracy, predict, share_right, within
from bdprune.runtime.frozen import FrozenNetworks, folded_form
from bdprune.runtime.graph import captured
from bdprune.runtime.memory import footprint, weight_bytes
from bdprune.runtime.precision import (
    DEFAULT,
    PRECISIONS,
    Plan,
    Precision,
    autocast,
    check_precision,
    computes_bfloat16,
    convs_of,
    laid_out,
    plain_torch,
    plan_for,
    training_layout,
)
from bdprune.runtime.stacking import STACK_OR_LOOP, WORTH, describe, no_stack, power_of_two, stack_or_loop
from bdprune.runtime.training import (
    OneModel,
    Trained,
    epochs,
    keep_running_statistics,
    mean_losses,
    only,
    seeded,
    trainer_for,
)
from bdprune.runtime.winograd import WinogradConvs
from bdprune.runtime.work import flops, milliseconds
