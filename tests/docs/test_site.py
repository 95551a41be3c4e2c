"""The site builds strictly and without a network, shows every page, and documents the whole Python API."""

from __future__ import annotations

import html
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Site:
    """A built site, and what the build printed."""

    folder: Path
    code: int
    output: str


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return Site(folder, done.returncode, done.stdout)


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_docs_{name}", ROOT / "tools" / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_names() -> list[str]:
    """All names that users import, as ``bdprune.ops.fastest``."""
    import bdprune
    import bdprune.ops
    import bdprune.testing

    testing = [name for name, value in vars(bdprune.testing).items() if name[0] != "_" and not inspect.ismodule(value)]
    return [
        *(f"bdprune.{name}" for name in bdprune.__all__ if name != "__version__"),
        *(f"bdprune.ops.{name}" for name in bdprune.ops.__all__),
        *(f"bdprune.testing.{name}" for name in testing),
    ]


def words(text: str) -> str:
    """The text of HTML or of a docstring without its markup."""
    plain = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"[^\w]+", " ", re.sub(r":\w+:`|`|\*|_", "", plain)).strip()


def test_the_build_prints_no_warning(site: Site) -> None:
    assert site.code == 0, site.output
    assert re.findall(r"warning|error|deprecat", site.output, re.I) == []


def test_every_page_is_in_the_navigation_once() -> None:
    class Loader(yaml.SafeLoader):
        """Ignores tags that only MkDocs defines."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    found: list[str] = []

    def visit(entry: Any) -> None:
        if isinstance(entry, str):
            found.append(entry)
        else:
            for one in entry.values() if isinstance(entry, dict) else entry:
                visit(one)

    visit(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    pages = [str(one.relative_to(DOCS)) for one in DOCS.rglob("*.md")]
    assert sorted(found) == sorted([*pages, *tool("hooks").ROOT_PAGES])


def test_pages_load_nothing_from_other_hosts(site: Site) -> None:
    pages = list(site.folder.rglob("*.html"))
    assert len(pages) > 20
    loads = re.compile(r"<(?:script|img|iframe)[^>]*\bsrc=\"(?:https?:)?//|<link[^>]*\bhref=\"(?:https?:)?//")
    assert [page.name for page in pages if loads.search(page.read_text())] == []


def test_the_page_of_the_api_has_every_public_name() -> None:
    documented = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "python.md").read_text(), re.M)
    assert sorted(documented) == sorted(public_names())


def docstring_of(value: Any, package: str, name: str) -> str | None:
    """The docstring at its definition; for a type alias, the string below it in the source."""
    if isinstance(value.__doc__, str):
        return inspect.cleandoc(value.__doc__)
    text = "".join(one.read_text() for one in ROOT.joinpath(*package.split(".")).glob("*.py"))
    found = re.search(rf'^{name}\b.*=.*\n"""(.*?)"""', text, re.M)
    return found and found[1]


def test_the_docstring_of_every_public_name_is_on_the_page(site: Site) -> None:
    page = (site.folder / "reference" / "python.html").read_text()
    text = words(page)
    missing = []
    for path in public_names():
        module, _, name = path.rpartition(".")
        docstring = docstring_of(getattr(importlib.import_module(module), name), module, name)
        assert docstring, path
        summary = words(docstring.split("\n\n")[0])
        if f'id="{path}"' not in page or summary not in text:
            missing.append((path, summary))
    assert missing == []


def test_links_to_files_outside_the_site_become_text() -> None:
    changed = tool("hooks").relinked
    same = "[c](../start.md#d) [e](https://x.y) `[f](../g)` [h](../../no.md)"
    assert changed(same, "how-to/scan-in-ci.md") == same
    assert changed("[`a`](../../README.md#b)", "how-to/scan-in-ci.md") == "[`a`](../index.md#b)"
    assert changed("[a](docs/start.md) [b](pyproject.toml)", "CONTRIBUTING.md") == "[a](start.md) b"
    assert changed("[a](../../SECURITY.md)", "how-to/scan-in-ci.md") == "[a](../SECURITY.md)"
    assert changed("[a](../../bdprune/errors.py)", "how-to/scan-in-ci.md") == "a"


def test_public_names_in_docstrings_become_links() -> None:
    changed = tool("roles").as_markdown
    assert changed("``bdprune.load`` or ``Case``") == "[`bdprune.load`][bdprune.load] or [`Case`][bdprune.Case]"
    assert changed(":func:`bdprune.ops.fastest` and :data:`ROUNDS`") == (
        "[`bdprune.ops.fastest`][bdprune.ops.fastest] and ``ROUNDS``"
    )
    assert changed("``Case``\n\nExample:\n    >>> Case") == "[`Case`][bdprune.Case]\n\nExamples:\n    >>> Case"
    assert changed("``load`` and ``[N, C]``") == "``load`` and ``[N, C]``"
