"""A model with another number of experts per token; its weights stay as they are."""

from moezoo.core.config.run_config import Config
from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.spec import ExpertChoiceSpec, HashChoiceSpec, LayerSpec, MoESpec


def with_top_k(config: Config, top_k: int) -> Config:
    """Return the config with another `top_k` in each MoE layer.

    Raises SpecError: the model has no MoE layers, the choice of one is not by rank, or it has too few experts.
    """
    spec = config.model
    if not spec.moes:
        raise SpecError(f"the model has no MoE layers; got top_k {top_k}; expected a mixture of experts.")

    def changed(layer: LayerSpec, index: int) -> LayerSpec:
        routed = layer.routed
        if routed is None:
            return layer
        choice = routed.router.choice
        if isinstance(choice, HashChoiceSpec | ExpertChoiceSpec):
            reason = (
                "has a table of the experts of each token id"
                if isinstance(choice, HashChoiceSpec)
                else "lets experts take tokens, by cutoffs learned for its own top_k"
            )
            raise SpecError(
                f"layers[{index}] cannot take another top_k; got {top_k}; its choice, {choice.kind}, {reason}."
            )
        router = {**routed.router.model_dump(), "top_k": top_k}
        moe = validate(MoESpec, {**routed.model_dump(), "router": router}, f"--top-k {top_k}, layers[{index}].moe")
        if layer.head_router is not None:
            return layer.model_copy(update={"head_router": layer.head_router.model_copy(update={"router": moe.router})})
        return layer.model_copy(update={"moe": moe})

    layers = tuple(changed(layer, index) for index, layer in enumerate(spec.layers))
    return config.model_copy(update={"model": spec.model_copy(update={"layers": layers})})
