"""What all HTML shares: characters that hide or turn text are shown, and text is escaped."""

from __future__ import annotations

from markupsafe import Markup

from bdprune.report.rendering import encodable, environment, short


def render(template: str, **values: object) -> str:
    return environment().from_string(template).render(**values)


def test_text_is_escaped_and_hidden_characters_are_shown() -> None:
    assert render("{{ text }}", text="<b>a\u202egnp.exe\x00\x1b") == "&lt;b&gt;a�gnp.exe��"
    assert render("{{ text }}", text=Markup("<b>")) == "<b>"
    assert render("{{ text }}|{{ count }}", text="a\n\tb", count=3) == "a\n\tb|3"


def test_prose_has_commands_as_code_and_is_escaped() -> None:
    text = render("{{ text | prose }}", text="Use `bdprune <x>`\u202e & go")
    assert text == "Use <code>bdprune &lt;x&gt;</code>� &amp; go"


def test_long_texts_are_cut_and_lone_surrogates_replaced() -> None:
    assert short("abc", 3) == "abc" and short("abcd", 3) == "abc …"
    assert encodable("a\udcff") == "a?"
