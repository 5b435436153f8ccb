"""`moezoo describe`, `moezoo plan` and `moezoo schema`."""

from pathlib import Path

import click

from moezoo.cli.options import devices_option, json_option, mesh_option, new_console, set_option
from moezoo.core.errors import SpecError


@click.command()
@click.argument("path", metavar="PATH", type=Path)
@set_option
@mesh_option
@devices_option
@json_option
def describe(path: Path, overrides: tuple[str, ...], mesh: str | None, devices: int | None, as_json: bool) -> None:
    """A model on one page: layers, parameters, FLOPs, memory.

    PATH is a YAML config, a run folder, or a Hugging Face folder or hub id, of which config.json is enough: then also
    what was understood of it, and what becomes of every tensor. With --mesh: where each parameter lies on so many
    devices instead, and how many bytes of it one of them has.
    """
    import json

    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.config.vocabulary import spec_with_vocab_size
    from moezoo.core.reports.mesh_page import mesh_description, mesh_page
    from moezoo.core.reports.model_page import describe as page
    from moezoo.core.reports.model_page import description
    from moezoo.core.runs.init_from import load_resolved_config
    from moezoo.core.runs.open import checkpoint_folder, describe_model, is_config
    from moezoo.core.runs.run_folder import is_run

    if mesh is None and devices is not None:
        raise SpecError(f"--devices {devices} says how many a mesh has; got no --mesh. Add --mesh data=auto, say.")
    if mesh is not None:
        known_config = is_config(path) or is_run(path)
        config = (
            load_resolved_config(path if is_config(path) else path / "config.yaml", overrides) if known_config else None
        )
        spec, assumed = (describe_model(path)[0], None) if config is None else spec_with_vocab_size(config)
        if assumed:
            click.echo(f"assumed: {assumed}", err=True)
        lying = mesh_description(spec, load_mesh(mesh), devices)
        shown = lying if as_json else mesh_page(lying)
    elif is_config(path) or is_run(path):
        config = load_resolved_config(path if is_config(path) else path / "config.yaml", overrides)
        shown = description(config) if as_json else page(config, str(path))
    else:
        from moezoo.core.reports.checkpoint_page import checkpoint_description, checkpoint_page

        if overrides:
            raise SpecError(f"--set overrides values of a YAML config; got {path}; expected one, or no --set.")
        folder = checkpoint_folder(path, weights=False)
        shown = checkpoint_description(folder) if as_json else checkpoint_page(folder, str(path))
    if as_json:
        click.echo(json.dumps(shown, indent=2))
    else:
        new_console().print(shown)


@click.command("plan")
@click.argument("config_path", metavar="CONFIG", type=Path)
@set_option
@mesh_option
@devices_option
@click.option("--memory", metavar="80GiB", help="Of a device: does the step fit?")
@click.option("--formula", is_flag=True, help="Compile nothing.")
@click.option("--topology", metavar="v5e:16x16", help="TPU chips to compile for, where libtpu is installed.")
@json_option
def plan_command(
    config_path: Path,
    overrides: tuple[str, ...],
    mesh: str | None,
    devices: int | None,
    memory: str | None,
    formula: bool,
    topology: str | None,
    as_json: bool,
) -> None:
    """A training step on devices that are not there: memory, operations, and what travels.

    By formula, beside what XLA makes of the step: on this mesh if it has 256 devices or fewer, else on a smaller one
    with the same axes. Deep models are compiled in part. No weights are made. With --topology, beside the memory that
    the compiler for TPUs gives it.
    """
    import json

    from moezoo.backends import load_planner
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.config.vocabulary import spec_with_vocab_size
    from moezoo.core.cost.make_plan import make_plan
    from moezoo.core.reports.plan_page import plan_page
    from moezoo.core.reports.text import memory_bytes
    from moezoo.core.runs.init_from import load_resolved_config

    config = load_resolved_config(config_path, overrides)
    spec, assumed = spec_with_vocab_size(config)
    config = config.model_copy(update={"model": spec, "mesh": config.mesh if mesh is None else load_mesh(mesh)})
    limit = None if memory is None else memory_bytes(memory)
    planner = None if formula and topology is None else load_planner()
    known = make_plan(config, devices, limit, planner=planner, topology=topology)
    if assumed:
        click.echo(f"assumed: {assumed}", err=True)
    if as_json:
        click.echo(json.dumps(known, indent=2))
    else:
        new_console().print(plan_page(known, str(config_path)))


@click.command()
def schema() -> None:
    """JSON Schema of a config, for editors that complete YAML."""
    import json

    from moezoo.core.config.run_config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
