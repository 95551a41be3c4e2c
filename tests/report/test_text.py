"""Text reports: verdict first, aligned, and safe to print."""

from __future__ import annotations

import msgspec

from bdprune.record import ArtifactInfo, PurifyResult, Result, ScoreResult
from bdprune.report.text import fleet_text, plain, purify_text, scan_text, score_text, table


def test_scan_says_verdict_label_evidence_and_findings(backdoored: Result) -> None:
    lines = scan_text(backdoored).splitlines()
    assert lines[0] == "BACKDOORED  models/badnets.pth"
    assert lines[1].strip() == "This network carries a backdoor that leads to label 8 (ship)."
    assert "  risk    0.994" in lines and "  target  label 8 (ship)" in lines
    assert "  data    500 images of 10 classes from clean/cifar10, clean accuracy 93.4 %" in lines
    assert "  time    12.5 s on cpu, native ops" in lines
    row = next(line for line in lines if line.startswith("  bdprune.unlearning"))
    assert row.split() == ["bdprune.unlearning", "0.981", "0.6", "flagged", "8", "9.2", "s"]
    assert lines[-1].startswith("  BD101 critical: ")


def test_columns_line_up() -> None:
    assert table([("a", "number"), ("longer", "1")], "lr") == ["  a       number", "  longer       1"]


def test_error_is_short(failed: Result) -> None:
    text = scan_text(failed)
    assert text == "ERROR  models/broken.pth\n  The archive is cut off.\n  Download it again.\n"


def test_inconclusive_says_that_there_is_no_data(inconclusive: Result) -> None:
    text = scan_text(inconclusive)
    assert "  data    none" in text and "BD000 medium: No clean data was given." in text


def test_fleet_puts_the_worst_first_and_counts(backdoored: Result, clean: Result, failed: Result) -> None:
    lines = fleet_text([clean, failed, backdoored]).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["backdoored", "error", "clean"]
    assert lines[-1] == "  3 models: 1 backdoored, 1 error, 1 clean"


def test_colour_only_when_asked(backdoored: Result, clean: Result, repaired: PurifyResult, scored: ScoreResult) -> None:
    for write in (scan_text, lambda one, colour=False: fleet_text([one, clean], colour=colour)):
        assert "\x1b" not in write(backdoored)
        assert "\x1b[1;31m" in write(backdoored, colour=True)
    assert "\x1b" not in purify_text(repaired) + score_text(scored)
    assert "\x1b" in purify_text(repaired, colour=True) and "\x1b" in score_text(scored, colour=True)


def test_repair_says_before_after_and_where(repaired: PurifyResult) -> None:
    text = purify_text(repaired)
    assert "  clean accuracy  93.0 % → 92.0 %" in text
    assert "  pruned          41 of 2400 filters in 2 groups" in text
    assert "  threshold       0.35 (largest with a drop" in text
    assert "  written to      repaired.pth (11.2 MB)" in text
    assert "not written" in purify_text(msgspec.structs.replace(repaired, output=None))
    assert text.startswith("REPAIRED")
    assert purify_text(msgspec.structs.replace(repaired, change="nothing", pruned={}, filters_pruned=0)).startswith(
        "UNCHANGED"
    )


def test_scores_list_layers_and_the_worst_filters(scored: ScoreResult) -> None:
    text = score_text(scored)
    assert text.startswith("lipschitz scores  models/badnets.pth\n")
    assert "layer5.conv1[17]" in text and text.count(".conv1 ") == 6


def test_control_characters_cannot_reach_the_terminal(backdoored: Result) -> None:
    evil = "models/\x1b]0;title\x07\x1b[2J\n\rclean\u202e.pth"
    text = scan_text(msgspec.structs.replace(backdoored, artifact=ArtifactInfo(path=evil)))
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert text.splitlines()[0].startswith("BACKDOORED  models/") and "clean" in text.splitlines()[0]
    assert plain("naïve µ 漢字") == "naïve µ 漢字"
