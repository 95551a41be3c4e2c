"""The environment variables are declared in one place and read as declared."""

from __future__ import annotations

import pytest

from bdprune import environment


def test_a_variable_that_is_unset_or_empty_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDPRUNE_GRAPHS", raising=False)
    assert environment.GRAPHS.get() == "1"
    monkeypatch.setenv("BDPRUNE_GRAPHS", "")
    assert environment.GRAPHS.get() == "1"


def test_the_environment_overrides_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDPRUNE_GRAPHS", "0")
    assert environment.GRAPHS.get() == "0"


def test_every_variable_that_the_module_names_is_in_its_list() -> None:
    named = [one for one in vars(environment).values() if isinstance(one, environment.Variable)]
    assert named == list(environment.VARIABLES)
    assert len({one.name for one in named}) == len(named)
