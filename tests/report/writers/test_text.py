"""Text reports: verdict first, aligned, and safe to print."""

from __future__ import annotations

import re

import msgspec

from bdprune.record import (
    ArtifactInfo,
    CoverageResult,
    Document,
    InvertResult,
    PurifyResult,
    Result,
    ScoreResult,
    TriggerInfo,
)
from bdprune.report import Style, plain, summary, table, writer

from ..conftest import CIFAR10

TENSORS = "trigger-8-1212.safetensors"


def text_of(*documents: Document | CoverageResult, colour: bool = False) -> str:
    return writer("text").render(documents, Style(colour=colour))


def test_a_scan_shows_verdict_label_evidence_and_findings(backdoored: Result) -> None:
    lines = text_of(backdoored).splitlines()
    assert lines[0] == "BACKDOORED  models/badnets.pth"
    assert lines[1].strip() == "This network carries a backdoor that leads to label 8 (ship)."
    assert "  risk    0.994" in lines and "  target  label 8 (ship)" in lines
    assert "  data    500 images of 10 classes from clean/cifar10, clean accuracy 93.4 %" in lines
    assert "  time    12.5 s on cpu, native ops" in lines
    row = next(line for line in lines if line.startswith("  bdprune.unlearning"))
    assert row.split() == ["bdprune.unlearning", "0.981", "0.6", "flagged", "8", "9.2", "s"]
    assert lines[-1].startswith("  BD101 critical: ")


def test_triggers_targets_and_sources_have_a_line_each(triggered: Result) -> None:
    lines = text_of(triggered).splitlines()
    start = "  bdprune.inversion, "
    assert [line.removeprefix(start) for line in lines if line.startswith(start)] == [
        f"targets: labels {', '.join(f'{label} ({name})' for label, name in enumerate(CIFAR10))}",
        "sources: labels 3 (cat), 5 (dog)",
        "trigger: patch, label 8 (ship), 3x3 pixels at (28, 28), flips 97 % of 250 held-out images",
        "trigger: additive, away from the true label for images of labels 3 (cat), 5 (dog), spread over the image, "
        "not tried on held-out images",
    ]


def test_recovered_triggers_have_a_row_each(inverted: InvertResult) -> None:
    lines = text_of(inverted).splitlines()
    assert lines[0] == "TRIGGERS  models/badnets.pth"
    assert {"  written to    triggers", "  not searched  patch for label 3"} <= set(lines)
    assert "  search        stopped early, because the time was too short" in lines
    head = next(index for index, line in enumerate(lines) if line.startswith("  kind"))
    place = "spread over the image"
    assert [re.split("  +", line.strip()) for line in lines[head : head + 3]] == [
        ["kind", "leads to", "images of", "smallest", "size", "place", "flips held-out images", "file"],
        ["patch", "label 8 (ship)", "other labels", "5.5", "9.4", "3x3 pixels at (28, 28)", "97 % of 250", TENSORS],
        ["additive", "away from the true label", "labels 3 (cat), 5 (dog)", "none found", "40", place, "–"],
    ]
    assert "scan the model for a verdict" in lines[-1]


def test_of_many_recovered_triggers_the_first_have_a_row(inverted: InvertResult, patch: TriggerInfo) -> None:
    many = {"triggers": (patch,) * 1001, "smallest": (1.0,) * 1001, "skipped": (), "complete": True, "folder": ""}
    text = text_of(msgspec.structs.replace(inverted, **many))
    assert text.count("label 8 (ship)") == 20 and "  and 981 more\n" in text
    assert not any(words in text for words in (TENSORS, "written to", "not searched", "stopped early"))


def test_of_many_triggers_the_first_are_listed(triggered: Result, patch: TriggerInfo) -> None:
    many = msgspec.structs.replace(triggered.detectors[2], triggers=(patch,) * 12)
    text = text_of(msgspec.structs.replace(triggered, detectors=(many,)))
    assert text.count("trigger: patch") == 5 and "  bdprune.inversion, trigger: and 7 more\n" in text


def test_columns_line_up() -> None:
    assert table([("a", "number"), ("longer", "1")], "lr") == ["  a       number", "  longer       1"]


def test_error_is_short(failed: Result) -> None:
    text = text_of(failed)
    assert text == "ERROR  models/broken.pth\n  The archive is cut off.\n  Download it again.\n"


def test_an_inconclusive_result_reports_the_lack_of_data(inconclusive: Result) -> None:
    text = text_of(inconclusive)
    assert "  data    none" in text and "BD000 medium: No clean data was given." in text


def test_several_models_are_counted_and_the_worst_come_first(backdoored: Result, clean: Result, failed: Result) -> None:
    text = text_of(clean, failed, backdoored)
    lines = text[text.index("  verdict") :].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["backdoored", "error", "clean"]
    assert lines[-1] == "  3 models: 1 backdoored, 1 error, 1 clean"
    assert text.startswith("ERROR  models/broken.pth\n") and "\n\nBACKDOORED  models" in text
    assert "CLEAN" not in text, "a clean result among several has no block"


def test_repairs_and_scores_next_to_several_scans_are_shown(
    clean: Result, repaired: PurifyResult, scored: ScoreResult
) -> None:
    text = text_of(clean, repaired, scored, clean)
    assert "REPAIRED  models/badnets.pth" in text and "lipschitz scores" in text and "2 models: 2 clean" in text


def test_skipped_files_come_last(clean: Result, coverage: CoverageResult) -> None:
    last = text_of(clean, coverage).split("\n\n")[-1].splitlines()
    assert last == [
        "  Skipped: 3 of 5 files",
        "    MAY HOLD WEIGHTS: ONNX: models/net.onnx",
        "    text: models/a.txt, models/b.txt",
    ]
    assert text_of(coverage).startswith("0 models: nothing scanned\n")


def test_colour_is_used_only_on_request(
    backdoored: Result, clean: Result, repaired: PurifyResult, scored: ScoreResult
) -> None:
    for documents in ([backdoored], [backdoored, clean], [repaired], [scored]):
        assert "\x1b" not in text_of(*documents)
        assert "\x1b" in text_of(*documents, colour=True)
    assert text_of(backdoored, clean, colour=True).count("\x1b[1;31m") == 2


def test_texts_of_evidence_are_shown_once(backdoored: Result, clean: Result) -> None:
    first, second = clean.detectors
    odd = msgspec.structs.replace(second, score=None, error="The loss is not finite.", p_value=0.04)
    lines = text_of(msgspec.structs.replace(clean, detectors=(first, odd))).splitlines()
    row = next(line for line in lines if line.startswith("  bdprune.lipschitz"))
    assert row.split() == ["bdprune.lipschitz", "–", "5", "failed", "0.04", "0.03", "s"]
    assert "  bdprune.lipschitz, error: The loss is not finite." in lines
    assert "  bdprune.unlearning, remark: The lead is taken over 1 order of 500 images." in lines
    said = msgspec.structs.replace(backdoored.findings[0], message=f"Flagged. {first.remarks[0]}")
    assert text_of(msgspec.structs.replace(backdoored, findings=(said,))).count(first.remarks[0]) == 1


def test_attachments_in_files_are_listed(clean: Result, retrained: PurifyResult) -> None:
    words = "filter_scores, 9.6 kB, in scores.safetensors"
    assert f"  bdprune.lipschitz, attached: {words}\n" in text_of(clean)
    assert "attached" not in text_of(retrained)


def test_a_repair_shows_before_after_and_the_file(repaired: PurifyResult) -> None:
    lines = text_of(repaired).splitlines()
    assert lines[0] == "REPAIRED  models/badnets.pth"
    assert {
        "  change          pruned 41 of 2400 filters in 2 filter groups",
        "  chosen by       largest with a drop of at most 2 points on held-out clean data",
        "  clean accuracy  93.0 % → 92.0 %",
        "  threshold       0.35",
        "  target          label 8",
        "  steps           unlearn 4.0 s, recover 6.5 s, sweep 2.0 s",
        "  written to      repaired.pth (11.2 MB)",
    } <= set(lines)
    assert "not written" in text_of(msgspec.structs.replace(repaired, output=None))
    assert text_of(msgspec.structs.replace(repaired, change="nothing")).startswith("UNCHANGED")
    assert text_of(msgspec.structs.replace(repaired, left=("ema: not chosen",))).startswith("PARTLY REPAIRED")


def test_a_compact_repair_shows_what_it_saves_and_what_stays(compacted: PurifyResult) -> None:
    lines = [re.sub(" {2,}", "  ", line) for line in text_of(compacted).splitlines()]
    assert {
        "  filters removed  30 of 41 pruned",
        "  parameters  176,402 → 124,662",
        "  FLOPs per image  17,745,152 → 12,545,292",
        "  time per image  1.75 → 1.5 ms",
        "  largest difference  4.5e-07 in a logit",
        "  not removed  layer4.0.conv1: 11 of 11 pruned filters stay: the logits would change",
        "  described in  repaired.pth.arch.json",
    } <= set(lines)


def test_a_repair_that_only_retrained_has_no_filters_and_no_threshold(retrained: PurifyResult) -> None:
    text = text_of(retrained)
    assert text.startswith("REPAIRED") and "  change          retrained the weights\n" in text
    assert "filter" not in text and "threshold" not in text and "prune" not in text
    assert "  steps           fine tune 30.0 s\n" in text


def test_scores_list_layers_and_the_worst_filters(scored: ScoreResult) -> None:
    text = text_of(scored)
    assert text.startswith("lipschitz scores  models/badnets.pth\n")
    assert "layer5.conv1[17]" in text and text.count(".conv1 ") == 6


def test_control_characters_cannot_reach_the_terminal(backdoored: Result) -> None:
    evil = "models/\x1b]0;title\x07\x1b[2J\n\rclean\u202e.pth"
    text = text_of(msgspec.structs.replace(backdoored, artifact=ArtifactInfo(path=evil)))
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert text.splitlines()[0].startswith("BACKDOORED  models/") and "clean" in text.splitlines()[0]
    assert plain("naïve µ 漢字") == "naïve µ 漢字"


def test_says_what_to_do_next(backdoored: Result, repaired: PurifyResult) -> None:
    lines = text_of(backdoored).splitlines()
    assert lines[2] == f"  {summary.ADVICE['backdoored']}"
    assert text_of(repaired).splitlines()[-1] == f"  {summary.repair_advice(repaired)}"
    assert "may leave the backdoor" in summary.repair_advice(repaired)


def test_a_stream_and_its_ending_are_the_text_of_all_results(
    backdoored: Result, clean: Result, failed: Result, coverage: CoverageResult
) -> None:
    text, style, results = writer("text"), Style(several=True), [clean, failed, backdoored]
    blocks = [found for one in results if (found := text.render([one], style))]
    end = text.ending([*(one.brief() for one in results), coverage], style)
    assert text.separator.join([*blocks, end]) == text.render([*results, coverage])
    assert text.ending([clean.brief()], Style()) == "", "the block of a single result says everything"
    assert text.ending([], Style(several=True)) == "0 models: nothing scanned\n"
