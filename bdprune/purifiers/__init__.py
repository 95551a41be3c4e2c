from bdprune.purifiers.fine_tuning import FineTuning
from bdprune.purifiers.fst import FST
from bdprune.purifiers.ft_sam import FTSAM
from bdprune.purifiers.ibau import IBAU
from bdprune.purifiers.nad import NAD
from bdprune.purifiers.rnp import RNP
from bdprune.purifiers.suspiciousness import SuspiciousnessPruning
