from bdprune.analysis.attached_triggers import MOST_PICTURED, attach_triggers, trigger_info, trigger_names
from bdprune.analysis.case import MEMO, Analysis, Case, Memo, outcome_of
from bdprune.analysis.flipped import Flips, flip_table, read_flips
from bdprune.analysis.latent import LabelOrder, Latent, LatentFeatures, LatentMargins, latent_margins, promising_labels
from bdprune.analysis.lipschitz import Lipschitz, channel_lipschitz, channel_lipschitz_of, norm_gain
from bdprune.analysis.moved import (
    RAISED_SHARES,
    RAISED_WEIGHT,
    RaisedPoint,
    easiest_label,
    moved_filters,
    raise_moved,
    raised_counts,
)
from bdprune.analysis.outliers import (
    FEWEST_LABELS,
    UNRESPONSIVE,
    for_few_labels,
    gamma_p_values,
    median,
    robust_z,
    why_no_outlier,
    why_unresponsive,
)
from bdprune.analysis.outstanding import (
    Outstanding,
    SearchFor,
    excess_flips,
    outstanding_triggers,
    search_again,
    with_grown,
)
from bdprune.analysis.raised import PrunedPoint, natural_share, prune_raised, raised_filters, selectivity
from bdprune.analysis.repair_check import CheckLimits, Signs, check_repair, collapse_of, flips_of, signs_of
from bdprune.analysis.sanity import Sanity, SanityLimits, check_sanity
from bdprune.analysis.size import fit_size
from bdprune.analysis.source_search import easiest_pairs, search_sources
from bdprune.analysis.stacks import stack
from bdprune.analysis.statistics import FilterStatistics, Statistics, filter_statistics, last_layer, layer_z_scores
from bdprune.analysis.strip import Judge, StripSettings, judge_for, predicted_labels, strip_settings
from bdprune.analysis.suspiciousness import Suspiciousness
from bdprune.analysis.thresholds import LEAD, MOVED, SMALL_TRIGGER, TWO_CLASS_LEAD, TWO_CLASS_MOVED
from bdprune.analysis.trigger_bytes import dump_trigger, parse_trigger
from bdprune.analysis.trigger_pictures import draw_images, draw_trigger, shown_images
from bdprune.analysis.trigger_search import (
    CLEANSING,
    CREDIT,
    LARGEST,
    PUBLISHED_CLEANSING,
    SEARCHES,
    TINY,
    most_outstanding,
    readable,
    scored,
    search_triggers,
    works,
)
from bdprune.analysis.triggers import Triggers
from bdprune.analysis.unlearned import (
    SCAN_UNLEARNING,
    PlainForm,
    Unlearning,
    from_tensors,
    plain_form,
    tensors_of,
    with_own_statistics,
)
