"""Measure peak resident memory of loading a checkpoint, relative to its size; Linux only.

    python tests/external/measure_memory.py [--gib 2] [--dtype BF16 F32] [--layout expert fused] [--backend jax mlx]

A checkpoint of the mixtral family is written to a temporary folder (`--folder` keeps it), in about five shards, with
one tensor per expert or with fused experts, filled with small random numbers. A separate process loads it with
`moezoo.load`, after it has imported all modules and loaded a tiny checkpoint. Columns: `peak`, the peak resident memory
(VmHWM) while loading minus that before loading (interpreter, libraries, the tiny model), relative to the size of the
files; the same without the subtraction; the peak of anonymous memory alone (sampled every 2 ms) and of file pages;
memory after loading; and seconds. The limit for `peak` is 1.15.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

LIMIT = 1.15
SIZES = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2432, "num_local_experts": 8}


def config(num_layers, dtype, sizes=SIZES):
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.02,
        "output_router_logits": False,
        **sizes,
    }


def shapes(num_layers, layout, sizes=SIZES):
    d, f, e, v = (sizes[name] for name in ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size"))
    found = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,)}
        found |= {f"{at}.self_attn.{name}_proj.weight": (d, d) for name in "qo"}
        found |= {f"{at}.self_attn.{name}_proj.weight": (d // 4, d) for name in "kv"}
        if layout == "fused":
            found |= {f"{at}.mlp.gate.weight": (e, d), f"{at}.mlp.experts.gate_up_proj": (e, 2 * f, d)}
            found |= {f"{at}.mlp.experts.down_proj": (e, d, f)}
        else:
            found |= {f"{at}.block_sparse_moe.gate.weight": (e, d)}
            for expert in range(e):
                inside = f"{at}.block_sparse_moe.experts.{expert}"
                found |= {f"{inside}.w1.weight": (f, d), f"{inside}.w3.weight": (f, d), f"{inside}.w2.weight": (d, f)}
    return found


def write_checkpoint(folder, num_layers, dtype, layout, sizes=SIZES, shard_bytes=500_000_000):
    from moezoo.core.checkpoint.safetensors_file import write_stream
    from moezoo.core.checkpoint.safetensors_header import encode_header

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(num_layers, dtype, sizes)))
    width, kind = {"BF16": (2, "bfloat16"), "F16": (2, "float16"), "F32": (4, "float32")}[dtype]
    shards, room = [{}], shard_bytes
    for name, shape in shapes(num_layers, layout, sizes).items():
        size = width * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = (dtype, shape)
        room -= size
    weight_map, total, draw = {}, 0, np.random.default_rng(0)

    def array(shape):
        import ml_dtypes

        # Generated once and repeated: only the amount of memory matters.
        block = (draw.standard_normal(1 << 16) * 0.02).astype(getattr(ml_dtypes, kind, None) or kind)
        return np.resize(block, shape)

    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_stream(
            folder / file,
            encode_header(tensors, {"format": "pt"}),
            ((name, array(shape)) for name, (_, shape) in tensors.items()),
        )
        weight_map |= dict.fromkeys(tensors, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def status_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 for name in names}


def measure(folder, tiny, backend):
    """Load a checkpoint in this process, and print the measurements as one line of JSON."""
    import moezoo

    moezoo.load(tiny, backend=backend)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, peaks, stop = status_bytes(), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def sample():
        while not stop.wait(0.002):
            now = status_bytes()
            for name in peaks:
                peaks[name] = max(peaks[name], now[name])

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    start = time.perf_counter()
    model = moezoo.load(folder, backend=backend)
    seconds = time.perf_counter() - start
    stop.set()
    sampler.join()
    after = status_bytes()
    assert model.config.model.vocab_size == SIZES["vocab_size"]
    print(json.dumps({"before": before, "after": after, "peaks": peaks, "seconds": seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--dtype", nargs="+", default=["BF16", "F32"], choices=["BF16", "F16", "F32"])
    parser.add_argument("--layout", nargs="+", default=["expert", "fused"], choices=["expert", "fused"])
    parser.add_argument("--backend", nargs="+", default=["jax", "mlx"], choices=["jax", "mlx"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return 0
    failed = False
    print("dtype layout  backend   files GB   peak  with libraries  anonymous  files  stays  seconds")
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        for dtype in arguments.dtype:
            for layout in arguments.layout:
                folder, tiny = root / f"{dtype}_{layout}", root / f"tiny_{dtype}_{layout}"
                width = 4 if dtype == "F32" else 2
                layer = sum(int(np.prod(shape)) for name, shape in shapes(1, layout).items() if "layers" in name)
                ends = sum(int(np.prod(shape)) for shape in shapes(0, layout).values())
                num_layers = max(1, round((arguments.gib * 2**30 / width - ends) / layer))
                if not (folder / "config.json").exists():
                    write_checkpoint(folder, num_layers, dtype, layout)
                write_checkpoint(
                    tiny,
                    2,
                    dtype,
                    layout,
                    {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_local_experts": 4},
                )
                size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
                for backend in arguments.backend:
                    command = [sys.executable, __file__, "--measure", str(folder), str(tiny), backend]
                    result = subprocess.run(command, capture_output=True, text=True, check=False)
                    if result.returncode:
                        print(result.stderr[-2000:])
                        return 1
                    told = json.loads(result.stdout.splitlines()[-1])
                    before, after, peaks = told["before"], told["after"], told["peaks"]
                    peak = (after["VmHWM"] - before["VmRSS"]) / size
                    failed |= peak > LIMIT
                    print(
                        f"{dtype:5} {layout:7} {backend:7} {size / 1e9:9.2f} {peak:7.3f} {after['VmHWM'] / size:12.3f} "
                        f"{(peaks['RssAnon'] - before['RssAnon']) / size:12.3f} "
                        f"{(peaks['RssFile'] - before['RssFile']) / size:8.3f} "
                        f"{(after['VmRSS'] - before['VmRSS']) / size:6.3f} {told['seconds']:8.1f}"
                        + ("  above the limit" if peak > LIMIT else ""),
                        flush=True,
                    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
