"""The rule by which an optimizer updates each parameter, and the state that it keeps: read from the parameter table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moezoo.core.config.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonAdamW,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from moezoo.core.errors import SpecError
from moezoo.core.parameters import MatrixAxes, Parameter
from moezoo.core.parameters.trained import trainable_role

Method = AdamWConfig | MuonAdamW | MuonConfig | LionConfig | AdafactorConfig | SGDConfig
"""The formula of an update, with its numbers: the config itself, or the AdamW inside of Muon's."""


@dataclass(frozen=True)
class UpdateRule:
    """One parameter's update.

    Fields:
        method: its formula.
        learning_rate_scale: factor of the learning rate.
        weight_decay: 0 for parameters without decay.
        matrix: axes of the matrices that Muon and Adafactor treat one by one; None for an update of each number by
            itself. For Adafactor, a parameter that is no matrix has inputs only.
    """

    method: Method
    learning_rate_scale: float
    weight_decay: float
    matrix: MatrixAxes | None = None

    def stacked(self) -> "UpdateRule":
        """Return the rule of equal parameters in one array, with a new axis in front."""
        if self.matrix is None:
            return self
        return replace(self, matrix=self.matrix._replace(batch=self.matrix.batch + 1))

    def state_axes(self, num_axes: int) -> dict[str, tuple[int, ...]]:
        """Return the arrays that are kept between updates: the axes that each has, of a parameter's `num_axes`."""
        every = tuple(range(num_axes))
        match self.method:
            case AdamWConfig() | MuonAdamW():
                return {"first_moment": every, "second_moment": every}
            case MuonConfig() | LionConfig():
                return {"first_moment": every}
            case SGDConfig(momentum=momentum):
                return {"momentum": every} if momentum else {}
            case AdafactorConfig():
                assert self.matrix is not None
                stack, inputs, outputs = self.matrix.split(every)
                if not outputs:
                    return {"second_moment": every}
                return {"second_moment_of_inputs": stack + inputs, "second_moment_of_outputs": stack + outputs}


def update_rules(config: OptimizerConfig, rows: Iterable[Parameter]) -> dict[str, UpdateRule]:
    """Return the rule of each trained parameter of these rows, by canonical name.

    Raises SpecError: a group names a role that no parameter has.
    """
    trained = [row for row in rows if row.trained]
    found = {trainable_role(row) for row in trained}
    for place, group in enumerate(config.groups):
        for role in group.roles:
            if role not in found:
                raise SpecError(
                    f"optimizer.groups[{place}].roles names {role}, but no parameter of this role is trained; expected "
                    f"one of {', '.join(sorted(found))}. Remove it."
                )
    return {row.name: _rule(config, row) for row in trained}


def state_axes(rules: Mapping[str, UpdateRule], num_axes: Mapping[str, int]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the state of all parameters: by kind, then by parameter, the parameter's axes that it has."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, rule in rules.items():
        for kind, axes in rule.state_axes(num_axes[name]).items():
            found.setdefault(kind, {})[name] = axes
    return found


def state_shapes(config: OptimizerConfig, rows: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of the state, as it is exported and saved: `first_moment.NAME` and so on."""
    return {
        f"{kind}.{row.name}": tuple(row.shape[axis] for axis in axes)
        for row in rows
        if row.trained
        for kind, axes in _rule(config, row).state_axes(len(row.shape)).items()
    }


def _rule(config: OptimizerConfig, row: Parameter) -> UpdateRule:
    method: Method = config
    matrix, scale = None, 1.0
    match config:
        case MuonConfig(adamw=adamw):
            if _is_orthogonalized(row):
                matrix = row.matrix
            else:
                method, scale = adamw, adamw.learning_rate_scale
        case AdafactorConfig():
            matrix = row.matrix or MatrixAxes(0, len(row.shape))
    decay, role = config.weight_decay, trainable_role(row)
    for group in config.groups:
        if role in group.roles:
            scale *= group.learning_rate_scale
            decay = decay if group.weight_decay is None else group.weight_decay
    return UpdateRule(method, scale, decay if row.decay else 0.0, matrix)


def _is_orthogonalized(row: Parameter) -> bool:
    """Return whether Muon updates a row: a matrix inside of the model that is no router and has no axis of one."""
    if row.matrix is None or row.role in ("embeddings", "router"):
        return False
    _, inputs, outputs = row.matrix.sizes(row.shape)
    return inputs > 1 and outputs > 1
