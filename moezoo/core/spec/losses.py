"""Auxiliary losses as data. Each is computed per layer that lists it, except `pooled_balance`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moezoo.core.spec.base import Part

Coefficient = Annotated[float, Field(ge=0)]
NumDevices = Annotated[int, Field(ge=2)]  # a single device is always balanced


class SwitchBalanceLossSpec(Part):
    """Switch load-balancing loss of one layer, 1 when balanced. Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4."""

    kind: Literal["switch_balance"] = "switch_balance"
    coefficient: Coefficient


class RouterZLossSpec(Part):
    """Penalty on large router logits. Source: Zoph et al. 2022, arXiv 2202.08906, eq. 5."""

    kind: Literal["router_z"] = "router_z"
    coefficient: Coefficient


class ExpertBalanceLossSpec(Part):
    """Expert-level balance, 1 when balanced. Source: Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066, eq. 12-14."""

    kind: Literal["expert_balance"] = "expert_balance"
    coefficient: Coefficient


class DeviceBalanceLossSpec(Part):
    """Balance between `num_devices` equal groups of consecutive experts, 1 when balanced.

    Source: Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066, eq. 15-17.
    """

    kind: Literal["device_balance"] = "device_balance"
    coefficient: Coefficient
    num_devices: NumDevices


class CommunicationBalanceLossSpec(Part):
    """Balance of the tokens received by `num_devices` groups of experts; a token counts once per group it is sent to.

    `max_devices` is M, the maximum number of groups a token may be sent to. Source: DeepSeek-AI 2024 (DeepSeek-V2),
    arXiv 2405.04434, eq. 29-31.
    """

    kind: Literal["communication_balance"] = "communication_balance"
    coefficient: Coefficient
    num_devices: NumDevices
    max_devices: PositiveInt


class SequenceBalanceLossSpec(Part):
    """Balance of the K highest scores within each sequence, ignoring any selection bias; 1 when balanced.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv 2412.19437, eq. 17-20.
    """

    kind: Literal["sequence_balance"] = "sequence_balance"
    coefficient: Coefficient


class GlobalBalanceLossSpec(Part):
    """Switch load-balancing loss with the load of the whole step, summed over its micro-batches and devices.

    Source: Qiu et al. 2025, arXiv 2501.11873.
    """

    kind: Literal["global_balance"] = "global_balance"
    coefficient: Coefficient


class ImportanceLossSpec(Part):
    """Squared coefficient of variation of each expert's summed weights. Source: Shazeer 2017, 1701.06538, eq. 6."""

    kind: Literal["importance"] = "importance"
    coefficient: Coefficient


class LoadLossSpec(Part):
    """Squared coefficient of variation of a smooth load estimate; requires the noise of `noisy_top_k`.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 8-11.
    """

    kind: Literal["load"] = "load"
    coefficient: Coefficient


class HeterogeneousBalanceLossSpec(Part):
    """Balance in which a zero-computation expert is weighted by `ffn_share`; 1 when balanced.

    Source: Jin et al. 2024 (MoE++), arXiv 2410.07348, eq. 7. Differs: normalized to 1 when balanced.
    """

    kind: Literal["heterogeneous_balance"] = "heterogeneous_balance"
    coefficient: Coefficient


class PooledBalanceLossSpec(Part):
    """Load-balancing loss over the pooled tokens of all layers that list it, as in transformers; K when balanced.

    It cannot detect layers that have each collapsed onto different experts. `times`: how often this layer's tokens are
    in the pool; its routers over attention heads are there twice in transformers (JetMoE). Source: transformers,
    `load_balancing_loss_func` of its Mixtral model.
    """

    kind: Literal["pooled_balance"] = "pooled_balance"
    coefficient: Coefficient
    times: PositiveInt = 1


AuxiliaryLossSpec = Annotated[
    SwitchBalanceLossSpec
    | RouterZLossSpec
    | ExpertBalanceLossSpec
    | DeviceBalanceLossSpec
    | CommunicationBalanceLossSpec
    | SequenceBalanceLossSpec
    | GlobalBalanceLossSpec
    | ImportanceLossSpec
    | LoadLossSpec
    | HeterogeneousBalanceLossSpec
    | PooledBalanceLossSpec,
    Field(discriminator="kind"),
]
