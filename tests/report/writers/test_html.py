"""The HTML report: one file, the verdict first, untrusted text escaped."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser

import msgspec

from bdprune.record import ArtifactInfo, CoverageResult, Document, InvertResult, PurifyResult, Result, TriggerInfo
from bdprune.report import Table, html_page, writer

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(*documents: Document | CoverageResult) -> Reader:
    reader = Reader()
    reader.feed(html_page(documents))
    assert not reader.open
    return reader


def words(reader: Reader) -> str:
    return " ".join(" ".join(reader.text).split())


def test_the_verdict_comes_before_everything_else_about_the_model(backdoored: Result) -> None:
    text = words(read(backdoored))
    parts = ("backdoored", "leads to label 8 (ship)", "0.99", "Evidence", "Model, data and environment")
    order = [text.index(part) for part in parts]
    assert order == sorted(order)


def test_the_page_needs_no_other_files_and_runs_no_scripts(everything: list[Document]) -> None:
    reader = read(*everything)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for _, attrs in reader.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
        assert (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = [attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "url(" not in html_page(everything) and "@import" not in html_page(everything)


def test_untrusted_text_is_escaped_everywhere(backdoored: Result, repaired: PurifyResult, patch: TriggerInfo) -> None:
    evil = "</title></style><script>alert(1)</script>\"'><svg onload=x>"
    names = (evil,) * 10
    attached = msgspec.structs.replace(backdoored.detectors[1].attachments[0], media_type=evil, file=evil)
    details = {evil: evil, "layers": [{"layer": evil, "max_z": 1.0}], "flip_shares": [0.1] * 10}
    said = {"remarks": (evil,), "limits": (evil,), "error": evil, "attachments": (attached,), "targets": (0, 1)}
    said["triggers"] = (msgspec.structs.replace(patch, file=evil, attachment=evil, source_labels=(1, 2)),)
    detectors = tuple(
        msgspec.structs.replace(one, detector=evil, params={evil: evil}, details=details, **said)
        for one in backdoored.detectors
    )
    assert backdoored.data and backdoored.model
    scan = msgspec.structs.replace(
        backdoored,
        artifact=ArtifactInfo(path=evil, format=evil, state_key=evil),
        model=msgspec.structs.replace(backdoored.model, arch=evil),
        data=msgspec.structs.replace(backdoored.data, class_names=names, source=evil, notes=names),
        detectors=detectors,
        findings=tuple(msgspec.structs.replace(one, message=evil) for one in backdoored.findings),
    )
    changes = {"selection": evil, "pruned": {evil: (1,)}, "phases": {evil: 1.0}, "attachments": (attached,)}
    repair = msgspec.structs.replace(repaired, method=evil, **changes)
    page = html_page([scan, scan, repair], evil)
    assert "<script" not in page and "onload=x>" not in page
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any("onload" in attrs for _, attrs in reader.tags)


def test_charts_are_well_formed_titled_and_inside_their_frame(everything: list[Document]) -> None:
    page = html_page(everything)
    charts = [part.split("</svg>")[0] for part in page.split('<svg class="chart"')[1:]]
    assert len(charts) >= 8
    for chart in charts:
        tree = ElementTree.fromstring(f'<svg class="chart"{chart}</svg>')
        title = tree.find("title")
        assert tree.get("role") == "img" and title is not None and title.text
        assert "nan" not in chart.lower() and "inf" not in chart.lower()
        for shape in tree.iter("circle"):
            assert 0 <= float(shape.get("cx", "-1")) <= 560 and 0 <= float(shape.get("cy", "-1")) <= 260
        for shape in tree.iter("rect"):
            assert float(shape.get("height", "-1")) > 0 and float(shape.get("y", "-1")) >= 0


def test_the_table_of_models_links_to_every_model(backdoored: Result, clean: Result, failed: Result) -> None:
    reader = read(backdoored, clean, failed)
    targets = {attrs["href"] for tag, attrs in reader.tags if tag == "a"}
    ids = {f"#{attrs['id']}" for _, attrs in reader.tags if "id" in attrs}
    assert targets == {"#m1", "#m2", "#m3"} and targets <= ids
    assert "3 models: 1 backdoored, 1 error, 1 clean" in words(reader)


def test_one_model_has_no_table_of_models(clean: Result) -> None:
    assert "fleet" not in {attrs.get("id") for _, attrs in read(clean).tags}


def test_an_error_shows_message_and_hint_and_no_evidence(failed: Result) -> None:
    text = words(read(failed))
    assert "The archive is cut off." in text and "Download it again." in text
    assert "Evidence" not in text


def test_a_repair_shows_before_and_after(repaired: PurifyResult) -> None:
    text = words(read(repaired))
    assert "93.0 % 92.0 %" in text and "2400 2359" in text and "chosen: 0.35" in text
    unchanged = words(read(msgspec.structs.replace(repaired, change="nothing", pruned={}, filters_pruned=0)))
    assert "not safer than before" in unchanged and "not safer" not in text


def test_a_compact_repair_shows_what_it_saves_and_what_stays(compacted: PurifyResult, repaired: PurifyResult) -> None:
    text = words(read(compacted))
    assert "Parameters 176402 124662 FLOPs per image 17745152 12545292 Milliseconds per image 1.75 1.5" in text
    assert "Removed 30 of 41 pruned filters" in text and "11 of 11 pruned filters stay" in text
    assert "description repaired.pth.arch.json" in text
    assert "FLOPs" not in words(read(repaired))


def test_a_repair_that_only_retrained_has_no_filters_and_no_threshold(retrained: PurifyResult) -> None:
    text = words(read(retrained))
    assert text.index("repaired") < text.index("x.fine_tuning retrained the weights.") and "unchanged" not in text
    assert "Change retrained after the last of 10 epochs" in text and "Steps: fine tune 30.0 s." in text
    assert "Active filters" not in text and "hreshold" not in text and "runed" not in text


def test_evidence_shows_remarks_limits_errors_and_p_values(clean: Result) -> None:
    assert "p-value" not in words(read(clean))
    one = msgspec.structs.replace(
        clean.detectors[0], p_value=0.04, near=True, limits=("Few images.",), not_applicable="No batch norm."
    )
    text = words(read(msgspec.structs.replace(clean, detectors=(one,))))
    assert "p-value" in text and "0.04" in text and "not flagged, near" in text
    assert "remark The lead is taken over 1 order of 500 images. limit Few images." in text
    assert "not applicable No batch norm." in text


def test_triggers_are_shown_with_their_pictures(triggered: Result, patch: TriggerInfo) -> None:
    reader = read(triggered)
    text = words(reader)
    assert "Trigger: patch, label 8 (ship), 3x3 pixels at (28, 28), flips 97 % of 250 held-out images" in text
    assert (
        "Trigger: additive, away from the true label for images of labels 3 (cat), 5 (dog), spread over the image"
        in text
    )
    assert "Mask and pattern at full size: trigger-8-1212.safetensors" in text
    assert "targets labels 0 (airplane), 1 (automobile)" in text and "sources labels 3 (cat), 5 (dog)" in text
    shown = [attrs for tag, attrs in reader.tags if tag == "img"]
    assert [one["alt"] for one in shown] == [
        "mask",
        "pattern",
        "clean images with the trigger",
        "its changes, times 10",
    ]
    start = "data:image/png;base64,"
    assert [b64decode((one["src"] or "").removeprefix(start)) for one in shown] == list(patch.pictures.values())


def test_recovered_triggers_are_a_table_and_pictures(inverted: InvertResult) -> None:
    reader = read(inverted)
    text = words(reader)
    assert "patch label 8 (ship) other labels 5.5 9.4 3x3 pixels at (28, 28) 97 % of 250" in text
    assert "additive away from the true label labels 3 (cat), 5 (dog) none found 40 spread over the image –" in text
    assert "Not searched: patch for label 3." in text and "The search stopped early" in text
    assert "The files are in triggers ." in text and "scan the model for a verdict" in text
    assert text.count("Trigger: patch") == 1 and "Trigger: additive" not in text
    assert sum(tag == "img" for tag, _ in reader.tags) == 4


def test_the_page_of_a_result_read_from_json_has_the_same_pictures(triggered: Result) -> None:
    assert html_page([Result.from_json(triggered.to_json())]) == html_page([triggered])


def test_attachments_are_named_with_size_digest_and_file(clean: Result, retrained: PurifyResult) -> None:
    digest = "12" * 32
    assert f"filter_scores application/safetensors 9.6 kB scores.safetensors {digest}" in words(read(clean))
    assert f"teacher application/safetensors 9.6 kB not written {digest}" in words(read(retrained))


def test_skipped_files_are_a_table(clean: Result, coverage: CoverageResult) -> None:
    text = words(read(clean, coverage))
    assert "Skipped: 3 of 5 files" in text and "possible ONNX 1 models/net.onnx" in text
    assert writer("html").render([clean, coverage]) == html_page([clean, coverage])


def test_a_table_on_top_comes_first_and_is_escaped(clean: Result) -> None:
    top = Table("Outcome <b>", ("model", "verdict"), [("a<i>", "clean")], "How <u>it</u> was measured.")
    page = html_page([clean], top=top)
    assert "<i>" not in page and "<u>" not in page and "Outcome &lt;b&gt;" in page
    assert page.index("a&lt;i&gt;") < page.index('class="banner')
    assert '<span class="pill clean">clean</span>' in page


def test_no_results_still_give_a_page() -> None:
    assert "Nothing was scanned." in words(read())


def test_details_of_unexpected_shape_are_listed_not_drawn(clean: Result) -> None:
    odd = msgspec.structs.replace(
        clean.detectors[0], details={"trajectory": "up and down", "flip_shares": [1, None], "layers": [{"name": "x"}]}
    )
    text = words(read(msgspec.structs.replace(clean, detectors=(odd,))))
    assert "up and down" in text and "step by step" not in text
