"""Exchange adapters with mlx-lm and with PEFT on transformers, in both directions.

    python -m tests.external.check_adapters [CASE ...]

For each fixture: an adapter with random factors is written in each layout; mlx-lm and PEFT open the folder on the base
and give logits, which are compared with those of moezoo. Then each of the two makes an adapter of its own, trains it
for a few steps and saves it, and moezoo opens that. Needs moezoo, torch, transformers, peft and mlx-lm, on the CPU.
Prints a Markdown table of the largest differences of a logit; fails if one is above its tolerance.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import moezoo
from moezoo.core.huggingface.adapters.write import write_adapter
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import AdapterSpec, ModelSpec
from tests.support.fixtures import write_checkpoint

CASES = ("qwen3_moe", "mixtral", "olmoe_renormalised")  # mlx-lm ignores the clip of the other one
ROLES = ("attention", "experts", "router")
TOLERANCES = {"mlx": 5e-5, "peft": 1e-5}
Logits = np.ndarray[Any, np.dtype[Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| base | adapter | difference | logits moved by |\n|---|---|---|---|")
    agree = True
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            base = write_checkpoint(case, Path(folder) / "base", spelling="hub")
            agree &= check_ours(case, base, Path(folder))
            agree &= check_theirs(case, base, Path(folder))
    return 0 if agree else 1


def check_ours(case: str, base: Path, folder: Path) -> bool:
    """Compare logits of other tools, on folders that moezoo writes, with its own."""
    description = describe_checkpoint(base)
    adapter = AdapterSpec(rank=3, scale=1.5, on=ROLES)
    spec = ModelSpec.model_validate({**description.spec.model_dump(), "adapter": adapter.model_dump()})
    draw = np.random.default_rng(0)
    rows = [row for row in parameter_table(spec) if row.base is not None]
    weights = {row.name: draw.normal(0, 0.15, row.shape).astype(np.float32) for row in rows}
    agree = True
    opened: tuple[tuple[Any, Callable[[Path, Path], Logits]], ...] = (
        ("mlx", logits_of_mlx_lm),
        ("peft", logits_of_peft),
        ("peft-fused", logits_of_peft),
    )
    for layout, read in opened:
        out = folder / layout
        out.mkdir()
        write_adapter(adapter, weights, description, str(base), layout, out)
        agree &= row(case, f"ours, as {layout}", read(base, out), base, out, layout)
    return agree


def check_theirs(case: str, base: Path, folder: Path) -> bool:
    """Compare logits of moezoo with those of other tools, on adapters that these have trained."""
    agree = True
    for name, train in (("mlx", train_with_mlx_lm), ("peft", train_with_peft)):
        out = folder / f"theirs_{name}"
        agree &= row(case, f"trained by {'mlx-lm' if name == 'mlx' else 'PEFT'}", train(base, out), base, out, name)
    return agree


def row(case: str, what: str, theirs: Logits, base: Path, adapter: Path, layout: str) -> bool:
    """Print a row of the table, and return whether it agrees."""
    ours = moezoo.load(base, "mlx", adapter=adapter).forward(TOKENS).logits
    plain = moezoo.load(base, "mlx").forward(TOKENS).logits
    difference, moved = float(np.abs(ours - theirs).max()), float(np.abs(ours - plain).max())
    good = difference < TOLERANCES[layout.partition("-")[0]] < moved
    print(f"| {case} | {what} | {difference:.1e}{'' if good else ' **differs**'} | {moved:.2g} |", flush=True)
    return good


TOKENS = np.random.default_rng(1).integers(0, 60, (2, 12)).astype(np.int32)

# --- mlx-lm ----------------------------------------------------------------------------------------------------------


def logits_of_mlx_lm(base: Path, adapter: Path) -> Logits:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    from mlx_lm.tuner.utils import load_adapters

    model = load_adapters(model, str(adapter))
    model.set_dtype(mx.float32)
    model.eval()
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def train_with_mlx_lm(base: Path, out: Path) -> Logits:
    """Train an adapter for a few steps with mlx-lm's layers, and save it as its command does."""
    import json

    import mlx.core as mx
    from mlx import nn, optimizers
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model, _ = load_model(base)
    model.set_dtype(mx.float32)
    model.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), parameters)
    tokens = mx.array(TOKENS)

    def loss(model: Any) -> Any:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    optimizer = optimizers.Adam(0.05)
    for _ in range(5):
        _, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": parameters}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return np.array(model(tokens))


# --- PEFT ------------------------------------------------------------------------------------------------------------


def _transformers_model(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, experts_implementation="eager").eval()


def _logits(model: Any) -> Logits:
    import torch

    with torch.no_grad():
        logits: Logits = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    return logits


def logits_of_peft(base: Path, adapter: Path) -> Logits:
    from peft import PeftModel

    return _logits(PeftModel.from_pretrained(_transformers_model(base), str(adapter)).eval())


def train_with_peft(base: Path, out: Path) -> Logits:
    """Train an adapter of attention, experts and router for a few steps with PEFT, and save it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )
    model = get_peft_model(_transformers_model(base), config)
    tokens = torch.tensor(TOKENS.astype(np.int64))
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(str(out))
    return _logits(model.eval())


if __name__ == "__main__":
    sys.exit(main())
