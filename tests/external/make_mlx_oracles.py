"""Write tiny folders with mlx-lm, in floats and quantized, and compare moezoo with its answers.

    python tests/external/make_mlx_oracles.py OUT [CASE ...] [--every]  # needs mlx-lm, not moezoo
    python tests/external/make_mlx_oracles.py --names OUT               # writes them into tests/data/mlx_names.json
    python tests/external/make_mlx_oracles.py --check OUT [NAME ...]    # needs moezoo: a Markdown table

Each case is a fixture's config in the hub's spelling, with sizes that divide into groups, and options that mlx-lm
ignores or cannot load removed; weights are random. A case is written in bfloat16 and in one quantization of `MODES`,
or with `--every` in each of them, of weights in bfloat16 and float16, and in the `VARIANTS` of config.json.
`oracle.npz` has the logits, in float32 arithmetic, of the model whose weights are the stored ones or the codes
decoded by `mx.dequantize`, and greedy text. `--check` also compares the chosen experts with those of moezoo's
reference on the decoded weights.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import fixtures

BATCH, LENGTH, CONTINUED = 2, 24, 12
SIZES = {
    "hidden_size": 64,
    "d_model": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "ffn_hidden_size": 128,
    "moe_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64,
}
AFFINE = ((4, 64), (2, 32), (3, 64), (5, 32), (6, 64), (8, 32))
MODES = (*(("affine", *each) for each in AFFINE), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
Listed = dict[str, dict[str, Any] | bool]  # formats by pattern of module, as in config.json
MIXED: Listed = {
    "*.mlp.gate": {"bits": 8, "group_size": 64, "mode": "affine"},
    "*.self_attn.*": {"bits": 6, "group_size": 32, "mode": "affine"},
    "*.layers.1.*": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "*.down_proj": {"bits": 3, "group_size": 32, "mode": "affine"},
}
FLOAT_ROUTER: Listed = {"*.mlp.gate": False, "*.mlp.shared_expert_gate": False}
# Mode, dtype of the weights, listed modules, and fields of `quantization` that are left out, by name of the folder.
VARIANTS: dict[str, tuple[tuple[str, int, int], str, Listed, tuple[str, ...]]] = {
    **{f"{mode}{bits}_{group}": ((mode, bits, group), "bfloat16", {}, ()) for mode, bits, group in MODES},
    "affine4_64_float16": (("affine", 4, 64), "float16", {}, ()),
    "affine3_32_float32": (("affine", 3, 32), "float32", {}, ()),
    "affine4_32_without_mode": (("affine", 4, 32), "bfloat16", {}, ("mode",)),
    "affine4_64_mixed": (("affine", 4, 64), "bfloat16", MIXED, ()),
    "affine4_64_float_router": (("affine", 4, 64), "bfloat16", FLOAT_ROUTER, ()),
    "mxfp4_float_router": (("mxfp4", 4, 32), "bfloat16", FLOAT_ROUTER | {"lm_head": False}, ()),
}
# Fixtures and the options that mlx-lm has no implementation of; None removes a field.
CASES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "bailing_hybrid": {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "head_dim": 64,
        "moe_shared_expert_intermediate_size": 64,
        "num_hidden_layers": 3,  # mlx-lm has full attention in layers after the last whole group
    },
    "dbrx": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "dots1": {"sliding_window": None, "max_window_layers": None, "layer_types": None},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "gemma4": {},
    "gemma4_text": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"index_topk_freq": None, "attention_bias": False},  # mlx-lm has an indexer in every layer
    "gpt_oss": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    "granitemoe": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_conv_bias": True,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,  # mlx-lm norms all groups of heads together
        "mamba_proj_bias": False,
        "position_embedding_type": "nope",
    },
    "hunyuan_v1_moe": {"model_type": "hunyuan", "head_dim": None, "attention_head_dim": None},
    "jamba": {"expert_layer_offset": 1, "expert_layer_period": 2, "mamba_expand": 2},
    "kimi_linear": {
        "head_dim": 8,
        "linear_attn_config": {
            **{"full_attn_layers": [3], "kda_layers": [1, 2, 4]},
            **{"num_heads": 2, "head_dim": 64, "short_conv_kernel_size": 3},
        },
        "model_max_length": 128,
        "rms_norm_eps": 1e-6,  # which is that of the latent's norm in any case, but not for mlx-lm
    },
    "laguna": {},
    "lfm2_moe": {},
    "llama4": {},
    "longcat_flash": {},
    "mellum": {"mlp_layer_types": None},
    "mimo_v2_flash": {"sliding_window_size": 128},  # mlx-lm's windows are one token shorter
    "minimax_m2": {},
    "minimax_m3_vl": {"dense_intermediate_size": 128, "shared_intermediate_size": 64},
    "mistral4_wrapped": {},
    "mixtral": {"head_dim": None},
    "nemotron_h": {
        **dict.fromkeys(("attention_bias", "mamba_proj_bias", "mlp_bias", "use_bias"), False),
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "topk_group": 1,
        "use_conv_bias": True,
    },
    "olmoe": {"clip_qkv": None},
    "phimoe": {"rope_scaling": None, "rope_parameters": None},
    "qwen2_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1},
    "qwen3_5_moe": {},
    "qwen3_moe": {"rope_scaling": None},
    "qwen3_next": {},
    "qwen3_vl_moe": {},
    "solar_open": {"rope_scaling": None},
    "deepseek_ocr2": {"first_k_dense_replace": 1, "routed_scaling_factor": None},
    "step3p7": {"share_expert_dim": 64},
}
ALONE = {"deepseek_ocr2": "deepseek", "step3p7": "step3p5"}
"""Cases of wrappers that mlx-lm does not have, with the text model's type, which it has."""


def config_of(case: str) -> dict[str, Any]:
    """Return a case's config.json with the sizes and options of this file."""
    config = copy.deepcopy(fixtures.read_fixture(case).description["hub_config"])
    config.pop("quantization_config", None)
    if case in ALONE:
        config = {"model_type": ALONE[case], **config["text_config"]}
    inner = config.get("text_config", config)
    for place in (inner, inner.get("ffn_config", {})):
        place.update({name: size for name, size in SIZES.items() if isinstance(place.get(name), int)})
    if "qk_head_dim" in inner:
        inner["qk_head_dim"] = inner["qk_nope_head_dim"] + inner["qk_rope_head_dim"]
    for name, value in CASES[case].items():
        inner.pop(name, None)
        if value is not None:
            inner[name] = value
    return config


def write(case: str, out: Path, names: Sequence[str]) -> None:
    """Write a case in bfloat16 and in the variants of these names."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
    from mlx_lm import utils

    mx.random.seed(sum(case.encode()))
    mx.set_default_device(mx.cpu)
    config = config_of(case)
    kind, arguments = utils._get_classes(config)
    model = kind(arguments.from_dict(config))

    def drawn(path: str, value: Any) -> Any:
        if not mx.issubdtype(value.dtype, mx.floating):
            return value
        if value.ndim < 2:
            return (value + 0.1 * mx.random.normal(value.shape)).astype(mx.bfloat16)
        return (mx.random.normal(value.shape) * (0.5 if "embed_tokens" in path else 0.12)).astype(mx.bfloat16)

    model.update(tree_map_with_path(drawn, model.parameters()))
    save(model, config, out / f"{case}_bfloat16")
    drawn_values = dict(tree_flatten(model.parameters()))
    for name in names:
        model = kind(arguments.from_dict(config))
        model.update(tree_unflatten(list(drawn_values.items())))
        write_variant(model, config, out / f"{case}_{name}", *VARIANTS[name])


def write_variant(
    model: Any,
    config: dict[str, Any],
    folder: Path,
    mode: tuple[str, int, int],
    dtype: str,
    listed: Listed,
    without: tuple[str, ...],
) -> None:
    """Quantize a model and write it, with mlx-lm's answers for the decoded codes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm import utils

    name, bits, group = mode
    model.set_dtype(getattr(mx, dtype))
    own = getattr(model, "quant_predicate", None)
    unquantized: dict[str, bool] = {}

    def chosen(path: str, module: Any) -> dict[str, Any] | bool:
        for pattern, value in listed.items():
            if fnmatchcase(path, pattern):
                if value is False:
                    unquantized[path] = False
                return value
        return True if own is None else own(path, module)

    quantized, config = utils.quantize_model(model, config, group, bits, mode=name, quant_predicate=chosen)
    config["quantization"] |= unquantized
    for field in without:
        del config["quantization"][field]
    config["quantization_config"] = config["quantization"]
    save(quantized, config, folder, answers=False)
    floats = type(model)(model.args)
    parameters = dict(tree_flatten(quantized.parameters()))
    modules = dict(quantized.named_modules())
    for path in [path for path in parameters if path.endswith(".scales")]:
        own = modules[path.removesuffix(".scales")]
        weight = path.replace(".scales", ".weight")
        scales, biases = parameters.pop(path), parameters.pop(path.replace(".scales", ".biases"), None)
        parameters[weight] = mx.dequantize(parameters[weight], scales, biases, own.group_size, own.bits, own.mode)
    floats.update(tree_unflatten(list(parameters.items())))
    answer(floats, config, folder)


def save(model: Any, config: dict[str, Any], folder: Path, *, answers: bool = True) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import utils

    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), parameters, metadata={"format": "mlx"})
    names = dict.fromkeys(sorted(parameters), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=1))
    utils.save_config(dict(config), folder / "config.json")
    if answers:
        copied = type(model)(model.args)
        copied.update(model.parameters())
        answer(copied, config, folder)


def answer(model: Any, config: dict[str, Any], folder: Path) -> None:
    """Write logits and greedy text of a model, in float32."""
    import mlx.core as mx

    model.set_dtype(mx.float32)
    vocabulary = config.get("text_config", config)["vocab_size"]
    ids = np.random.default_rng(5).integers(0, vocabulary, (BATCH, LENGTH), dtype=np.int32)
    logits = np.array(model(mx.array(ids)).astype(mx.float32))
    grown = ids
    for _ in range(CONTINUED):
        following = np.array(mx.argmax(model(mx.array(grown))[:, -1], axis=-1)).astype(np.int32)
        grown = np.concatenate([grown, following[:, None]], axis=1)
    np.savez(folder / "oracle.npz", input_ids=ids, logits=logits, greedy=grown[:, LENGTH:])


def write_names(out: Path) -> None:
    """Write config, names and shapes of the folders in floats, in place of those of the same cases."""
    path = fixtures.FOLDER.parent / "mlx_names.json"
    cases = json.loads(path.read_text())
    for folder in out.glob("*_bfloat16"):
        data = (folder / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                shapes.setdefault(tuple(entry["shape"]), []).append(name)
        rows = sorted([pattern, list(shape)] for shape in shapes for pattern in fixtures.contracted(shapes[shape]))
        config = json.loads((folder / "config.json").read_text())
        cases[folder.name.removesuffix("_bfloat16")] = {"config": config, "tensors": rows}
    texts = []
    for name, case in sorted(cases.items()):
        tensors = ",\n   ".join(json.dumps(row) for row in case["tensors"])
        config_text = json.dumps(case["config"])
        texts.append(f' {json.dumps(name)}: {{\n  "config": {config_text},\n  "tensors": [\n   {tensors}\n  ]\n }}')
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def check(folder: Path) -> str:
    """Return a row of the table: the largest difference of a logit on each backend, or why the folder is refused."""
    import moezoo
    from moezoo.core.errors import MoezooError

    cells = []
    with np.load(folder / "oracle.npz") as expected:
        experts = reference_experts(folder, expected["input_ids"])
        for backend in ("jax", "mlx"):
            try:
                model = moezoo.load(folder, backend=backend)
                output = model.forward(expected["input_ids"])
                found = output.logits
                greedy = model.generate(expected["input_ids"], max_new_tokens=CONTINUED, temperature=0.0)
                moved = sum(
                    int((np.sort(own.expert) != np.sort(known)).any(-1).sum())
                    for own, known in zip(output.routing, experts, strict=True)
                )
                words = "" if np.array_equal(greedy, expected["greedy"]) else ", other tokens"
                words += f", {moved} other choices" if moved else ""
                cells.append(f"{np.abs(found - expected['logits']).max():.1e}{words}")
            except MoezooError as error:
                cells.append(f"refuses: {error!s:.300}".replace("|", "/"))
    return f"| {folder.name} | " + " | ".join(cells) + " |"


def reference_experts(folder: Path, ids: np.ndarray) -> list[np.ndarray]:
    """Return the experts [B, T, K] of each MoE layer in the float64 reference on the decoded weights."""
    from moezoo.core.huggingface.checkpoint import open_checkpoint
    from moezoo.core.reference.transformer import forward

    checkpoint = open_checkpoint(folder)
    weights = {name: np.asarray(checkpoint.weights[name], np.float64) for name in checkpoint.weights}
    return [routing.expert_PK.reshape(*ids.shape, -1) for routing in forward(checkpoint.spec, weights, ids).routings]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--names", action="store_true")
    parser.add_argument("--every", action="store_true", help="Each case in every mode, width and variant.")
    parser.add_argument("out", type=Path)
    parser.add_argument("which", nargs="*", metavar="CASE")
    options = parser.parse_args()
    if options.names:
        write_names(options.out)
        return 0
    if options.check:
        print("| folder | JAX | MLX |\n|---|---|---|")
        for folder in sorted(options.out.iterdir()):
            if (folder / "oracle.npz").exists() and (not options.which or folder.name in options.which):
                print(check(folder), flush=True)
        return 0
    for place, case in enumerate(CASES):
        if options.which and case not in options.which:
            continue
        try:
            names = [f"{mode}{bits}_{group}" for mode, bits, group in MODES]
            write(case, options.out, [*VARIANTS] if options.every else [names[place % len(MODES)]])
        except Exception as error:  # of mlx-lm: the table says so
            print(f"{case}: mlx-lm: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
