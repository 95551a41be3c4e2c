from bdprune.methods.base import CurvePoint, Detector, Evidence, Purified, Purifier, StackDetector
from bdprune.methods.outliers import outlier_evidence
from bdprune.methods.registry import detectors, names, purifier, split_names
