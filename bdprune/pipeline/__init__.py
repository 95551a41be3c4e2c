from bdprune.pipeline.attachments import attachments_folder, with_saved_attachments
from bdprune.pipeline.examination import Examination, Isolated, Recall, checked_evidence
from bdprune.pipeline.inspection import METHODS as INSPECT_METHODS
from bdprune.pipeline.inspection import Watch, inspect
from bdprune.pipeline.inversion import Wanted, invert, recover_triggers
from bdprune.pipeline.open import (
    CleanSource,
    DataSource,
    ModelSource,
    OptionNames,
    Options,
    free_memory,
    is_local,
    load,
    options_from,
    parse_device,
)
from bdprune.pipeline.repair import Repaired, purify
from bdprune.pipeline.scan import (
    CallersRandom,
    Clock,
    Job,
    Opened,
    Outcome,
    Progress,
    concluded,
    detectors_for,
    examined,
    failure,
    open_cases,
    scan_one,
    short_id,
    silent,
    stage_of,
    start_examination,
    survived,
)
from bdprune.pipeline.scores import score
from bdprune.pipeline.triggers import load_trigger, save_trigger
