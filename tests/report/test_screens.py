"""bdprune.report.screens: texts that never call a model clean."""

from __future__ import annotations

from bdprune.record import (
    ArtifactInfo,
    ErrorInfo,
    HeadScreen,
    HeadStatistic,
    LayerScreen,
    ScreenOutcome,
    ScreenResult,
)
from bdprune.report import html_page, screens, writer
from bdprune.report.base import Style

LAYER = LayerScreen(layer="layer4.conv2", norm="layer4.bn2", filters=64, filter=17, max=2.5, max_z=3.375)
HEAD = HeadScreen(
    layer="fc",
    labels=10,
    statistics=(HeadStatistic(statistic="mean", label=4, value=0.5, z=7.25, threshold=6.0, flagged=True),),
)


def result(outcome: ScreenOutcome, path: str = "a<b>.pth") -> ScreenResult:
    failed = outcome == "error"
    return ScreenResult(
        version="1",
        started="2026-11-20T22:49:13+00:00",
        seconds=0.02,
        artifact=ArtifactInfo(path=path),
        outcome=outcome,
        reasons=("Label 4 stands out.",) if outcome == "look closer" else (),
        threshold=6.0,
        layers=() if failed else (LAYER,),
        heads=() if failed else (HEAD,),
        unscreened=("averaged[0]",) if outcome == "look closer" else (),
        error=ErrorInfo(type="ArtifactError", message="It is damaged.", hint="Fetch it.") if failed else None,
    )


EACH = [result("nothing found", "n.pth"), result("error", "e.pth"), result("look closer", "l.pth")]


def test_texts() -> None:
    nothing, error, look = EACH
    assert screens.headline(nothing) == "No filter and no label stands out in the weights."
    assert screens.headline(look) == "Label 4 stands out." and screens.headline(error) == "It is damaged."
    assert screens.advice(error) == "Fetch it. Treat it as not screened."
    assert screens.peak(nothing) == "3.375 in layer4.conv2[17]" and screens.peak(error) == "–"
    assert screens.head(HEAD) == "10 labels; largest z: mean 7.25 (label 4)"
    assert screens.head(HeadScreen(layer="fc", labels=3)) == "3 labels, too few for one to stand out"
    assert screens.tally(EACH) == "3 models: 1 look closer, 1 error, 1 nothing found"
    assert [one.name for one in sorted(EACH, key=screens.rank)] == ["l.pth", "e.pth", "n.pth"]
    assert "clean" not in screens.STYLE.values()


def test_one_text_block() -> None:
    text = writer("text", "screen").render([result("look closer")])
    assert text.splitlines()[0] == "LOOK CLOSER  a<b>.pth" and "not screened  averaged[0]" in text


def test_many_in_a_table_with_the_sound_ones_only_there() -> None:
    text = writer("text", "screen").render(EACH, Style(colour=True))
    assert "NOTHING FOUND" not in text and "\x1b[33mlook closer\x1b[0m" in text
    assert "3 models: 1 look closer, 1 error, 1 nothing found" in text


def test_the_page_escapes_names_and_shows_layers_of_one_model() -> None:
    page = html_page([result("look closer")])
    assert "a&lt;b&gt;.pth" in page and "a<b>" not in page and "layer4.bn2" in page and "averaged[0]" in page
    page = html_page(EACH)
    assert "3 models: 1 look closer" in page and "layer4.bn2" not in page and "Nothing was scanned" not in page
