from bdprune.verdict.judgement import Judgement, judge
from bdprune.verdict.rules import ATLAS, CONFIRMED, NATURAL, NOT_JUDGED, NOT_SCANNED, RULES
