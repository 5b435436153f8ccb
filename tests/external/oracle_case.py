"""Fixture cases: a tiny config, the laws of its random weights, and differences between hub and transformers files."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fixtures
import numpy as np

Shapes = dict[str, tuple[int, ...]]
Stored = dict[str, tuple[str, np.ndarray]]
Storage = Callable[[str, tuple[int, ...]], list[tuple[str, tuple[int, ...], str]]]

LAWS = {
    "matrix": {"mean": 0.0, "std": 0.25},
    "router": {"mean": 0.0, "std": 0.35},
    "embedding": {"mean": 0.0, "std": 0.5},
    "norm": {"mean": 1.0, "std": 0.2},
    "zero_centred_norm": {"mean": 0.0, "std": 0.2},
    "bias": {"mean": 0.0, "std": 0.2},
    "correction": {"mean": 0.0, "std": 0.1},
    "sink": {"mean": 0.0, "std": 1.0},
    "log_decay": {"mean": -2.0, "std": 0.5},
    "time_step": {"mean": -1.0, "std": 0.5},
    "convolution": {"mean": 0.0, "std": 0.5},
    "scale": {"mean": 1.0, "std": 0.2},
    "router_mlp": {"mean": 0.0, "std": 0.8},
    "router_threshold": {"mean": -1.5, "std": 0.3},  # few features of a token are not 0, so tokens differ
    "codes": {"mean": 0.0, "std": 16.0},  # E4M3
    "blocks": {"low": 0, "high": 255},  # two codes of MXFP4
    "table": {"distinct": 8},  # experts by token id
    "scales": {"low": 122, "high": 123},  # exponent + 127
}

# the first matching pattern decides
LAW_OF_NAME = (
    (r"e_score_correction_bias$|expert_bias$|balancing_biases$", "correction"),
    (r"sinks$|attn_sink$|attention_sink_bias$|softmax_offset$|sink_param$|self_attn\.A$", "sink"),
    (r"tid2eid$", "table"),
    (r"(^|layers\.\d+\.)hc_(attn|ffn|head)_scale$", "scale"),
    (r"(^|layers\.\d+\.)hc_(attn|ffn|head)_base$|\.ape$|_ape$", "bias"),
    (r"A_log$", "log_decay"),
    (r"dt_bias$", "time_step"),
    (r"conv1d\.weight$|conv\.conv\.weight$|conv_qk_depthwise\.weight$|sconv.*static_w", "convolution"),
    (
        r"layer_scalar$|per_expert_scale$|router\.scale$|hc(_head)?_scale$|hc\.scale$|global_scale$|l2_clip\.scale$",
        "scale",
    ),
    (r"(residual|states)_scale$|qk_norm\.temp$|(input|post_attention)_residual$", "scale"),
    (r"embed_tokens\.weight$|wte\.weight$", "embedding"),
    (r"mlp\.gate\.(down_proj|router_mlp\.(fc\d|out_proj))\.weight$", "router_mlp"),
    (r"router_mlp\.fc1\.bias$", "router_threshold"),
    (r"bias$|hc(_head)?_base$|hc\.base$", "bias"),
    (r"norm(_1|_2|_f)?(\.\d)?\.weight$", "norm"),
    (
        r"\.(gate|router|router\.layer|router\.gate|router\.classifier|gate\.wg|router\.proj|router_gate)\.weight$",
        "router",
    ),
)


def as_written(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Store a tensor unchanged in float32."""
    return [(name, shape, "F32")]


@dataclass(frozen=True)
class Case:
    """A checkpoint to create. The three functions are for differences between files of transformers and of the hub."""

    note: str
    config: dict[str, Any]
    laws: dict[str, dict[str, float]] = field(default_factory=dict)
    keep_hidden: bool = False
    cache_agrees: bool = True  # False: RoPE frequencies change with the length, so cached keys differ
    idle_experts: int = 0  # so many of all layers' experts need no token: a random MLP hardly tells tokens apart
    loss_times: int = 1  # doge: its loss is of shares of all choices, a K-th of that of all others
    refused: str = ""  # moezoo's error message, if it does not support the case
    wrapper: dict[str, Any] = field(
        default_factory=dict
    )  # outer config.json of a multimodal wrapper, without `text_config`
    hub_only: dict[str, Any] = field(default_factory=dict)
    config_additions: dict[str, Any] = field(default_factory=dict)
    as_on_the_hub: Callable[[Shapes], Shapes] = lambda shapes: shapes
    storage: Storage = as_written
    for_transformers: Callable[[Stored], Stored | None] = lambda tensors: None

    @property
    def all_laws(self) -> dict[str, dict[str, float]]:
        return LAWS | self.laws

    def wrapped(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the content of config.json, in the wrapper if there is one."""
        return {**self.wrapper, "text_config": config} if self.wrapper else config


def law_of(case: Case, name: str, dtype: str) -> str:
    """Return the law of the random values of a tensor, by its name."""
    if dtype == "U8":
        return name.rsplit("_", 1)[-1]
    if name.endswith(("weight_scale_inv", "weight_scale")):
        return "block_scale"
    if dtype == "F8_E4M3":
        return "codes"
    if re.search("visual|vision|resampler|audio_tower|talker|code2wav", name):
        return "matrix"
    law = next((law for pattern, law in LAW_OF_NAME if re.search(pattern, name)), "matrix")
    if law == "norm" and case.config["model_type"].startswith(
        ("qwen3_next", "qwen3_5_moe", "qwen4_exp", "minimax_m3", "step3p")
    ):
        return law if "linear_attn" in name else "zero_centred_norm"
    return law


COMMON = {
    "hidden_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "float32",
}

CASES: dict[str, Case] = {}


def add(name: str, note: str, **rest: Any) -> None:
    """Add a case; keywords that are fields of `Case` set those, all others go to config.json."""
    ours = {key: rest.pop(key) for key in list(rest) if key in Case.__dataclass_fields__}
    rest = COMMON | rest
    CASES[name] = Case(note, {key: value for key, value in rest.items() if value is not ...}, **ours)


# --- differences between files on the hub and files of save_pretrained


def without_identity_rows(shapes: Shapes) -> Shapes:
    """Remove gate and up of identity experts: transformers 5.23 saves and requires them, the hub has none."""
    return {name: shape for name, shape in shapes.items() if not re.search(r"experts\.(7|8|9)\.", name)}


def with_identity_rows(tensors: Stored) -> Stored:
    """Add zeros for gate and up of identity experts, which transformers requires but never uses."""
    zero = {
        re.sub(r"experts\.0\.", f"experts.{expert}.", name): (dtype, np.zeros_like(array))
        for name, (dtype, array) in tensors.items()
        for expert in (7, 8, 9)
        if re.search(r"experts\.0\.(gate|up)_proj", name)
    }
    return tensors | zero


def with_hy_v4_names(shapes: Shapes) -> Shapes:
    """Undo what transformers 5.23 renames too much when it saves: `hc_pre` comes first, and all gates are renamed."""

    def name_of(name: str) -> str:
        name = re.sub(r"(mlp\..*)linear_gate\.", r"\1gate_proj.", name)
        name = re.sub(r"hc_pre\.(hc_(attn|mlp)_layer\.)", r"\1hc_pre.", name)
        return name.replace("model.hc_pre.hc_head.", "model.hc_head.")

    return {name_of(name): shape for name, shape in shapes.items()}


def with_fused_experts(shapes: Shapes) -> Shapes:
    """Fuse experts into two tensors, gate and up concatenated; transformers 5.23 would save one per expert."""
    fused: Shapes = {}
    for name, shape in shapes.items():
        match = re.search(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$", name)
        if not match:
            fused[name] = shape
        elif match[3] != "up":
            key = match[1] + ("down_proj" if match[3] == "down" else "gate_up_proj")
            rows = shape[0] * (1 if match[3] == "down" else 2)
            fused[key] = (fused.get(key, (0,))[0] + 1, rows, shape[1])
    return fused


def as_axk1_is_released(shapes: Shapes) -> Shapes:
    """Remove the selection bias, and add the norm of the MoE layer's output to dense layers, which do not use it."""
    width = shapes["model.norm.weight"]
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    norms = {f"model.layers.{layer}.post_mlp_layernorm.weight": width for layer in layers}
    return {name: shape for name, shape in shapes.items() if "correction_bias" not in name} | norms


def as_deepseek_names(shapes: Shapes) -> Shapes:
    """Rename to the names of DeepSeek's own files, which transformers reads but does not write."""
    names = (
        ("^model\\.embed_tokens", "embed"),
        ("^model\\.hc_head\\.", ""),
        ("(attn\\.)norm\\.", "\\1kv_norm."),
        ("^model\\.", ""),
    )
    found = {}
    for name, shape in shapes.items():
        for old, new in names:
            name = re.sub(old, new, name)
        found[re.sub("^hc_(fn|base|scale)$", "hc_head_\\1", name)] = shape
    return found


def in_their_dtypes(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Store a table of experts as integers, and other tensors in float32."""
    return [(name, shape, "I64" if name.endswith("tid2eid") else "F32")]


def as_ling_is_released(shapes: Shapes) -> Shapes:
    """Name the output of linear attention `o_proj`: transformers 5.23 saves it as `dense`, and opens both."""
    linear = {name.removesuffix("A_log") for name in shapes if name.endswith(".A_log")}
    both = {f"{layer}dense.weight": f"{layer}o_proj.weight" for layer in linear}
    return {both.get(name, name): shape for name, shape in shapes.items()}


def as_kimi_linear_is_released(shapes: Shapes) -> Shapes:
    """Name dense feed-forwards `mlp`: transformers 5.23 saves them as `block_sparse_moe`, and opens both."""
    return {re.sub(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj", name): shapes[name] for name in shapes}


def in_dtype(dtype: str) -> Storage:
    """Store all tensors in one dtype."""
    return lambda name, shape: [(name, shape, dtype)]


def in_e4m3_blocks(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Store attention and feed-forward matrices as E4M3 codes with a scale per 128 x 128 block, others in bfloat16."""
    if name.endswith("e_score_correction_bias"):
        return [(name, shape, "F32")]
    if not re.search(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$", name):
        return [(name, shape, "BF16")]
    blocks = tuple(-(-size // 128) for size in shape)
    return [(name, shape, "F8_E4M3"), (f"{name}_scale_inv", blocks, "F32")]


def without_e4m3_blocks(tensors: Stored) -> Stored:
    """Decode to code * scale in float32, by definition: transformers 5.23 handles partial blocks incorrectly."""
    plain: Stored = {}
    for name, (dtype, array) in tensors.items():
        if dtype == "F8_E4M3":
            scale = tensors[f"{name}_scale_inv"][1].repeat(128, axis=0).repeat(128, axis=1)
            plain[name] = ("F32", fixtures.e4m3_values()[array] * scale[: array.shape[0], : array.shape[1]])
        elif not name.endswith("_scale_inv"):
            plain[name] = (dtype, array)
    return plain


def in_e4m3_channels(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Store attention and feed-forward matrices as E4M3 codes with a scale per row, as compressed-tensors does."""
    if not re.search(r"(self_attn|mlp)\..*_proj\.weight$", name):
        return [(name, shape, "F32")]
    return [(name, shape, "F8_E4M3"), (f"{name}_scale", (shape[0], 1), "BF16")]


def without_e4m3_channels(tensors: Stored) -> Stored:
    """Decode to code * scale in float32, by torch."""
    import torch

    plain: Stored = {}
    for name, (dtype, array) in tensors.items():
        if dtype == "F8_E4M3":
            bits = np.asarray(tensors[f"{name}_scale"][1]).view(np.uint16).astype(np.uint32) << 16
            codes = torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
            plain[name] = ("F32", (codes.float() * torch.from_numpy(bits.view(np.float32))).numpy())
        elif not name.endswith("_scale"):
            plain[name] = (dtype, array)
    return plain


def in_mxfp4(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """Store experts [expert, in, out] as blocks of 32 4-bit codes along `in`, each with a power-of-two scale."""
    if not re.search(r"experts\.(gate_up|down)_proj$", name):
        return [(name, shape, "BF16")]
    experts, inner, outer = shape
    return [
        (f"{name}_blocks", (experts, outer, inner // 32, 16), "U8"),
        (f"{name}_scales", (experts, outer, inner // 32), "U8"),
    ]


def without_mxfp4(tensors: Stored) -> Stored:
    """Decode MXFP4 codes to float32, low nibble first."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    plain: Stored = {}
    for name, (dtype, array) in tensors.items():
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")][1].astype(np.int32) - 127
            codes = np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], 32)
            dense = np.ldexp(values[codes], scales[..., None]).reshape(*array.shape[:2], -1)
            plain[name.removesuffix("_blocks")] = ("F32", np.ascontiguousarray(dense.transpose(0, 2, 1)))
        elif not name.endswith("_scales"):
            plain[name] = (dtype, array)
    return plain


def with_mixed_experts(shapes: Shapes) -> Shapes:
    """Fuse the experts of even layers; the others have one tensor per expert."""
    fused = with_fused_experts(shapes)
    even = {name: shape for name, shape in fused.items() if re.search(r"layers\.\d*[02468]\.", name)}
    return even | {name: shape for name, shape in shapes.items() if not re.search(r"layers\.\d*[02468]\.", name)}


def without_decays(shapes: Shapes) -> Shapes:
    """Remove the buffers of lightning attention, which follow from the config; transformers saves and requires them."""
    return {name: shape for name, shape in shapes.items() if not re.search("slope_rate|_decay$", name)}


def with_decays(heads: int, block: int) -> Callable[[Stored], Stored]:
    """Return the inverse of `without_decays`."""

    def added(tensors: Stored) -> Stored:
        depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
        found, place = dict(tensors), np.arange(1, block + 1)
        between = place[:, None] - place[None, :]
        for name in [name for name in tensors if name.endswith("self_attn.qkv_proj.weight")]:
            start, layer = name.removesuffix("qkv_proj.weight"), int(name.split(".")[2])
            rates = 2.0 ** (-8 * np.arange(1, heads + 1) / heads) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)
            rate = rates[:, None, None]
            buffers = {
                "slope_rate": rate,
                "query_decay": np.exp(-rate * place[:, None]),
                "key_decay": np.exp(-rate * (block - place[:, None])),
                "diagonal_decay": np.where(between >= 0, np.exp(-rate * np.maximum(between, 0)), 0)[None],
            }
            found |= {f"{start}{key}": ("F32", value.astype(np.float32)) for key, value in buffers.items()}
        return found

    return added


HASHES = r"\.ple_embedding\.(layer_multipliers|ngram_heads_(vocab_sizes|offsets))$"


def without_hashes(shapes: Shapes) -> Shapes:
    """Remove the buffers of hash functions, which follow from the config; transformers saves them, and derives them."""
    return {name: shape for name, shape in with_fused_experts(shapes).items() if not re.search(HASHES, name)}


def with_hashes(prefix: str, config: dict[str, Any]) -> Callable[[Stored], Stored]:
    """Return the inverse of `without_hashes`, and of what `inside_a_wrapper` adds; `prefix` of layers."""

    def added(tensors: Stored) -> Stored:
        from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4

        found = without(r"^mtp\.|^model\.visual\.")(tensors)
        own = qwen4.Qwen4ExpTextConfig(**config)
        for index, layer in enumerate(own.ple_layer_ids):
            module = qwen4.Qwen4ExpTextNGramEmbedding(own, own.ple_embed_dim, layer - 1, index)
            found |= {
                f"{prefix}layers.{layer - 1}.ple.ple_embedding.{name}": ("I64", value.numpy())
                for name, value in module.named_buffers()
            }
        return found

    return added


def with_prediction_layer(shapes: Shapes) -> Shapes:
    """Add DeepSeek's multi-token prediction layer, numbered after the last layer, with its other tensors."""
    embed, last = (
        shapes["model.embed_tokens.weight"],
        max(int(name.split(".")[2]) for name in shapes if "layers." in name),
    )
    here, there = f"model.layers.{last}.", f"model.layers.{last + 1}."
    extra = {name.replace(here, there): shape for name, shape in shapes.items() if name.startswith(here)}
    width = embed[1]
    return (
        shapes
        | extra
        | {
            f"{there}embed_tokens.weight": embed,
            f"{there}shared_head.head.weight": embed,
            f"{there}shared_head.norm.weight": (width,),
            f"{there}eh_proj.weight": (width, 2 * width),
            f"{there}enorm.weight": (width,),
            f"{there}hnorm.weight": (width,),
        }
    )


def without(pattern: str) -> Callable[[Stored], Stored]:
    """Remove the tensors whose name matches the pattern."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def renamed(text: str, head: str, extra: Shapes) -> Callable[[Shapes], Shapes]:
    """Rename the prefixes of layers and head as in a multimodal wrapper, and add tensors of other modalities."""
    names = ((r"^model\.", text), (r"^lm_head\.", f"{head}lm_head."))
    return lambda shapes: {_replaced(name, names): shape for name, shape in shapes.items()} | extra


def unwrapped(text: str, head: str, extra: Shapes) -> Callable[[Stored], Stored]:
    """Return the inverse of `renamed`."""
    names = ((f"^{re.escape(text)}", "model."), (f"^{re.escape(head)}lm_head\\.", "lm_head."))
    return lambda tensors: {_replaced(name, names): tensors[name] for name in tensors if name not in extra}


def _replaced(name: str, replacements: tuple[tuple[str, str], ...]) -> str:
    pattern, other = next(((old, new) for old, new in replacements if re.search(old, name)), ("^", ""))
    return re.sub(pattern, other, name)


def inside_a_wrapper_without_hashes(shapes: Shapes) -> Shapes:
    """Both of what `without_hashes` and `inside_a_wrapper` do."""
    return inside_a_wrapper(without_hashes(shapes))


def inside_a_wrapper(shapes: Shapes) -> Shapes:
    """Move the text model to `model.language_model`, and add an image encoder and a multi-token prediction head."""
    text = {
        name.replace("model.", "model.language_model.", 1): shape for name, shape in with_fused_experts(shapes).items()
    }
    return text | {
        "model.visual.patch_embed.proj.weight": (24, 3, 2, 4, 4),
        "model.visual.blocks.0.attn.qkv.bias": (72,),
        "mtp.fc.weight": (32, 64),
        "mtp.norm.weight": (32,),
    }
