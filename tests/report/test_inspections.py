"""Reports of an inspection of images: text and HTML, with pictures, histograms and untrusted names."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from base64 import b64encode

import msgspec
import numpy as np
import pytest

from bdprune.files import encode_png
from bdprune.record import EntropyHistogram, IncomingInfo, InspectedImage, InspectResult, Result
from bdprune.report import Style, html_page, inspections, writer

PICTURE = encode_png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def image(index: int, entropy: float | None, **changes: object) -> InspectedImage:
    suspicious = entropy is not None and entropy < 0.4
    base: dict[str, object] = {
        "index": index,
        "name": f"incoming/{index}.png",
        "verdict": "unknown" if entropy is None else "suspicious" if suspicious else "normal",
        "entropy": entropy,
        "p_value": None if entropy is None else 0.0025 if suspicious else 0.5,
        "predicted": 8 if suspicious else 3,
    }
    return InspectedImage(**(base | changes))  # type: ignore[arg-type]


@pytest.fixture
def inspected(clean: Result) -> InspectResult:
    """Two suspicious images with pictures, five normal ones, and one that could not be read."""
    common = {name: getattr(clean, name) for name in ("started", "seconds", "artifact", "model", "data", "env")}
    entropies = [1.2, 0.01, 1.9, 0.3, 1.1, 0.9, 2.0]
    images = [image(index, value, picture=PICTURE if value < 0.4 else b"") for index, value in enumerate(entropies)]
    edges = tuple(index / 4 for index in range(9))
    return InspectResult(
        **common,
        method="strip",
        verdict="suspicious",
        incoming=IncomingInfo(
            source="incoming", count=8, unread=1, digest="sha256:00", notes=("8 images were resized.",)
        ),
        threshold=0.4,
        frr=0.01,
        overlays=100,
        held_out=400,
        suspicious=2,
        unknown=1,
        expected=0.07,
        chance=0.002,
        labels={8: 2},
        images=(*images, image(7, None, predicted=None, error="incoming/7.png is cut off.")),
        histogram=EntropyHistogram(
            edges=edges, clean=(0, 4, 20, 90, 150, 90, 40, 6), inspected=(1, 1, 0, 1, 2, 0, 0, 2)
        ),
        params={"frr": 0.01},
    )


def text_of(result: InspectResult) -> str:
    return writer("text").render([result], Style())


def test_text_lists_the_images_with_the_lowest_entropy_first(inspected: InspectResult) -> None:
    lines = text_of(inspected).splitlines()
    assert lines[0] == "SUSPICIOUS  models/clean.pth" and lines[1] == "  2 of 8 images are suspicious."
    assert lines[2].startswith("  Clean images alone would give 0.07. Look at the images, and scan the network")
    assert "  method      STRIP, 100 overlays, false rejection rate 0.01" in lines
    assert "  threshold   0.4 bits, from 400 held-out clean images" in lines
    assert "  labels      label 8 (ship): 2" in lines
    assert "  not read    incoming/7.png: incoming/7.png is cut off." in lines
    start = next(place for place, line in enumerate(lines) if line.split()[:2] == ["verdict", "entropy"])
    assert lines[start + 1].split() == ["suspicious", "0.01", "0.0025", "label", "8", "(ship)", "incoming/1.png"]
    assert [line.split()[-1] for line in lines[start + 1 :]] == [f"incoming/{place}.png" for place in (1, 3, 5, 4, 0)]


@pytest.mark.parametrize(
    ("changes", "headline", "advice"),
    [
        ({"suspicious": 0, "unknown": 0}, "None of 8 images is suspicious.", "Triggers that depend on the image"),
        ({"suspicious": 0}, "1 of 8 images could not be judged; none of the others", "Triggers that depend"),
        (
            {"suspicious": 1, "chance": 0.3},
            "1 of 8 images is suspicious.",
            "so they may all be clean (probability 0.3)",
        ),
        ({"suspicious": 0, "limits": ("Too few.",)}, "1 of 8 images could not be judged", "Too few."),
    ],
)
def test_the_headline_and_the_advice_follow_the_counts(
    inspected: InspectResult, changes: dict[str, object], headline: str, advice: str
) -> None:
    found = msgspec.structs.replace(inspected, **changes)
    assert headline in inspections.headline(found) and advice in inspections.advice(found)


def test_one_normal_image_has_its_own_headline(inspected: InspectResult) -> None:
    incoming = msgspec.structs.replace(inspected.incoming, count=1)
    one = msgspec.structs.replace(inspected, incoming=incoming, suspicious=0, unknown=0)
    assert inspections.headline(one) == "The image is not suspicious."


def test_html_has_both_histograms_with_the_threshold_and_the_pictures(inspected: InspectResult) -> None:
    page = html_page([inspected])
    charts = [part.split("</svg>")[0] for part in page.split('<svg class="chart"')[1:]]
    assert len(charts) == 2 and page.count("threshold: 0.4") == 2
    for chart in charts:
        tree = ElementTree.fromstring(f'<svg class="chart"{chart}</svg>')
        bars = [one for one in tree.iter("rect") if str(one.get("class")).startswith("bar")]
        marked = [one.get("class") == "bar marked" for one in bars]
        assert len(bars) == 8 and marked == [True, True] + [False] * 6  # the bins below 0.4, by their middle
        cut = next(one for one in tree.iter("line") if one.get("class") == "cut")
        assert cut.get("x1") == cut.get("x2")
        assert float(str(bars[1].get("x"))) < float(str(cut.get("x1"))) < float(str(bars[2].get("x")))
    assert page.count(f"data:image/png;base64,{b64encode(PICTURE).decode()}") == 2
    assert "img-src data:" in page and "incoming/7.png is cut off." in page
    assert html_page([InspectResult.from_json(inspected.to_json())]) == page


def test_untrusted_names_are_escaped(inspected: InspectResult) -> None:
    evil = "</title></style><script>alert(1)</script>\"'><svg onload=x>\x1b[31m"
    images = tuple(msgspec.structs.replace(one, name=evil, error=one.error and evil) for one in inspected.images)
    incoming = msgspec.structs.replace(inspected.incoming, source=evil, notes=(evil,))
    result = msgspec.structs.replace(inspected, images=images, incoming=incoming, limits=(evil,), remarks=(evil,))
    page = html_page([result])
    assert "<script" not in page and "<svg onload" not in page
    assert "\x1b[" not in text_of(result)


def test_a_result_without_entropies_has_no_charts(inspected: InspectResult) -> None:
    bare = msgspec.structs.replace(
        inspected, histogram=None, threshold=None, chance=None, labels={}, images=(image(0, None, predicted=None),)
    )
    assert '<svg class="chart"' not in html_page([bare]) and "none, from 400" in text_of(bare)
