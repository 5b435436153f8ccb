"""Tensor names shared by several families: parts of their tensor mappings."""

from collections.abc import Sequence

from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside

LAYER = "model.layers.{layer}"
OURS = "layers.{layer}"
VISION = ("*vision_tower.*", "*mm_projector.*", "*multi_modal_projector.*")
"""Tensors of a vision tower around a text model, kept verbatim."""

# Embedding, final norm, head (files of a tied model may have a copy of the embedding), and the two norms of a layer.
MODEL: tuple[Fused, ...] = (
    Tensor("model.embed_tokens.weight", "v d", "embedding.weight", "v d"),
    Tensor("model.norm.weight", "d", "final_norm.scale", "d"),
    Tensor("lm_head.weight", "v d", "head.w_head", "d v"),
    Tensor("lm_head.weight", "v d", "embedding.weight", "v d", copy=True),
    Tensor("lm_head.bias", "v", "head.b_head", "v"),
)
PRE_NORMS: tuple[Fused, ...] = (
    Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
    Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
)


def grouped_query(
    theirs: str = f"{LAYER}.self_attn", ours: str = f"{OURS}.attention", *, output: str = "o_proj"
) -> tuple[Fused, ...]:
    """Return rules for the query, key, value and output projections, with biases if the model has them."""
    found: list[Fused] = []
    for name, which, heads in (("q", "query", "n"), ("k", "key", "m"), ("v", "value", "m")):
        found.append(Tensor(f"{theirs}.{name}_proj.weight", f"({heads} h) d", f"{ours}.w_{which}", f"d {heads} h"))
        found.append(Tensor(f"{theirs}.{name}_proj.bias", f"({heads} h)", f"{ours}.b_{which}", f"{heads} h"))
    found.append(Tensor(f"{theirs}.{output}.weight", "d (n h)", f"{ours}.w_output", "n h d"))
    found.append(Tensor(f"{theirs}.{output}.bias", "d", f"{ours}.b_output", "d"))
    return tuple(found)


def qk_norm(
    theirs: str = f"{LAYER}.self_attn", names: tuple[str, str] = ("q_norm", "k_norm"), *, over: str = "head"
) -> tuple[Fused, ...]:
    """Return rules for the norms of queries and keys, per head or over the whole `projection`."""
    found = []
    for name, which in zip(names, ("query", "key"), strict=True):
        axes, our_axes = ("h", "h") if over == "head" else ("(n h)", "n h")
        found.append(Tensor(f"{theirs}.{name}.weight", axes, f"{OURS}.attention.{which}_norm.scale", our_axes))
    return tuple(found)


def latent(theirs: str = f"{LAYER}.self_attn", ours: str = f"{OURS}.attention") -> tuple[Fused, ...]:
    """Return rules for multi-head latent attention with DeepSeek's tensor names."""
    return (
        *beside(
            f"{ours}.w_query_down", "d q", (Tensor(f"{theirs}.q_b_proj.weight", "(n h) q", f"{ours}.w_query", "q n h"),)
        ),
        Tensor(f"{theirs}.q_proj.weight", "(n h) d", f"{ours}.w_query", "d n h"),
        Tensor(f"{theirs}.q_a_proj.weight", "q d", f"{ours}.w_query_down", "d q"),
        Tensor(f"{theirs}.q_a_proj.bias", "q", f"{ours}.b_query_down", "q"),
        Tensor(f"{theirs}.q_a_layernorm.weight", "q", f"{ours}.query_norm.scale", "q"),
        Fused(
            f"{theirs}.kv_a_proj_with_mqa.weight",
            "x d",
            (Part(f"{ours}.w_latent", "z", "d z"), Part(f"{ours}.w_rope_key", "o", "d o")),
        ),
        Fused(
            f"{theirs}.kv_a_proj_with_mqa.bias",
            "x",
            (Part(f"{ours}.b_latent", "z", "z"), Part(f"{ours}.b_rope_key", "o", "o")),
        ),
        Tensor(f"{theirs}.kv_a_layernorm.weight", "z", f"{ours}.latent_norm.scale", "z"),
        Fused(
            f"{theirs}.kv_b_proj.weight",
            "(n x) z",
            (Part(f"{ours}.w_key", "h", "z n h"), Part(f"{ours}.w_value", "v", "z n v")),
        ),
        Tensor(f"{theirs}.o_proj.weight", "d (n v)", f"{ours}.w_output", "n v d"),
        Tensor(f"{theirs}.o_proj.bias", "d", f"{ours}.b_output", "d"),
    )


def hyper_connection(names: tuple[str, str, str], ours: str, *, mixed: bool) -> tuple[Fused, ...]:
    """Return rules for the maps of one block to weights of streams, their biases and scales: `names` of theirs."""
    outputs = {"read": "i", "write": "u", **({"mix": "m n"} if mixed else {})}
    found = []
    for name, axes, each in zip(names, ("x (j d)", "x", "x"), ("j d ", "", ""), strict=True):
        which = {key: f"w_{key}" if each else f"b_{key}" for key in outputs}
        parts = [Part(f"{ours}.{which[key]}", letters, f"{each}{letters}") for key, letters in outputs.items()]
        if name == names[-1]:
            parts = [Part(f"{ours}.{key}_scale", "y", "y") for key in outputs]
        found.append(Fused(name, axes, tuple(parts)))
    return tuple(found)


def feed_forward(
    theirs: str,
    ours: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Fused, ...]:
    """Return rules for a gated feed-forward: three matrices, with biases if the model has them."""
    gate, up, down = names
    return (
        Tensor(f"{theirs}.{gate}.weight", "f d", f"{ours}.w_gate", "d f"),
        Tensor(f"{theirs}.{up}.weight", "f d", f"{ours}.w_up", "d f"),
        Tensor(f"{theirs}.{down}.weight", "d f", f"{ours}.w_down", "f d"),
        Tensor(f"{theirs}.{gate}.bias", "f", f"{ours}.b_gate", "f"),
        Tensor(f"{theirs}.{up}.bias", "f", f"{ours}.b_up", "f"),
        Tensor(f"{theirs}.{down}.bias", "d", f"{ours}.b_down", "d"),
    )


def experts(
    theirs: str = f"{LAYER}.mlp.experts",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ours: str = f"{OURS}.moe.experts",
) -> tuple[Fused, ...]:
    """Return rules for routed experts: one tensor per expert, or all fused with gate and up concatenated."""
    gate, up, down = names
    each = f"{theirs}.{{expert}}"
    return (
        Tensor(f"{each}.{gate}.weight", "f d", f"{ours}.w_gate", "e d f"),
        Tensor(f"{each}.{up}.weight", "f d", f"{ours}.w_up", "e d f"),
        Tensor(f"{each}.{down}.weight", "d f", f"{ours}.w_down", "e f d"),
        Tensor(f"{each}.{gate}.bias", "f", f"{ours}.b_gate", "e f"),
        Tensor(f"{each}.{up}.bias", "f", f"{ours}.b_up", "e f"),
        Tensor(f"{each}.{down}.bias", "d", f"{ours}.b_down", "e d"),
        *fused_experts(theirs, ours),
    )


def fused_experts(theirs: str = f"{LAYER}.mlp.experts", ours: str = f"{OURS}.moe.experts") -> tuple[Fused, ...]:
    """Return rules for routed experts, all of them in two tensors."""
    return (
        gate_and_up(f"{theirs}.gate_up_proj", "e x d", ours),
        Tensor(f"{theirs}.down_proj", "e d f", f"{ours}.w_down", "e f d"),
    )


def exported(rules: Sequence[Fused], first: Sequence[Fused]) -> tuple[Fused, ...]:
    """Return the rules with `first` after the embedding: of rules for one parameter, an export uses the first one."""
    return (rules[0], *first, *(rule for rule in rules[1:] if rule not in first))


def switch(
    theirs: str = f"{LAYER}.mlp.switch_mlp",
    ours: str = f"{OURS}.moe.experts",
) -> tuple[Fused, ...]:
    """Return mlx-lm's rules for routed experts: three stacked matrices, with biases if the model has them."""
    return (
        Tensor(f"{theirs}.gate_proj.weight", "e f d", f"{ours}.w_gate", "e d f"),
        Tensor(f"{theirs}.up_proj.weight", "e f d", f"{ours}.w_up", "e d f"),
        Tensor(f"{theirs}.down_proj.weight", "e d f", f"{ours}.w_down", "e f d"),
        Tensor(f"{theirs}.gate_proj.bias", "e f", f"{ours}.b_gate", "e f"),
        Tensor(f"{theirs}.up_proj.bias", "e f", f"{ours}.b_up", "e f"),
        Tensor(f"{theirs}.down_proj.bias", "e d", f"{ours}.b_down", "e d"),
    )


def absorbed(theirs: str = f"{LAYER}.self_attn", ours: str = f"{OURS}.attention") -> tuple[Fused, ...]:
    """Return mlx-lm's rules for the two halves of `kv_b_proj` in multi-head latent attention."""
    return (
        Tensor(f"{theirs}.embed_q.weight", "n z h", f"{ours}.w_key", "z n h"),
        Tensor(f"{theirs}.unembed_out.weight", "n v z", f"{ours}.w_value", "z n v"),
    )


def gate_and_up(theirs: str, axes: str, ours: str) -> Fused:
    """Return the rule for a tensor with gate and up of all experts, concatenated along axis `x`."""
    return Fused(theirs, axes, (Part(f"{ours}.w_gate", "f", "e d f"), Part(f"{ours}.w_up", "f", "e d f")))


def router(theirs: str = f"{LAYER}.mlp.gate", ours: str = f"{OURS}.moe.router") -> tuple[Fused, ...]:
    """Return rules for the router's matrix, and its selection bias if the model has one."""
    return (
        Tensor(f"{theirs}.weight", "e d", f"{ours}.w_router", "d e"),
        Tensor(f"{theirs}.e_score_correction_bias", "e", f"{ours}.selection_bias", "e"),
    )
