"""Hugging Face transformers on PyTorch as a contender: the same model as a Hugging Face family, random weights."""

from collections.abc import Callable
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
import transformers

from moezoo.bench.case import Case, Work, random_activations, random_prompts, random_windows
from moezoo.core.huggingface.export_as import family_for


class TransformersPeer:
    """transformers with one implementation of the experts (`eager`, `grouped_mm`), with or without torch.compile."""

    def __init__(self, experts: str, compiled: bool = False):
        self._experts, self._compiled = experts, compiled
        self._models: list[tuple[Case, Any]] = []

    def facts(self) -> dict[str, str]:
        options = f"experts {self._experts}" + (", torch.compile" if self._compiled else "")
        return {
            "transformers": f"{transformers.__version__}, PyTorch {torch.__version__}, {options}",
            "threads": str(torch.get_num_threads()),
        }

    def prepare(self, case: Case) -> Work:
        match case.kind:
            case "train":
                return self._train(case)
            case "forward" | "gradients":
                return self._moe_layer(case)
            case "decode":
                return self._decode(case)

    def _model(self, case: Case) -> Any:
        _, config = family_for(case.spec, max_length=1 << 16)
        kind = config.pop("model_type")
        made = transformers.AutoConfig.for_model(kind, **config, bos_token_id=None, eos_token_id=None)
        made.output_router_logits = any(layer.moe is not None and layer.moe.losses for layer in case.spec.layers)
        made.router_aux_loss_coef = 0.01
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(
            made, attn_implementation="sdpa", experts_implementation=self._experts
        )

    def _train(self, case: Case) -> Work:
        model, config = self._model(case).train(), case.adamw
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        batches = cycle([torch.from_numpy(windows).long() for windows in random_windows(case)])
        forward = torch.compile(model) if self._compiled else model

        def step() -> None:
            parts = next(batches)
            for window in parts:
                out = forward(input_ids=window[:, :-1], use_cache=False)
                logits = out.logits.reshape(-1, out.logits.shape[-1])
                loss = torch.nn.functional.cross_entropy(logits, window[:, 1:].reshape(-1))
                if out.get("router_logits") is not None:
                    loss = loss + 0.01 * self._balance(case, out.router_logits)
                (loss / len(parts)).backward()
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

        return _timed(step)

    @staticmethod
    def _balance(case: Case, router_logits: Any) -> Any:
        """Compute the family's load-balancing loss, pooled over layers."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        (moe, *_) = [layer.moe for layer in case.spec.all_layers if layer.moe is not None]
        return load_balancing_loss_func(router_logits, moe.num_experts, moe.router.top_k)

    def _moe_layer(self, case: Case) -> Work:
        model = self._model(case).train()
        layer = model.model.layers[case.spec.moe_layers[0]]
        (moe_block,) = [module for module in layer.modules() if hasattr(module, "experts")]
        parameters = list(moe_block.parameters())
        x = torch.from_numpy(random_activations(case, 3)).requires_grad_(case.kind == "gradients")
        gradient = torch.from_numpy(random_activations(case, 4))
        run = torch.compile(moe_block) if self._compiled else moe_block

        def output() -> Any:
            out = run(x)
            return out[0] if isinstance(out, tuple) else out

        def forward() -> None:
            with torch.no_grad():
                output()

        def gradients() -> None:
            torch.autograd.grad(output(), [x, *parameters], gradient)

        return _timed(forward if case.kind == "forward" else gradients)

    def _decode(self, case: Case) -> Work:
        model = next((model for other, model in self._models if other.spec == case.spec), None)
        if model is None:
            model = self._model(case).eval()
            self._models.append((case, model))
        prompts = torch.from_numpy(random_prompts(case)).long()

        def run(repeats: int) -> float:
            seconds = 0.0
            for _ in range(repeats):
                clock = _Clock()
                with torch.inference_mode():
                    model.generate(
                        prompts,
                        attention_mask=torch.ones_like(prompts),
                        max_new_tokens=case.new_tokens,
                        do_sample=False,
                        pad_token_id=0,
                        output_router_logits=False,
                        streamer=clock,
                    )
                stamps = clock.stamps[1:]  # the first call has the prompt
                seconds += (stamps[-1] - stamps[0]) / (len(stamps) - 1)
            return seconds

        return run


class _Clock:
    """Streamer that records the time of each token."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Any) -> None:
        self.stamps.append(perf_counter())

    def end(self) -> None:
        pass


def _timed(step: Callable[[], None]) -> Work:
    def run(repeats: int) -> float:
        begin = perf_counter()
        for _ in range(repeats):
            step()
        return perf_counter() - begin

    return run


def make_grouped() -> TransformersPeer:
    """Create the contender."""
    return TransformersPeer("grouped_mm")


def make_eager() -> TransformersPeer:
    """Create the contender."""
    return TransformersPeer("eager")


def make_compiled() -> TransformersPeer:
    """Create the contender."""
    return TransformersPeer("grouped_mm", compiled=True)
