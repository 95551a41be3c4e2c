from bdprune.pipeline.attachments import attachments_folder, with_saved_attachments
from bdprune.pipeline.inversion import Wanted, invert, recover_triggers
from bdprune.pipeline.open import (
    CleanSource,
    DataSource,
    ModelSource,
    OptionNames,
    Options,
    free_memory,
    load,
    options_from,
    parse_device,
)
from bdprune.pipeline.repair import Repaired, purify
from bdprune.pipeline.scan import (
    Clock,
    Isolated,
    Job,
    Opened,
    Outcome,
    Progress,
    checked_evidence,
    detectors_for,
    examined,
    failure,
    open_cases,
    scan_one,
    short_id,
    silent,
    survived,
)
from bdprune.pipeline.scores import score
from bdprune.pipeline.triggers import load_trigger, save_trigger
