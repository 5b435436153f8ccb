"""The `optimizer` section of a config: the kind of update, and its numbers. Formulas: core.reference.optimizer.

Writing: writings/optimizer.md.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from moezoo.core.config.schedules import CosineSchedule, Schedule
from moezoo.core.parameters.trained import RoleWord
from moezoo.core.spec import Part, default_kind, impossible

Share = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroup(Part):
    """Parameters of some roles, with a factor of the learning rate, and a weight decay of their own; null: the common.

    As everywhere, decay applies only to parameters with `decay` set in the parameter table.
    """

    roles: Annotated[tuple[RoleWord, ...], Field(min_length=1)]
    learning_rate_scale: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat | None = None


class _Optimizer(Part):
    """Fields of every kind. `learning_rate` is the peak of the schedule.

    `clip_norm` is the maximum global gradient norm; null is off. `groups`: other numbers for some roles.
    """

    learning_rate: PositiveFloat
    clip_norm: PositiveFloat | None = 1.0
    schedule: Schedule = CosineSchedule(warmup_steps=100)
    groups: tuple[ParameterGroup, ...] = ()

    @model_validator(mode="after")
    def _roles_are_in_one_group(self) -> Self:
        roles = [role for group in self.groups for role in group.roles]
        twice = next((role for role in roles if roles.count(role) > 1), None)
        if twice is not None:
            raise impossible("groups", f"name {twice} twice", "Name each role once")
        return self


class _Adam(Part):
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: PositiveFloat = 1e-8


class AdamWConfig(_Adam, _Optimizer):
    """AdamW with decoupled weight decay and bias correction. Source: Loshchilov and Hutter 2017, arXiv 1711.05101.

    Weight decay applies to parameters with `decay` set in the parameter table, here and in every other kind.
    """

    kind: Literal["adamw"] = "adamw"
    weight_decay: NonNegativeFloat = 0.1


class MuonAdamW(_Adam):
    """AdamW of the parameters that Muon does not update; `learning_rate_scale` multiplies the learning rate."""

    learning_rate_scale: PositiveFloat = 1.0


class MuonConfig(_Optimizer):
    """Muon: momentum, orthogonalized by a Newton-Schulz iteration, of each matrix by itself.

    Each expert is a matrix of its own. Embeddings, head, routers, biases, scales, filters, and matrices with a single
    input or output are updated by AdamW, with the numbers of `adamw` and the same weight decay.

    `update_scale` multiplies the orthogonal matrix: `match_rms_adamw` is `0.2 sqrt(max(inputs, outputs))`, after which
    the learning rate and the decay of AdamW fit; `original` is `sqrt(max(1, outputs / inputs))`.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; `match_rms_adamw`: Liu et al. 2025, arXiv 2502.16982.
    """

    kind: Literal["muon"]
    momentum: Share = 0.95
    nesterov: bool = True
    update_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    newton_schulz_steps: PositiveInt = 5
    adamw: MuonAdamW = MuonAdamW()
    weight_decay: NonNegativeFloat = 0.1


class LionConfig(_Optimizer):
    """Lion: the sign of a momentum, so every number moves by the learning rate. Source: Chen et al. 2023, 2302.06675.

    The paper uses a learning rate 3 to 10 times smaller, and a decay 3 to 10 times larger, than with AdamW.
    """

    kind: Literal["lion"]
    beta1: Share = 0.9
    beta2: Share = 0.99
    weight_decay: NonNegativeFloat = 0.1


class AdafactorConfig(_Optimizer):
    """Adafactor: the squared gradient is known by its means over inputs and over outputs of each matrix only.

    `decay_exponent`: the mean of update t has the weight `t**-decay_exponent`. `update_clip`: the largest root mean
    square of an update before the learning rate. `scale_by_parameter`: the learning rate is relative to the parameter's
    root mean square, or to 1e-3 if that is larger.

    Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5.
    """

    kind: Literal["adafactor"]
    decay_exponent: Annotated[float, Field(gt=0, le=1)] = 0.8
    update_clip: PositiveFloat = 1.0
    scale_by_parameter: bool = True
    clip_norm: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.0


class SGDConfig(_Optimizer):
    """Stochastic gradient descent with momentum, Nesterov's if asked for. Source: Sutskever et al. 2013, ICML."""

    kind: Literal["sgd"]
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGDConfig":
        if self.nesterov and not self.momentum:
            raise impossible("nesterov", "is true, but momentum is 0", "Use a momentum above 0")
        return self


OptimizerConfig = Annotated[
    AdamWConfig | MuonConfig | LionConfig | AdafactorConfig | SGDConfig,
    Field(discriminator="kind"),
    default_kind("adamw"),
]
