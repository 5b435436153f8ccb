"""Write a folder of the qwen3_moe family in mlx-lm's layout with generated 4-bit codes; and generate from one.

    python tests/external/quantized_folder.py write FOLDER [--sizes 30B | 2GiB | S | M | E64] [--scales BF16 | F32]
    python tests/external/quantized_folder.py run FOLDER --with moezoo-mlx | moezoo-jax | mlx-lm [--new 32] [--prompt 8]

`write` needs NumPy alone, and writes shards of about 2 GiB with codes that are drawn at random, 4 bits in groups of 64,
and routers of 8 bits. `run` prints seconds to load, seconds of the prompt, tokens per second, and peak memory; mlx-lm
needs its own environment. Linux only.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import numpy as np

GROUP = 64
SHARD_BYTES = 2 << 30
SIZES = {
    # layers, width, heads, key/value heads, width of a head, experts, chosen, width of an expert, vocabulary
    "30B": (48, 2048, 32, 4, 128, 128, 8, 768, 151_936),
    "2GiB": (12, 2048, 16, 4, 128, 64, 8, 768, 32_000),
    "S": (4, 512, 8, 4, 64, 8, 2, 512, 8192),
    "M": (8, 1024, 16, 8, 64, 8, 2, 1024, 32_000),
    "E64": (4, 1024, 16, 8, 64, 64, 4, 512, 8192),
}


def config_of(sizes):
    layers, width, heads, kv_heads, head, experts, chosen, expert, vocab = sizes
    quantization = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    quantization |= {f"model.layers.{i}.mlp.gate": {"group_size": GROUP, "bits": 8} for i in range(layers)}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": expert,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "quantization": quantization,
        "quantization_config": quantization,
    }


def modules_of(sizes):
    """Yield path, shape [..., out, in] and bits of each matrix; bits are None for a norm."""
    layers, width, heads, kv_heads, head, experts, _, expert, vocab = sizes
    yield "model.embed_tokens", (vocab, width), 4
    for index in range(layers):
        path = f"model.layers.{index}"
        for part, outputs in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{path}.self_attn.{part}_proj", (outputs * head, width), 4
        yield f"{path}.self_attn.o_proj", (width, heads * head), 4
        for norm, size in (("self_attn.q_norm", head), ("self_attn.k_norm", head)):
            yield f"{path}.{norm}", (size,), None
        yield f"{path}.input_layernorm", (width,), None
        yield f"{path}.post_attention_layernorm", (width,), None
        yield f"{path}.mlp.gate", (experts, width), 8
        yield f"{path}.mlp.switch_mlp.gate_proj", (experts, expert, width), 4
        yield f"{path}.mlp.switch_mlp.up_proj", (experts, expert, width), 4
        yield f"{path}.mlp.switch_mlp.down_proj", (experts, width, expert), 4
    yield "model.norm", (width,), None
    yield "lm_head", (vocab, width), 4


def tensors_of(path, shape, bits, scales, random):
    """Yield name, dtype and array of a module's tensors; numbers have a standard deviation near 1 / sqrt(inputs)."""
    dtype = {"F32": np.float32, "BF16": np.uint16}[scales]

    def stored(values):
        values = values.astype(np.float32)
        return values if scales == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)

    if bits is None:
        yield f"{path}.weight", scales, stored(np.ones(shape))
        return
    codes = np.frombuffer(random.bytes(int(np.prod(shape)) * bits // 8), np.uint32)
    yield f"{path}.weight", "U32", codes.reshape(*shape[:-1], -1)
    step = 12**0.5 / 2**bits / shape[-1] ** 0.5
    scale = stored(step * random.uniform(0.7, 1.3, (*shape[:-1], shape[-1] // GROUP)))
    values = scale if scales == "F32" else (scale.astype(np.uint32) << 16).view(np.float32)
    yield f"{path}.scales", scales, scale
    yield f"{path}.biases", scales, stored(-(2 ** (bits - 1)) * values)
    assert scale.dtype == dtype


def write(folder, sizes, scales):
    folder.mkdir(parents=True)
    random, shards, waiting, size = np.random.default_rng(0), [], [], 0

    def flush():
        nonlocal waiting, size
        name = f"model-{len(shards) + 1:05}.safetensors"
        header, end = {"__metadata__": {"format": "mlx"}}, 0
        for tensor, dtype, array in waiting:
            header[tensor] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
            end += array.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, _, array in waiting:
                file.write(array.tobytes())
        shards.append((name, [tensor for tensor, _, _ in waiting], end))
        waiting, size = [], 0

    for path, shape, bits in modules_of(sizes):
        for tensor in tensors_of(path, shape, bits, scales, random):
            waiting.append(tensor)
            size += tensor[2].nbytes
        if size > SHARD_BYTES:
            flush()
    flush()
    index = {tensor: name for name, tensors, _ in shards for tensor in tensors}
    total = {"total_size": sum(end for _, _, end in shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config_of(sizes), indent=1))
    print(f"{folder}: {total['total_size'] / 2**30:.2f} GiB in {len(shards)} files")


def peak_gib():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def run(folder, contender, new, prompt_length):
    prompt = np.random.default_rng(1).integers(0, 8000, prompt_length).astype(np.int32)
    begin = time.perf_counter()
    stamps, tokens = [], []
    if contender == "mlx-lm":
        importlib.import_module("moezoo.mlx_backend")  # before MLX, for the same BLAS
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        model, _ = load_model(folder)
        loaded = time.perf_counter()
        cache = make_prompt_cache(model)
        token = mx.argmax(model(mx.array(prompt[None]), cache=cache)[:, -1], axis=-1)
        for _ in range(new):
            mx.eval(token)
            stamps.append(time.perf_counter())
            tokens.append(token.item())
            token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
    else:
        import moezoo
        from moezoo.core.reference.sampling import SamplingOptions

        model = moezoo.load(folder, backend=contender.removeprefix("moezoo-")).model
        loaded = time.perf_counter()
        generation = model.start_generation([prompt], new, SamplingOptions(temperature=0.0))
        for _ in range(new):
            tokens.append(int(generation.next().fetch()[0]))
            stamps.append(time.perf_counter())
    rate = (len(stamps) - 1) / (stamps[-1] - stamps[0]) if new > 1 else float("nan")
    print(
        f"{contender}: load {loaded - begin:.1f} s, prompt of {prompt_length} {stamps[0] - loaded:.2f} s, "
        f"{rate:.3g} tokens/s, peak {peak_gib():.2f} GiB, tokens {tokens[:6]}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", choices=SIZES, default="30B")
    parser.add_argument("--scales", choices=["BF16", "F32"], default="BF16")
    parser.add_argument("--with", dest="contender", choices=["moezoo-mlx", "moezoo-jax", "mlx-lm"])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=8)
    given = parser.parse_args()
    if given.command == "write":
        write(given.folder, SIZES[given.sizes], given.scales)
    else:
        run(given.folder, given.contender, given.new, given.prompt)


if __name__ == "__main__":
    main()
