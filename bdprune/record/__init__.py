from bdprune.record.base import (
    SCHEMA_VERSION,
    Count,
    Record,
    Share,
    check_settings,
    check_shares,
    finite,
    notebook_form,
    number,
    some,
)
from bdprune.record.evidence import Attachment, Evidence, nothing_seen
from bdprune.record.inspection import EntropyHistogram, ImageVerdict, IncomingInfo, InspectedImage, InspectMethod
from bdprune.record.method import (
    COSTS,
    GIFTS,
    LEVELS,
    NEEDED,
    SIGNS,
    STRONG,
    Cost,
    Gift,
    Images,
    Level,
    MethodInfo,
    Needs,
    Rule,
    Sign,
)
from bdprune.record.parts import (
    ArtifactInfo,
    CalibrationInfo,
    CompactInfo,
    CurveInfo,
    DataInfo,
    Env,
    ErrorInfo,
    FilterScore,
    Finding,
    Histogram,
    LayerScores,
    ModelInfo,
    OutputInfo,
    PassedOver,
    SanityInfo,
    Severity,
    WeightCoverage,
)
from bdprune.record.repair import OUTCOMES, Attempt, Outcome, RepairCheck, TriggerCheck
from bdprune.record.results import (
    ATTENTION,
    KINDS,
    VERDICTS,
    Change,
    CoverageResult,
    Document,
    InspectResult,
    InvertResult,
    PurifyResult,
    Result,
    ScoreResult,
    Verdict,
    documents_from_json,
    schema,
)
from bdprune.record.screening import (
    HeadScreen,
    HeadStatistic,
    LabelStatistic,
    LayerScreen,
    ScreenOutcome,
    ScreenResult,
)
from bdprune.record.shape import parse_shape
from bdprune.record.trigger import MOST_PICTURE_BYTES, TRIGGER_KINDS, Box, TriggerInfo, TriggerKind
