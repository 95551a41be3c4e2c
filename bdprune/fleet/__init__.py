from bdprune.fleet.calibration import Calibrated, as_scanned, calibrate, calibration_page
from bdprune.fleet.demo import Row, against_truth, run
from bdprune.fleet.executors.stack import StackOptions
from bdprune.fleet.references import ReferenceScan, ReferenceZoo, scan_references
from bdprune.fleet.scans import Scanner, scan, scan_many
from bdprune.sources import Source, Sources, check_exists, expand
