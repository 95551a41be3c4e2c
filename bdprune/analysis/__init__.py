from bdprune.analysis.lipschitz import channel_lipschitz, channel_lipschitz_of, norm_gain
from bdprune.analysis.outliers import layer_z_scores
from bdprune.analysis.plain import plain_form
from bdprune.analysis.sanity import Sanity, check_sanity
from bdprune.analysis.size import fit_size
from bdprune.analysis.stacks import stack
from bdprune.analysis.statistics import FilterStatistics, filter_statistics
from bdprune.analysis.suspiciousness import Suspiciousness
