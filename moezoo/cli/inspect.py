"""`moezoo describe`, `moezoo plan` and `moezoo schema`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_accelerator, complete_config, complete_config_or_model
from moezoo.cli.options import adapter_option, devices_option, json_option, mesh_option, set_option
from moezoo.cli.output import print_json, print_report, warn_assumed
from moezoo.core.errors import SpecError

if TYPE_CHECKING:
    from moezoo.core.config.run_config import Config
    from moezoo.core.reports.mesh_page import MeshDescription


class _ListsModelTypes(click.Command):
    """A command whose help ends with the model types of Hugging Face checkpoints."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from moezoo.core.huggingface.family import families

        with formatter.section("Model types of Hugging Face checkpoints"):
            formatter.write_text(", ".join(sorted(families())))


@click.command(cls=_ListsModelTypes)
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_config_or_model)
@set_option
@mesh_option
@devices_option
@click.option(
    "--memory", metavar="16GiB", help="Memory, for the largest context that fits beside a checkpoint's weights."
)
@adapter_option
@json_option
def describe(
    path: Path,
    overrides: tuple[str, ...],
    mesh: str | None,
    devices: int | None,
    memory: str | None,
    adapter: Path | None,
    as_json: bool,
) -> None:
    """Show layers, parameters, FLOPs and memory of a model.

    PATH is a YAML config, a run folder, or a Hugging Face folder or hub id. Of a Hugging Face checkpoint, config.json
    alone is enough; the page also shows the parsed config, the tensor mapping, and the format, bits per weight and
    bytes of weights by role; of a model that is designed here, the Hugging Face families that it can be exported as, or
    what stands in the way. With --mesh, it shows how each parameter is sharded and its bytes per device instead.
    """
    from moezoo.core.reports.checkpoint_page import checkpoint_description, checkpoint_page
    from moezoo.core.reports.mesh_page import mesh_page
    from moezoo.core.reports.model_page import config_description, config_page
    from moezoo.core.reports.text import memory_bytes
    from moezoo.core.runs.open import checkpoint_folder, open_model

    if mesh is None and devices is not None:
        raise SpecError(
            f"--devices is the number of devices of a mesh; got --devices {devices} without --mesh. Add --mesh, for "
            "example --mesh data=auto."
        )
    config = _config(path, overrides) if adapter is None else open_model(path, adapter=adapter).config
    limit = None if memory is None else memory_bytes(memory)
    if limit is not None and (mesh is not None or config is not None):
        raise SpecError(
            f"--memory is for the weights and KV cache of a checkpoint; got {path}. For training, "
            "use `moezoo plan CONFIG --memory`."
        )
    if mesh is not None:
        sharded = _sharded(path, config, mesh, devices)
        print_report(sharded, lambda: mesh_page(sharded), as_json)
    elif config is not None:
        model = config_description(config, exported=True)
        print_report(model, lambda: config_page(model, str(path)), as_json)
    else:
        checkpoint = checkpoint_description(checkpoint_folder(path, weights=False), limit)
        print_report(checkpoint, lambda: checkpoint_page(checkpoint, str(path)), as_json)


def _config(path: Path, overrides: tuple[str, ...]) -> "Config | None":
    """Return the config at a path, or of the run there; None for a checkpoint, which takes no overrides."""
    from moezoo.core.runs.init_from import load_resolved_config
    from moezoo.core.runs.open import is_config
    from moezoo.core.runs.run_folder import is_run, load_run_config

    if is_config(path):
        return load_resolved_config(path, overrides)
    if is_run(path):
        return load_run_config(path, overrides)
    if overrides:
        raise SpecError(f"--set overrides values of a YAML config; got {path}; expected one, or no --set.")
    return None


def _sharded(path: Path, config: "Config | None", mesh: str, devices: int | None) -> "MeshDescription":
    """Return the model's parameters on a mesh; an assumed vocabulary is printed as a warning."""
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.data.vocabulary import spec_with_real_vocab_size
    from moezoo.core.reports.mesh_page import mesh_description
    from moezoo.core.runs.open import describe_model

    spec, assumed = (describe_model(path)[0], None) if config is None else spec_with_real_vocab_size(config)
    warn_assumed(assumed)
    return mesh_description(spec, load_mesh(mesh), devices, None if config is None else config.optimizer)


@click.command("plan")
@click.argument("config_path", metavar="CONFIG", type=PATH, shell_complete=complete_config)
@set_option
@mesh_option
@devices_option
@click.option("--memory", metavar="80GiB", help="Memory per device, to check whether the step fits.")
@click.option(
    "--accelerator",
    metavar="NAME|FIGURES",
    shell_complete=complete_accelerator,
    help="Also bound the seconds of a step: H100, TPU v6e, M2, ..., or 18TFLOP/s,546GB/s.",
)
@click.option("--formula", is_flag=True, help="Use formulas only, compile nothing.")
@click.option("--topology", metavar="v5e:16x16", help="TPU topology to compile for; needs libtpu.")
@json_option
def plan_command(
    config_path: Path,
    overrides: tuple[str, ...],
    mesh: str | None,
    devices: int | None,
    memory: str | None,
    accelerator: str | None,
    formula: bool,
    topology: str | None,
    as_json: bool,
) -> None:
    """Estimate memory and communication of a training step on a mesh.

    No accelerator is needed and no weights are allocated. Estimates by formula are shown beside XLA's program, compiled
    for simulated devices: on this mesh if it has at most 256 devices, else on a smaller one with the same axes. Deep
    models are compiled in part. With --topology, the memory that the TPU compiler reports is shown instead. With
    --accelerator, the data sheet of a device bounds the time of a step; --memory is then its memory.
    """
    from moezoo.backends import load_planner
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.cost.make_plan import make_plan
    from moezoo.core.cost.step_bound import accelerator as accelerator_of
    from moezoo.core.data.vocabulary import spec_with_real_vocab_size
    from moezoo.core.reports.plan_page import plan_page
    from moezoo.core.reports.text import memory_bytes
    from moezoo.core.runs.init_from import load_resolved_config

    config = load_resolved_config(config_path, overrides)
    spec, assumed = spec_with_real_vocab_size(config)
    config = config.model_copy(update={"model": spec, "mesh": config.mesh if mesh is None else load_mesh(mesh)})
    limit = None if memory is None else memory_bytes(memory)
    on = None if accelerator is None else accelerator_of(accelerator)
    planner = None if formula and topology is None else load_planner()
    plan = make_plan(config, devices, limit, planner=planner, topology=topology, on=on)
    warn_assumed(assumed)
    print_report(plan, lambda: plan_page(plan, str(config_path)), as_json)


@click.command()
def schema() -> None:
    """Print the JSON Schema of configs, for completion in editors."""
    from moezoo.core.config.run_config import json_schema

    print_json(json_schema())
