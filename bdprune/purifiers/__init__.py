from bdprune.purifiers.clp import CLP
from bdprune.purifiers.rnp import RNP
from bdprune.purifiers.suspiciousness import SuspiciousnessPruning
