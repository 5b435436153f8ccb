"""Check before training that the cross-entropy has a gradient for every router."""

from moezoo.core.config.run_config import Config
from moezoo.core.errors import SpecError
from moezoo.core.spec import MoESpec, TopPChoiceSpec


def check_routers(config: Config, *, resumed: bool) -> list[str]:
    """Return a warning if a router of pretrained or resumed weights cannot learn (`MoESpec.router_learns`).

    Raises SpecError: such a router in a model that is trained from random weights. It would stay as it was
    initialized, moved by auxiliary losses and weight decay alone.
    """
    dead = [(index, moe) for index, moe in config.model.moes if not moe.router_learns]
    if not dead:
        return []
    index, moe = dead[0]
    which = f"the router of layer {index}" if len(dead) == 1 else f"the routers of {len(dead)} layers, first {index},"
    problem = (
        f"{which} cannot learn: router.{_cause(moe)}, so each token's one expert always has weight "
        f"{moe.router.scale:g} and the cross-entropy has no gradient for the router"
    )
    if resumed or config.init_from is not None:
        return [f"warning: {problem}; only auxiliary losses and weight decay change it. To train it: {_advice(moe)}."]
    raise SpecError(f"{problem}; expected a weight that depends on its logit. Use {_advice(moe)}, or {_larger(moe)}.")


def _cause(moe: MoESpec) -> str:
    router = moe.router
    if router.renormalize == "none" or router.weight == "softmax_of_chosen":
        return f"{_number(moe)} and router.weight is softmax_of_chosen"
    return f"{_number(moe)} and router.renormalize is {router.renormalize}"


def _number(moe: MoESpec) -> str:
    choice = moe.router.choice
    return f"choice.p is {choice.p:g}" if isinstance(choice, TopPChoiceSpec) else f"top_k is {moe.router.top_k}"


def _larger(moe: MoESpec) -> str:
    return "a larger p" if isinstance(moe.router.choice, TopPChoiceSpec) else "a larger top_k"


def _advice(moe: MoESpec) -> str:
    router = moe.router
    if router.weight != "softmax_of_chosen":
        return "renormalize: none"
    return f"renormalize: none with weight: {'sigmoid_of_chosen' if router.score == 'none' else 'score'}"
