"""The `moezoo` command line. Commands import their dependencies when they run, so that `moezoo --help` is fast."""

import errno
from typing import Any

import click

from moezoo.cli.analyze import analyze
from moezoo.cli.bench import bench_command
from moezoo.cli.chat import chat
from moezoo.cli.compare import compare
from moezoo.cli.convert import convert_command
from moezoo.cli.data import data
from moezoo.cli.doctor import doctor
from moezoo.cli.evaluate import evaluate
from moezoo.cli.explore import explore
from moezoo.cli.failures import describe_failure
from moezoo.cli.generate import generate
from moezoo.cli.init import init_command
from moezoo.cli.inspect import describe, plan_command, schema
from moezoo.cli.output import output_streams, warn
from moezoo.cli.parity import parity, zoo
from moezoo.cli.plot import plot
from moezoo.cli.preview import preview
from moezoo.cli.runs import runs_command
from moezoo.cli.serve import serve_command
from moezoo.cli.trace import trace
from moezoo.cli.train import launch_command, train
from moezoo.core.distributed.process_group import exit_process
from moezoo.core.errors import MoezooError
from moezoo.core.garbage import collect_seldom
from moezoo.core.signals import Interrupted, end_process


class _Commands(click.Group):
    """A command group that lists commands in order of use and prints an error in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with output_streams():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoezooError as error:
            warn(*(f"{type(error).__name__}: {line}" for line in str(error).splitlines()))
            exit_process(1)
        except Interrupted as second:
            end_process(second.exit_status)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            exit_process(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # click exits quietly
                raise
            warn(describe_failure(error))
            exit_process(1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Trap: click's own cuts a summary that does not fit in its line, and ends it in "...".
        with formatter.section("Commands"):
            formatter.write_dl([(name, str(command.help).split("\n", 1)[0]) for name, command in self.commands.items()])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _print_versions(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    from moezoo.backends import versions

    click.echo("\n".join(f"{name} {version}" for name, version in versions().items()))
    ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Print the versions of moezoo, Python and the backends, and exit.",
)
def main() -> None:
    """Train and run mixture-of-experts language models on JAX and MLX."""
    collect_seldom()


for _command in (
    *(train, launch_command, generate, chat, serve_command, evaluate, runs_command, plot, describe, plan_command),
    *(parity, compare, convert_command, init_command, zoo, schema, bench_command, data, preview, trace, doctor),
    *(explore, analyze),
):
    main.add_command(_command)
