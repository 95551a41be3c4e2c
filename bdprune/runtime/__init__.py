from bdprune.runtime.augment import crop_and_flip
from bdprune.runtime.batch_norm import keep_running_statistics
from bdprune.runtime.evaluate import BATCH, attack_success_rate, clean_accuracy, predict, share_right
from bdprune.runtime.graph import Tensors, captured
from bdprune.runtime.layout import laid_out, training_layout
from bdprune.runtime.memory import footprint, weight_bytes
from bdprune.runtime.paths import KEPT, PathChoice, Way, choose, describe, kept_or_tried, power_of_two
from bdprune.runtime.precision import (
    DEFAULT,
    PRECISIONS,
    Plan,
    Precision,
    autocast,
    check_precision,
    computes_bfloat16,
    convs_of,
    plan_for,
)
from bdprune.runtime.shuffle import Batches, passes
from bdprune.runtime.watch import watch_on
from bdprune.runtime.winograd import WinogradConvs
