"""Check that the optimizer state of a checkpoint is that of a run's optimizer."""

from collections.abc import Iterable, Mapping

from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.update_rules import state_shapes
from moezoo.core.errors import CheckpointError
from moezoo.core.parameters import Parameter


def check_optimizer_state(
    found: Mapping[str, tuple[int, ...]], config: OptimizerConfig, rows: Iterable[Parameter], where: str
) -> None:
    """Compare the shapes of a checkpoint's state, by name, with those that the optimizer keeps of these parameters.

    Raises one CheckpointError: another kind's state in one line, else a line for each difference.
    """
    expected = state_shapes(config, rows)
    own, needed = _kinds(found), _kinds(expected)
    if found and own != needed:
        raise CheckpointError(
            f"{where} is another optimizer's; got {', '.join(own)}; expected {', '.join(needed) or 'nothing'} "
            f"(optimizer.kind is {config.kind}). Resume with the optimizer of the run, or start a new run from its "
            "weights (init_from)."
        )
    check_names_and_shapes(found, expected, where)


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})
