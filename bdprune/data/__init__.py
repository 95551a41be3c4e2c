"""Clean data: loading it safely, sampling it, and checking that the model makes sense of it."""

from bdprune.data.clean import CleanData
from bdprune.data.load import load_clean
from bdprune.data.normalizations import parse_normalization
from bdprune.data.sanity import Sanity, check_sanity

__all__ = ["CleanData", "Sanity", "check_sanity", "load_clean", "parse_normalization"]
