"""Doge's mixture with the keys of each token its own, for tests/external; `main` shows what that changes.

    python tests/external/doge_by_token.py FOLDER ...      # checkpoints of Doge, such as exports

transformers' class splits the router's outputs of all tokens at once, so that a token is scored by outputs of others,
also of later ones and of other sequences. With one token there is nothing to mix: decoding token by token, one sequence
at a time, is what a checkpoint means. `corrected` splits them for each token, and must give the same logits.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


class KeysOfEachToken(torch.nn.Linear):
    """The router's matrix, with outputs [2, P, n] of tokens [B, T, D]: what the class makes of them by a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = super().forward(x)
        return keys.reshape(-1, 2, keys.shape[-1] // 2).transpose(0, 1).contiguous()


def corrected(model: torch.nn.Module) -> torch.nn.Module:
    """Return the same model, in which every router of Doge has the keys of each token; other models as they are."""
    for name, module in model.named_modules():
        if name.endswith("router_gate"):
            module.__class__ = KeysOfEachToken
    return model


def by_token(model: torch.nn.Module, tokens: torch.Tensor, steps: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [B, T, V] and the next `steps` greedy tokens, token by token with the cache, row by row."""
    all_logits, all_greedy = [], []
    with torch.no_grad():
        for row in tokens:
            cache, logits, given = None, [], row.tolist()
            while len(logits) < len(row) + steps - 1 or len(logits) < len(row):
                token = torch.tensor([[given[len(logits)]]])
                output = model(token, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits[0, 0])
                if len(logits) == len(given):
                    given.append(int(logits[-1].argmax()))
            all_logits.append(torch.stack(logits[: len(row)]))
            all_greedy.append(torch.tensor(given[len(row) : len(row) + steps]))
    return torch.stack(all_logits), torch.stack(all_greedy)


def differences(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[float, float]:
    """Return how far logits of the corrected class, and of transformers' own, are from those of `by_token`, at most."""
    expected, _ = by_token(model, tokens)
    with torch.no_grad():
        own = model(tokens, use_cache=False).logits
        right = corrected(model)(tokens, use_cache=False).logits
    return float((right - expected).abs().max()), float((own - expected).abs().max())


def opened(folder: Path, **options: Any) -> torch.nn.Module:
    """Return the checkpoint in float32, as transformers has it."""
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+")
    for folder in parser.parse_args().folder:
        model = opened(folder)
        # No token twice: in the first layer equal tokens have equal biases, and a top-k of ties has any order.
        generator = torch.Generator().manual_seed(0)
        tokens = torch.stack([torch.randperm(model.config.vocab_size, generator=generator)[:24] for _ in range(2)])
        right, own = differences(model, tokens)
        print(f"{folder.name}: token by token, corrected class {right:.1e}, transformers' own forward {own:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
