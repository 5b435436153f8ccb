"""Write tests/data/huggingface: outputs of transformers for tiny checkpoints of every family.

    python tests/external/make_oracles.py [CASE ...]      # default: cases without a fixture
    python tests/external/make_oracles.py --check [CASE ...]      # recompute, and compare with the checked-in fixtures

Needs torch and transformers, but not moezoo; README.md in this folder lists the versions. A seed is used if the
reference is unambiguous with it: see `Verdict`.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
import doge_by_token  # noqa: E402
import fixtures  # noqa: E402
import oracle_families  # noqa: E402, F401
import oracle_options  # noqa: E402, F401
import oracle_wrappers  # noqa: E402, F401
from oracle_case import CASES, Case, law_of  # noqa: E402

BATCH, LENGTH, CONTINUED = 2, 24, 12
SMALLEST_GAP = 1e-4
SMALLEST_MARGIN = 2e-3


@dataclass(frozen=True)
class Verdict:
    """Measures of how unambiguous and how exact the reference is over prompt and continuation.

    A correct float32 implementation differs by about 1e-5: this must not change a choice of experts, groups or sparse
    attention (`gap`) or a greedy token (`margin`), and a wrong expert must be visible (`idle_experts`,
    `distinct_tokens`).
    """

    gap: float
    margin: float
    idle_experts: int
    distinct_tokens: int
    noise_flips: int  # routings that change with a relative weight change of 1e-5
    cache_difference: float
    spelling_difference: float

    @property
    def decisive(self) -> bool:
        return (
            self.gap > SMALLEST_GAP
            and self.margin > SMALLEST_MARGIN
            and self.idle_experts == 0
            and self.distinct_tokens >= 6
            and self.noise_flips == 0
            and self.cache_difference < 1e-4
            and self.spelling_difference < 1e-6
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument(
        "--check", action="store_true", help="Recompute and compare with the fixtures instead of writing them."
    )
    parser.add_argument("--out", type=Path, default=fixtures.FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = options.cases or [name for name in CASES if options.check or not (options.out / f"{name}.npz").exists()]
    failures = [name for name in names if not (check(name) if options.check else make(name, options.out))]
    if failures:
        print(f"failed: {' '.join(failures)}")
    return 1 if failures else 0


def make(name: str, out: Path) -> bool:
    """Try seeds until one is decisive, and write the fixture."""
    description = described(name, CASES[name])
    verdict = None
    before = [fixtures.read_fixture(name).description["seed"]] if (out / f"{name}.json").exists() else []
    for seed in [*before, *range(200)]:
        description["seed"] = seed
        answers, verdict = computed(description, CASES[name], only_if_decisive=True)
        if verdict.decisive:
            description["sha256"] = fixtures.digest(fixtures.drawn_tensors(description))
            description["checks"] = {key: float(f"{value:.3g}") for key, value in asdict(verdict).items()}
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(compact(description))
            np.savez_compressed(out / f"{name}.npz", **answers)
            size = sum((out / f"{name}.{suffix}").stat().st_size for suffix in ("json", "npz"))
            print(f"{name}: seed {seed}, {size / 1024:.1f} KiB, {verdict}", flush=True)
            return True
    print(f"{name}: no seed below 200 is decisive; last verdict: {verdict}", flush=True)
    return False


def check(name: str) -> bool:
    """Recompute a fixture from its json, and print the largest difference from the checked-in one."""
    fixture = fixtures.read_fixture(name)
    answers, _ = computed(fixture.description, CASES[name], only_if_decisive=False)
    same = set(answers) == set(fixture.expected)
    worst = max(
        float(np.max(np.abs(answers[key] - fixture.expected[key]))) for key in answers if key in fixture.expected
    )
    print(f"{name}: largest difference {worst:.1e}{'' if same else ', other arrays'}", flush=True)
    return same and worst < 1e-4


def described(name: str, case: Case) -> dict[str, Any]:
    """Return a fixture's json without the seed: the configs, and the tensors that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(case.config))
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = model_class(config)
        model = kind(config) if config.model_type == "mistral4" else kind.from_config(config)
        model.save_pretrained(folder)
        saved = json.loads(Path(folder, "config.json").read_text())
        tensors = header(Path(folder, "model.safetensors"))
    hub = {"architectures": saved["architectures"], **case.config}
    grouped: dict[tuple[str, tuple[int, ...], str], list[str]] = defaultdict(list)
    for tensor, shape in case.as_on_the_hub(tensors).items():
        for stored_name, stored_shape, dtype in case.storage(tensor, shape):
            grouped[dtype, stored_shape, law_of(case, stored_name, dtype)].append(stored_name)
    lines = [
        [pattern, dtype, list(shape), law]
        for (dtype, shape, law), names in grouped.items()
        for pattern in fixtures.contracted(names)
    ]
    used = {law for *_, law in lines}
    return {
        "case": name,
        "note": case.note,
        "made_by": {"transformers": transformers.__version__, "torch": torch.__version__},
        "seed": 0,
        **({"refused": case.refused} if case.refused else {}),
        "config": case.wrapped({**saved, **case.config_additions}),
        "hub_config": case.wrapped({**hub, **case.config_additions, **case.hub_only}),
        "laws": {law: numbers for law, numbers in case.all_laws.items() if law in used},
        "tensors": sorted(lines),
    }


def model_class(config: Any) -> Any:
    """Return the class whose `from_pretrained` loads the language model, in a wrapper if it has no class of its own.

    mistral4 has no automatic class.
    """
    if config.model_type == "mistral4":
        return transformers.Mistral4ForCausalLM
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMultimodalLM


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a safetensors file."""
    data = path.read_bytes()
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}


def computed(
    description: dict[str, Any], case: Case, *, only_if_decisive: bool
) -> tuple[dict[str, np.ndarray], Verdict]:
    """Return the outputs of transformers; for a seed that is not decisive, skip the expensive half."""
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(description, case, Path(folder, "saved"), "saved")
        prompt = torch.from_numpy(prompt_ids(description))
        with torch.no_grad():
            greedy, margin, step_logits = continued(model, prompt)
            whole = torch.cat([prompt, greedy], dim=1)
            with every_gap() as gaps, Routings(model) as routings:
                whole_logits = model(whole, use_cache=False).logits
        if not case.cache_agrees:
            margin, step_logits = torch.ones_like(margin), whole_logits[:, LENGTH - 1 : -1]
        verdict = Verdict(
            gap=min([*gaps, *routings.gaps], default=np.inf),
            margin=float(margin.min()),
            idle_experts=max(0, routings.idle_experts() - case.idle_experts),
            distinct_tokens=len(np.unique(greedy.numpy())),
            noise_flips=0,
            cache_difference=float((whole_logits[:, LENGTH - 1 : -1] - step_logits).abs().max()),
            spelling_difference=0.0,
        )
        if only_if_decisive and not verdict.decisive:
            return {}, verdict
        if not case.cache_agrees:
            model = loaded(
                description, case, Path(folder, "saved"), "saved"
            )  # its RoPE frequencies keep those of the longest sequence
        answers = answered(model, prompt, keep_hidden=case.keep_hidden, loss_times=case.loss_times)
        if description["config"]["model_type"] == "doge":
            right, own = doge_by_token.differences(doge_by_token.opened(Path(folder, "saved")), prompt)
            print(f"token by token: corrected class {right:.1e}, transformers' own forward {own:.1e}", flush=True)
            if right > SMALLEST_GAP / 2:
                raise SystemExit("the corrected class of Doge does not give what decoding token by token gives")
        if case.cache_agrees:
            answers |= {"greedy": greedy.numpy().astype(np.int32), "greedy_margin": margin.numpy()}
        with torch.no_grad():
            other = loaded(description, case, Path(folder, "hub"), "hub")(prompt, use_cache=False).logits
            flips = noise_flips(model, whole, routings)
        spelling = float((other - torch.from_numpy(answers["logits"])).abs().max())
        verdict = Verdict(**{**asdict(verdict), "noise_flips": flips, "spelling_difference": spelling})
    return answers, verdict


def prompt_ids(description: dict[str, Any]) -> np.ndarray:
    """Return random token ids from the fixture's seed, int64 [2, 24]."""
    config = fixtures.text_config(description["config"])
    law = {"low": 0, "high": (config.get("unpadded_vocab_size") or config["vocab_size"]) - 1}
    return fixtures.drawn(description["seed"], "input_ids", (BATCH, LENGTH), "U8", law).astype(np.int64)


def loaded(description: dict[str, Any], case: Case, folder: Path, spelling: str) -> torch.nn.Module:
    """Load the checkpoint with transformers in float32; exit if any tensor is missing or unexpected."""
    fixtures.write_described(description, folder, spelling=spelling)
    tensors = case.for_transformers(fixtures.drawn_tensors(description))
    if tensors is not None:  # files that transformers cannot read, or would not compute exactly
        fixtures.write_safetensors(folder / "model.safetensors", tensors)
        config = json.loads((folder / "config.json").read_text())
        config = config["text_config"] if case.wrapper else config
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config))
    kind = model_class(transformers.AutoConfig.from_pretrained(folder))
    model, report = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    problems = {key: names for key, names in report.items() if names}
    if problems:
        raise SystemExit(f"{description['case']}: {problems}")
    stored = fixtures.drawn_tensors(description)
    for name, buffer in model.named_buffers():  # transformers 5.23 sets one number of zaya's to -1 when it loads a file
        if name in stored:
            buffer.copy_(torch.from_numpy(stored[name][1]))
    return doge_by_token.corrected(getattr(model, "thinker", model).eval())


def answered(
    model: torch.nn.Module, prompt: torch.Tensor, *, keep_hidden: bool, loss_times: int
) -> dict[str, np.ndarray]:
    """Return all arrays of a fixture that are computed from the prompt."""
    with Routings(model) as routings:
        output = model(prompt, labels=prompt, use_cache=False, output_hidden_states=True)
    output.loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    answers = {
        "input_ids": prompt.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "ce_loss": output.loss.detach().numpy(),
        "grad_norm": torch.stack(squares).sum().sqrt().float().numpy(),
    }
    model.zero_grad()
    answers |= routings.arrays()
    if keep_hidden:
        hidden = [hidden[0].detach() for hidden in output.hidden_states]
        # Of several residual streams, their mean.
        answers["hidden"] = torch.stack([each.mean(1) if each.ndim == 3 else each for each in hidden]).numpy()
    with torch.no_grad():
        pooled = model(prompt, labels=prompt, use_cache=False, output_router_logits=True)
    if pooled.get("aux_loss") is not None:
        answers["aux_loss"] = np.float32(loss_times * pooled.aux_loss)
    return {key: np.asarray(value) for key, value in answers.items()}


def continued(model: torch.nn.Module, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return greedy tokens with the KV cache [2, 12], the margin of each, and logits [2, 12, V]."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=CONTINUED,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(output.logits, dim=1)
    best = torch.sort(logits, dim=-1, descending=True).values
    return output.sequences[:, LENGTH:], best[..., 0] - best[..., 1], logits


def noise_flips(model: torch.nn.Module, tokens: torch.Tensor, before: "Routings") -> int:
    """Return the number of routings that change if every parameter is multiplied by 1 + 1e-5 N(0, 1), in place."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-5 * torch.randn(parameter.shape, generator=generator))
    with Routings(model) as after:
        model(tokens, use_cache=False)
    return int(np.sum(np.any(after.arrays()["topk_idx"] != before.arrays()["topk_idx"], axis=-1)))


@contextlib.contextmanager
def every_gap() -> Iterator[list[float]]:
    """Collect the smallest gap between the last selected and the first unselected value of every top-k inside."""
    gaps: list[float] = []
    originals = torch.topk, torch.Tensor.topk

    def watched(values: torch.Tensor, k: int, *arguments: Any, **options: Any) -> Any:
        a_groups_score = values.ndim == 3 and k == 2  # the two largest are summed for a group score: no choice
        if k < values.shape[-1] and not a_groups_score:
            unmasked = values.float().masked_fill(values < -1e30, -torch.inf)  # masks may add the lowest float
            ordered = torch.sort(unmasked, dim=-1, descending=True).values
            gap = ordered[..., k - 1] - ordered[..., k]
            gaps.append(float(gap[~gap.isnan()].min()) if bool((~gap.isnan()).any()) else np.inf)
        return originals[0](values, k, *arguments, **options)

    torch.topk = torch.Tensor.topk = watched
    try:
        yield gaps
    finally:
        torch.topk, torch.Tensor.topk = originals


class Routings:
    """Context manager that records the outputs of every router of a model with hooks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers: dict[str, dict[str, torch.Tensor]] = {}
        self.gaps: list[float] = []
        self.hooks: list[Any] = []

    def __enter__(self) -> "Routings":
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            if kind == "DbrxExperts":
                self.hooks.append(module.register_forward_pre_hook(self._before_experts(name.replace("experts", ""))))
            elif kind == "Gemma4TextRouter":
                self.hooks.append(module.proj.register_forward_hook(self._logits(name)))
                self.hooks.append(module.register_forward_hook(self._router(name, kind)))
            elif kind == "JetMoeTopKGating":
                self.hooks.append(module.register_forward_hook(self._two_routers(name)))
            elif kind.lower().endswith(
                (
                    "topkrouter",
                    "hashrouter",
                    "moev1gate",
                    "tokenchoicerouter",
                    "llama4router",
                    "dbrxrouter",
                    "zayarouter",
                    "dogecdmoe",
                )
            ):
                self.hooks.append(module.register_forward_hook(self._router(name.replace("router", ""), kind)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _entry(self, name: str) -> dict[str, torch.Tensor]:
        layer = next(part for part in name.split(".") if part.isdigit())
        return self.layers.setdefault(layer, {})

    def _logits(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self._entry(name)["logits"] = output.reshape(-1, output.shape[-1])

        return hook

    def _two_routers(self, name: str) -> Any:
        """Record routers of attention heads as of layer 2 i, and those of the MoE as of 2 i + 1."""
        layer = 2 * next(int(part) for part in name.split(".") if part.isdigit()) + (".mlp." in name)

        def hook(module: Any, inputs: Any, output: Any) -> None:
            chosen, index = output[4].topk(module.top_k, dim=-1)
            self._entry(str(layer)).update(logits=output[4], weight=torch.softmax(chosen, dim=-1), index=index)

        return hook

    def _before_experts(self, name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            self._entry(name).update(index=inputs[1], weight=inputs[2])

        return hook

    def _router(self, name: str, kind: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            entry = self._entry(name)
            match kind:
                case "DbrxRouter":
                    entry["logits"] = output
                case "Llama4Router":
                    scores, logits = output
                    index = logits.topk(module.top_k, dim=-1).indices
                    entry.update(logits=logits, weight=scores.gather(1, index), index=index)
                case "ZayaRouter":  # its own output has no index of the expert that is skipped
                    score = output[0].softmax(-1)
                    index = (score + module.balancing_biases).argmax(-1, keepdim=True)
                    entry.update(logits=output[0], weight=score.gather(1, index), index=index)
                case "DogeCDMoE":
                    logits = (output[1][0, :, :, None] + output[1][1, :, None]).flatten(1)
                    chosen, index = logits.topk(module.top_k, dim=-1)
                    entry.update(logits=logits, weight=chosen.softmax(-1), index=index)
                case "Gemma4TextRouter":
                    entry.update(weight=output[1], index=output[2])
                case _:
                    entry.update(logits=output[0], weight=output[1] * self._scale(kind), index=output[2])
            if kind == "PhimoeTopKRouter":
                self.gaps.append(sparse_mixer_gap(output[0], module.router_jitter_noise))

        return hook

    def _scale(self, kind: str) -> float:
        """Return the factor that the block, not its router, multiplies the weighted sum of experts by."""
        names = {
            "BeamTopKRouter": "routed_scaling_factor",
            "LagunaTopKRouter": "moe_routed_scaling_factor",
            "MiniMaxM3VLTopKRouter": "routed_scaling_factor",
            "Step3p7TopKRouter": "moe_router_scaling_factor",
        }
        return float(getattr(self.model.config.get_text_config(), names[kind])) if kind in names else 1.0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return layers [M], router logits before scoring [M, T, E], sorted experts, weights [M, T, K]."""
        if not self.layers:
            raise SystemExit("no router found in the model; expected one of the classes in Routings.__enter__")
        logits, index, weight = (
            torch.stack([entry[key].detach() for entry in self.layers.values()]).float().numpy()
            for key in ("logits", "index", "weight")
        )
        order = np.argsort(index, axis=-1, kind="stable")
        return {
            "moe_layers": np.array([int(layer) for layer in self.layers], np.int32),
            "router_logits": logits,
            "topk_idx": np.take_along_axis(index, order, axis=-1).astype(np.int32),
            "topk_weight": np.take_along_axis(weight, order, axis=-1),
        }

    def idle_experts(self) -> int:
        arrays = self.arrays()
        num_experts = arrays["router_logits"].shape[-1]
        return sum(num_experts - len(np.unique(index)) for index in arrays["topk_idx"])


def sparse_mixer_gap(logits: torch.Tensor, jitter: float) -> float:
    """Return the smallest distance of SparseMixer's choices and masks from a tie."""
    ordered, index = torch.sort(logits, dim=-1, descending=True)
    gap = min(float((ordered[:, place] - ordered[:, place + 1]).min()) for place in (0, 1))
    for place in (0, 1):
        left = logits.scatter(-1, index[:, :place], -torch.inf)
        threshold = ordered[:, place, None]
        distance = (threshold - left) / logits.abs().clamp(min=threshold) - 2 * jitter
        gap = min(gap, float(distance.abs().min()))
    return gap


def compact(description: dict[str, Any]) -> str:
    """Return JSON with one line per field, and per entry of a list of lists or of a mapping."""
    lines = []
    for key, value in description.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list) and value and isinstance(value[0], list):
            inner = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
