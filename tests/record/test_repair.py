from bdprune.record import OUTCOMES, RepairCheck, TriggerCheck

TRIGGER = TriggerCheck(
    name="patch to label 1", flips_before=0.9, flips_after=0.3, score_before=4.0, score_after=1.0, reactivated=0.4
)


def test_the_outcome_follows_from_the_signs() -> None:
    assert RepairCheck().outcome == "unverified"
    assert RepairCheck(triggers=(TRIGGER,)).outcome == "repaired"
    assert RepairCheck(lead_before=0.3, lead_after=0.0).outcome == "repaired"
    assert RepairCheck(moved_before=0.5, moved_after=0.0).outcome == "repaired"
    assert RepairCheck(triggers=(TRIGGER,), left=("it flips images",)).outcome == "unrepaired"
    assert set(OUTCOMES) == {"repaired", "unrepaired", "unverified", "unchecked"}


def test_severity_counts_signs_before_flips() -> None:
    assert RepairCheck(triggers=(TRIGGER,)).severity == (0, 0.4)
    assert RepairCheck(lead_before=0.3, lead_after=0.1).severity == (0, 0.1)
    assert RepairCheck(left=("one",)).severity > RepairCheck(triggers=(TRIGGER,)).severity
