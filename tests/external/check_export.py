"""Compare the logits of transformers and mlx-lm on checkpoint folders with those of moezoo.

    python tests/external/check_export.py FOLDER ...      # FOLDER/expected.npz: input_ids, logits, optionally greedy
    python tests/external/check_export.py FOLDER:EXPECTED.npz ...
    python tests/external/check_export.py --fixtures [CASE ...]      # the checked-in fixtures, in the hub's format

Needs torch, transformers and mlx-lm, but not moezoo. Both run on the CPU in float32, regardless of the stored dtype.
Prints a Markdown table; fails if an implementation that opened the folder differs. The table also shows implementations
that do not support the family or the file.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import fixtures

COMPUTED = re.compile(  # buffers, computed where files lack them
    r"self_attn.(slope_rate|(query|key|diagonal)_decay)$|ple_embedding\.(layer_multipliers|ngram_heads_(vocab_sizes|offsets))$"
)
TOLERANCE = 5e-4  # a correct float32 implementation is 1e-5 to 2e-4 away, a wrong detail above 1e-2


@dataclass(frozen=True)
class Answer:
    """Outputs of an implementation for a folder: logits [B, T, V] and greedy tokens, or why it cannot load it."""

    logits: np.ndarray | None = None
    greedy: np.ndarray | None = None
    refusal: str = ""

    def cell(self, expected: dict[str, np.ndarray]) -> str:
        """Return the table cell: the largest difference, and a note if greedy tokens differ."""
        if self.logits is None:
            return self.refusal
        words = f"{self.difference(expected):.1e}" + ("" if self.agrees(expected) else " **differs**")
        if self.greedy is not None and not np.array_equal(self.greedy, expected["greedy"]):
            words += ", other tokens"
        return words

    def difference(self, expected: dict[str, np.ndarray]) -> float:
        """Return the largest absolute difference of a logit; NaN counts as infinite."""
        return float(np.nan_to_num(np.abs(self.logits - expected["logits"]), nan=np.inf).max())

    def agrees(self, expected: dict[str, np.ndarray]) -> bool:
        return self.logits is None or self.difference(expected) < TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="FOLDER[:NPZ] or CASE")
    parser.add_argument(
        "--fixtures", action="store_true", help="The arguments are names of fixtures; without arguments, all fixtures."
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| checkpoint | transformers | mlx-lm |\n|---|---|---|")
    agree = True
    if options.fixtures:
        for case in options.what or fixtures.cases() + fixtures.cases(refused=True):
            with tempfile.TemporaryDirectory() as folder:
                fixtures.write_checkpoint(case, Path(folder), spelling="hub")
                agree &= row(case, Path(folder), fixtures.read_fixture(case).expected)
        return 0 if agree else 1
    for word in options.what:
        folder, _, npz = word.partition(":")
        with np.load(npz or Path(folder, "expected.npz")) as arrays:
            agree &= row(Path(folder).name, Path(folder), dict(arrays))
    return 0 if agree else 1


def row(name: str, folder: Path, expected: dict[str, np.ndarray]) -> bool:
    """Print a line of the table, and return whether all implementations that loaded the folder agree."""
    answers = [attempted(ask, folder, expected) for ask in (transformers_answer, mlx_answer)]
    print(f"| {name} | " + " | ".join(answer.cell(expected) for answer in answers) + " |", flush=True)
    return all(answer.agrees(expected) for answer in answers)


def attempted(ask: Callable[..., Answer], folder: Path, expected: dict[str, np.ndarray]) -> Answer:
    """Return the answer, or a one-line reason why there is none."""
    steps = expected["greedy"].shape[1] if "greedy" in expected else 0
    try:
        return ask(folder, expected["input_ids"], steps)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Answer(refusal=f"refuses: {first[:110]}".replace("|", "/"))


def transformers_answer(folder: Path, input_ids: np.ndarray, steps: int) -> Answer:
    """Return logits of one forward pass, and greedy tokens with the KV cache."""
    import doge_by_token
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "longcat_flash" and config.get("zero_expert_num"):
        folder = with_identity_rows(folder, config)
    causal = config["model_type"] in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    usual = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMultimodalLM
    kind = transformers.Mistral4ForCausalLM if config["model_type"] == "mistral4" else usual
    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    absent = [name for name in report["missing_keys"] if not COMPUTED.search(str(name))]
    if absent or report["mismatched_keys"]:
        names = sorted(map(str, [*absent, *report["mismatched_keys"]]))
        return Answer(refusal=f"is missing {names[0]} and {len(names) - 1} more")
    model = getattr(model, "thinker", model).float().eval()  # of Qwen3-Omni
    prompt = torch.from_numpy(np.asarray(input_ids, np.int64))
    if config["model_type"] == "doge":  # its class mixes the routers' outputs of several tokens
        return Answer(*(answer.numpy() for answer in doge_by_token.by_token(model, prompt, steps)))
    with torch.no_grad():
        logits = model(prompt, use_cache=False).logits.numpy()
        if not steps:
            return Answer(logits)
        model.generation_config.eos_token_id = None  # `min_new_tokens` would forbid the tokens that end a text
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        )
    return Answer(logits, tokens[:, prompt.shape[1] :].numpy())


def with_identity_rows(folder: Path, config: dict[str, Any]) -> Path:
    """Return a copy with zeros for gate and up of identity experts, which transformers requires but never uses.

    The copy is left in the folder of temporary files, because the caller's process ends soon.
    """
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    first = config["n_routed_experts"]
    tensors |= {
        name.replace("experts.0.", f"experts.{expert}."): tensor * 0
        for name, tensor in tensors.items()
        for expert in range(first, first + config["zero_expert_num"])
        if re.search(r"experts\.0\.(gate|up)_proj", name)
    }
    copy = Path(tempfile.mkdtemp())
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def mlx_answer(folder: Path, input_ids: np.ndarray, steps: int) -> Answer:
    """Return logits of one forward pass, and greedy tokens with the KV cache."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x)
    logits = np.array(model(mx.array(input_ids)).astype(mx.float32))
    if not steps:
        return Answer(logits)
    cache, tokens, fed = make_prompt_cache(model), [], mx.array(input_ids)
    for _ in range(steps):
        fed = mx.argmax(model(fed, cache=cache)[:, -1], axis=-1, keepdims=True)
        mx.eval(fed)
        tokens.append(np.array(fed))
    return Answer(logits, np.concatenate(tokens, axis=1))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
