from bdprune.purifiers.anp import ANP
from bdprune.purifiers.awm import AWM
from bdprune.purifiers.clp import CLP
from bdprune.purifiers.fine_pruning import FinePruning
from bdprune.purifiers.nu_fine_pruning import NUFinePruning
from bdprune.purifiers.rnp import RNP
from bdprune.purifiers.suspiciousness import SuspiciousnessPruning
