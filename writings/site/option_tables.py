"""The commands of moezoo with their options as Markdown, read from the command line itself."""

import re
from itertools import zip_longest

import click

from moezoo.cli.main import main


def option_tables() -> str:
    """Return a section for each command: its usage, its help text, and tables of arguments and options."""
    return "\n\n".join(_section(name, command) for name, command in main.commands.items())


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, parent=click.Context(main, info_name="moezoo"))
    usage = " ".join(["moezoo", name, *command.collect_usage_pieces(context)])
    rows = [_row(parameter, context) for parameter in command.params if isinstance(parameter, click.Option)]
    table = ["| option | default | what it does |", "|---|---|---|", *rows] if rows else []
    parts = [f"## moezoo {name}", f"```console\n{usage}\n```", _prose(command.help or ""), "\n".join(table)]
    return "\n\n".join(part for part in parts if part)


def _row(option: click.Option, context: click.Context) -> str:
    flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    metavar = "" if option.is_flag else f" `{option.make_metavar(context).removesuffix(' RANGE')}`"
    text, default = option.help or "", option.get_help_extra(context).get("default", "")
    found = re.search(r" Default: ([^.]*(?:\.\w[^.]*)*)\.$", text)
    if found:
        text, default = text[: found.start()], found[1]
    cells = (flags + metavar, _code_if_short(default), _prose(text))
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _code_if_short(default: str) -> str:
    return f"`{default}`" if default and " " not in default else _prose(default)


def _prose(text: str) -> str:
    """Return a help text as Markdown: paragraphs, `\\b` blocks as they are, and nothing that reads as HTML."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.split("\f")[0].strip()):
        if paragraph.lstrip().startswith("\b"):
            paragraphs.append("```text\n" + paragraph.replace("\b", "").strip("\n") + "\n```")
        else:
            paragraphs.append(" ".join(_escaped(paragraph).split()))
    return "\n\n".join(paragraphs)


def _escaped(text: str) -> str:
    pieces = re.split(r"(`[^`]*`)", text)
    plain = (re.sub(r"([*_\[])", r"\\\1", piece.replace("<", "&lt;")) for piece in pieces[::2])
    return "".join(piece for pair in zip_longest(plain, pieces[1::2], fillvalue="") for piece in pair)
