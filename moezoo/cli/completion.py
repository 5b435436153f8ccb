"""Completion of arguments in the shell, besides that of commands and options, which click has."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_SUFFIXES = (".yaml", ".yml")


class _PathType(click.ParamType):  # type: ignore[type-arg]  # only recent versions of click have one
    """Type of an argument or option that is a path; the shell completes it from its files."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        return _completed(incomplete)


PATH = _PathType()


def complete_file(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete a path of an option that takes other words too."""
    return _completed(incomplete)


def complete_config(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete a config: the names that ship with moezoo, and YAML files."""
    return _completed(incomplete, *_config_names(incomplete), *_yaml_files(incomplete))


def complete_model(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete a model: run folders, also those in `runs` by the start of their name."""
    return _completed(incomplete, *_runs(incomplete))


def complete_config_or_model(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete what may be a config or a model."""
    return _completed(incomplete, *_runs(incomplete), *_config_names(incomplete), *_yaml_files(incomplete))


def complete_backend(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete the name of a backend."""
    from click.shell_completion import CompletionItem

    from moezoo.backends import NAMES

    return [CompletionItem(name) for name in NAMES if name.startswith(incomplete)]


def complete_accelerator(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete the name of an accelerator."""
    from click.shell_completion import CompletionItem

    from moezoo.core.cost.step_bound import ACCELERATORS

    names = (name.replace(" ", "-") for name in ACCELERATORS)
    return [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]


def complete_mode(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete the mode of a benchmark."""
    from click.shell_completion import CompletionItem

    from moezoo.bench.modes import MODES

    return [CompletionItem(mode) for mode in MODES if mode.startswith(incomplete)]


def complete_dataset(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete the name of a dataset."""
    from click.shell_completion import CompletionItem

    from moezoo.core.data.datasets import list_recipes

    return [
        CompletionItem(recipe.name, help=recipe.title)
        for recipe in list_recipes()
        if recipe.name.startswith(incomplete)
    ]


def _completed(incomplete: str, *found: str) -> "list[CompletionItem]":
    """Return what was found, or else what asks the shell for files.

    Trap: not both. Bash shows files only if there is nothing else, and zsh merges the two into their common start.
    """
    from click.shell_completion import CompletionItem

    return [CompletionItem(text) for text in dict.fromkeys(found)] or [CompletionItem(incomplete, type="file")]


def _config_names(incomplete: str) -> Iterator[str]:
    """Yield names of configs: whole ones, and last parts of which there is one alone."""
    from moezoo.core.config.shipped import shipped_configs

    names = list(shipped_configs())
    last = [name.rpartition("/")[2] for name in names]
    yield from (name for name in names if name.startswith(incomplete))
    if incomplete:
        yield from (name for name in last if name.startswith(incomplete) and last.count(name) == 1)


def _yaml_files(incomplete: str) -> Iterator[str]:
    yield from (path for suffix in _SUFFIXES for path in sorted(glob.glob(f"{glob.escape(incomplete)}*{suffix}")))


def _runs(incomplete: str) -> Iterator[str]:
    from moezoo.core.runs.run_manifest import CONFIG_FILE

    for start in dict.fromkeys((incomplete, os.path.join("runs", incomplete))):
        for path in sorted(glob.glob(f"{glob.escape(start)}*/{CONFIG_FILE}")):
            yield os.path.dirname(path)
