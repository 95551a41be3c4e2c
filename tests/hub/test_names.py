"""Names of repositories and of files in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdprune.errors import OptionError
from bdprune.hub.names import HubName, is_hub_name, is_safe, parse_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:org/name", HubName("org/name")),
        ("hf:org/name@main", HubName("org/name", "main")),
        ("hf:o-r_g/na.me-1@v1.0/model.safetensors", HubName("o-r_g/na.me-1", "v1.0", "model.safetensors")),
        ("hf:org/name/a/b.bin", HubName("org/name", None, "a/b.bin")),
        ("hf:org/name@refs/pr/3/a/b.bin", HubName("org/name", "refs/pr/3", "a/b.bin")),
        ("hf:org/name@feature%2Fnew", HubName("org/name", "feature/new")),
        ("hf:org/name/**/*.safetensors", HubName("org/name", None, "**/*.safetensors")),
        ("hf:org/name/a@b.bin", HubName("org/name", None, "a@b.bin")),
        ("hf:org/name/new\nline.bin", HubName("org/name", None, "new\nline.bin")),
    ],
)
def test_a_name_has_a_repository_a_revision_and_a_file(text: str, name: HubName) -> None:
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:name",
        "hf:../..",
        "hf:org/..",
        "hf:./name",
        "hf:org/na..me",
        "hf:org/na--me",
        "hf:org/.name",
        "hf:org/name-",
        "hf:org/näme",
        "hf:org/" + "n" * 97,
        "hf:org/name@",
        "hf:org/name@..",
        "hf:org/name@..%2F..",
        "hf:org/name@a%00b",
        "hf:org/name@ma in",
        "hf:org/name/",
        "hf:org/name/../../etc/passwd",
        "hf:org/name/a//b",
        "hf:org/name/a\\b",
        "hf:org/name/a\0b",
        "hf://org/name",
        "hf:org/name@main@main",
    ],
)
def test_a_bad_name_is_one_error(text: str) -> None:
    with pytest.raises(OptionError, match=r"Invalid (name|revision)") as caught:
        parse_name(text)
    assert caught.value.hint


def test_only_texts_name_something_on_the_hub() -> None:
    assert is_hub_name("hf:org/name")
    assert not any(is_hub_name(one) for one in (Path("hf:org/name"), "./hf:org/name", "HF:org/name", None))


def test_safe_paths_stay_below_the_repository() -> None:
    assert is_safe("a/b.bin") and is_safe("..a/b..")
    assert not any(is_safe(one) for one in ("", "/a", "a/", "../a", "a/./b", "a\\b", "a\0"))
