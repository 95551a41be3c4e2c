from bdprune.fleet.demo import Row, against_truth, run
from bdprune.fleet.executors.stack import StackOptions
from bdprune.fleet.scans import scan, scan_many
from bdprune.fleet.sources import Sources, check_exists, expand
