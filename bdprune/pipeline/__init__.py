from bdprune.pipeline.device import free_memory, parse_device
from bdprune.pipeline.open import DataShelf, DataSource, ModelSource, load, options_from
from bdprune.pipeline.repair import purify
from bdprune.pipeline.scan import (
    Candidate,
    Clock,
    Job,
    Progress,
    detectors_for,
    examine,
    failure,
    nothing_seen,
    scan_one,
    silent,
    survive,
    take_in,
)
from bdprune.pipeline.scores import score
