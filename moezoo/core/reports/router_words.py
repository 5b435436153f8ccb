"""Short descriptions of a router, for the page of `moezoo describe`; defaults are left out."""

from moezoo.core.spec import (
    ExpertChoiceSpec,
    GroupedTopKChoiceSpec,
    MoESpec,
    RouterSpec,
    TopKChoiceSpec,
    TopPChoiceSpec,
)


def choice_in_words(spec: MoESpec) -> str:
    """Describe how many experts a token has, and how they are chosen: `2`, `2 (in 1 of 4 groups)`."""
    choice, top_k = spec.router.choice, str(spec.router.top_k)
    match choice:
        case TopKChoiceSpec():
            return top_k
        case GroupedTopKChoiceSpec():
            return f"{top_k} (in {choice.keep} of {choice.num_groups} groups)"
        case TopPChoiceSpec():
            return f"up to {top_k} (for {choice.p:g} of the score)"
        case ExpertChoiceSpec():
            return f"on average {top_k} (experts choose tokens)"
        case _:
            return f"{top_k} ({choice.kind.replace('_', ' ')})"


def weights_in_words(router: RouterSpec) -> str:
    """Describe scores and weights of a router: `softmax, renormalized`."""
    jitter = "" if router.jitter is None else f"{router.jitter.of} jitter {router.jitter.amount:g}"
    words = (
        (router.score if router.weight == "score" else router.weight.replace("_", " "), True),
        ("of a normalized input", router.input == "normalized"),
        ("by product keys", router.product_keys),
        ("with a bias", router.bias),
        ("" if router.mlp is None else f"of an MLP {router.mlp.hidden_dim}", router.mlp is not None),
        ("averaged over depth", router.mlp is not None and router.mlp.depth_average),
        ("with a gating residual", router.gating_residual),
        (f"temperature {router.temperature:g}", router.temperature != 1),
        (f"softcap {router.softcap}", router.softcap is not None),
        ("with a selection bias", router.selection_bias is not None),
        ("renormalized" if router.renormalize == "sum" else "renormalized by p-norm", router.renormalize != "none"),
        (f"times {router.scale:g}", router.scale != 1),
        ("times a learned scale", router.learned_scale),
        ("times a scale per expert", router.per_expert_scale),
        ("on the input", router.apply_to == "input"),
        (jitter, router.jitter is not None),
        ("in the compute dtype", router.dtype == "compute"),
    )
    return ", ".join(word for word, there in words if there)
