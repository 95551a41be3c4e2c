"""``command-line.md``: every command with its usage, options and examples, from click."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from bdprune.cli.main import main
from docs.markdown import NOTE, anchor, prose, table

HEAD = f"""# Command line

{NOTE}

Each command prints its help with `--help`. Results go to standard output; progress and warnings go to standard error.
[Results](results.md) describes the JSON and the [exit codes](results.md#exit-codes).
"""

NOT_RUN = {
    "bdprune": "the sections of the commands have examples that run",
    "bdprune zoo make": "it trains for hours, on data sets that are not shipped",
    "bdprune zoo verify": "it needs data sets that are not shipped",
    "bdprune calibrate": "it needs data sets that are not shipped",
    "bdprune demo": "it takes minutes",
}
"""Why the examples of a command do not run in the tests."""


def page() -> str:
    """The whole page."""
    found = list(_commands(main, click.Context(main, info_name="bdprune", **main.context_settings)))
    rows = [(f"[`{path}`](#{anchor(path)})", prose(command.get_short_help_str(120))) for path, command, _ in found]
    sections = [_section(*one) for one in found]
    return "\n".join([HEAD, *table(("command", "what it does"), rows), "", "\n".join(sections)])


def _commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """The command and all commands below it, in the order of the help."""
    yield context.command_path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.commands[name]
            yield from _commands(below, click.Context(below, info_name=name, parent=context))


def _section(path: str, command: click.Command, context: click.Context) -> str:
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    text = [prose(" ".join(one.split())) for one in paragraphs if not one.startswith("\b")]
    examples = [line.strip() for one in paragraphs if one.startswith("\b") for line in one.splitlines()[1:]]
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"## {path}", "", *(f"{one}\n" for one in text), "```text", f"Usage: {usage}", "```", ""]
    options = [one for one in command.get_params(context) if isinstance(one, click.Option) and one.name != "help"]
    lines += [*(_option(one, context) for one in options), *([""] if options else [])]
    return "\n".join([*lines, *_examples(path, examples)])


def _examples(path: str, examples: list[str]) -> list[str]:
    if not examples:
        return []
    marker = [f"<!-- not run: {NOT_RUN[path]} -->", ""] if path in NOT_RUN else []
    return [*marker, "```console", *(f"$ {one}" for one in examples), "```", ""]


def _option(option: click.Option, context: click.Context) -> str:
    names, help = option.get_help_record(context) or ("", "")
    text, notes = help, []
    while found := re.fullmatch(r"(.*?)\s*\[([^\[\]]*)\]", text, re.S):
        text, notes = found[1], [found[2], *notes]
    parts = [prose(text), *(_note(note, f"{names} {text}") for one in notes for note in one.split("; "))]
    return f"- `{names}`: {' '.join(filter(None, parts))}"


def _note(text: str, help: str) -> str:
    """What the help says in brackets, as a sentence; a default becomes code if it is a value that the help names."""
    if text == "required":
        return "Required."
    if text.startswith("default: "):
        value = text.removeprefix("default: ")
        is_value = " " not in value and (value in re.split(r"\W+", help) or not value.isalpha())
        return f"Default: {f'`{value}`' if is_value else prose(value)}."
    low, high = re.fullmatch(r"(?:(\S+)<=)?x(?:[<>]=(\S+))?", text).groups()  # type: ignore[union-attr]
    return f"From {low} to {high}." if low else f"At least {high}."
