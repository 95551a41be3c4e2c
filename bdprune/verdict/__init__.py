from bdprune.verdict.judgement import judge
from bdprune.verdict.rules import ATLAS, CONFIRMED, NOT_JUDGED, NOT_SCANNED, RULES
