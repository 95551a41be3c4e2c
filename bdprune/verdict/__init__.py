from bdprune.verdict.calibration import Calibration, own_table, read_table, table_for
from bdprune.verdict.evaluation import Evaluation, Known, Measure, Rate, evaluate, fit_table
from bdprune.verdict.judgement import MOVED_FILTERS, Judgement, judge, with_p_value
from bdprune.verdict.rules import ATLAS, CONFIRMED, NATURAL, NOT_JUDGED, NOT_SCANNED, RULES, UNUSUAL
