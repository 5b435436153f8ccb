"""Time of each mixer and each kind of residual stream, beside attention of the same width, in float32.

    python -m tests.external.measure_layers --backend jax [PART ...] [--tokens 512 4096] [--rounds 5]

A model has two layers of width 256, which have the part and no feed-forward (those of residual streams have one of
width 16), and a vocabulary of 64. Parts take turns, so that each round compares them on the machine as it is. Prints a
Markdown table: microseconds per token and layer, forward / forward and backward; the latter as a share of attention's
in the same round; and milliseconds of a decoded token after a context of so many tokens. Numbers are medians over
rounds, and over 25 decoded tokens in each of two rounds.
"""

import argparse
import statistics
import sys
import time

import numpy as np

from moezoo.backends import load_backend
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.spec import ModelSpec

BASE = "attention"
HEADS = {"num_heads": 8, "head_dim": 32}
GROUPED = HEADS | {"num_kv_heads": 8}
DELTA = {"kind": "gated_delta", "num_key_heads": 4, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64}
COMPRESSED = {
    "kind": "compressed",
    **{"num_heads": 8, "head_dim": 32, "rope_head_dim": 16, "query_latent_dim": 128},
    **{"output_groups": 2, "output_latent_dim": 64, "window": 128},
}
INDEXER = {"num_heads": 4, "head_dim": 32, "top_k": 128, "layout": "interleaved", "rotated": "last"}
BLOCKS = {"num_heads": 2, "head_dim": 32, "top_k": 16, "block_size": 64}
LATENT = {
    "kind": "latent",
    **{"num_heads": 8, "head_dim": 32, "rope_head_dim": 16, "value_head_dim": 32},
    **{"latent_dim": 64, "query_latent_dim": 128},
}
MIXERS = {
    BASE: GROUPED,
    "mamba2": {"kind": "mamba2", "num_heads": 8, "head_dim": 64, "state_dim": 64},
    "mamba": {"kind": "mamba", "inner_dim": 512, "state_dim": 16, "step_rank": 16},
    "lightning": {"kind": "lightning", **HEADS},
    "gated_delta": DELTA,
    "gated_delta by channel": DELTA | {"decay": "channel", "decay_rank": 64, "gate": "sigmoid", "gate_rank": 64},
    "compressed 128": COMPRESSED | {"compression": {"ratio": 128}},
    "compressed 4, indexed": COMPRESSED
    | {"compression": {"ratio": 4, "overlap": True, "indexer": INDEXER | {"key_norm": {"kind": "rms"}}}},
    "convolutional": GROUPED | {"convolution": {"conv_width": 4, "mix_width": 4}},
    "block indexer": GROUPED | {"indexer": BLOCKS},
    "block indexer, by scores": GROUPED | {"indexer": BLOCKS | {"num_heads": 8, "pooled": "scores", "local_blocks": 1}},
    "latent": LATENT,
    "latent, indexed": LATENT | {"indexer": {"num_heads": 4, "head_dim": 32, "top_k": 1024}},
    "relative positions": GROUPED | {"position": {"kind": "none"}, "relative": {"dim": 8, "extent": 1024}},
}
RESIDUALS = {
    "hyper_connections": {"kind": "hyper_connections", "num_streams": 4, "sinkhorn_iterations": 20},
    "gated_streams": {"kind": "gated_streams", "num_streams": 4, "rank": 32},
    "block_attention": {"kind": "block_attention", "layers_per_block": 2},
}
NGRAMS = {"largest": 3, "heads": 4, "dim": 64, "table_size": 4099, "conv_width": 4}
PARTS = (*MIXERS, *RESIDUALS, "ngram_embeddings")


def spec_of(part: str) -> ModelSpec:
    """A model of two layers that have the part."""
    layer = {"attention": MIXERS.get(part, GROUPED), "mixer_only": True}
    model = {"embed_dim": 256, "vocab_size": 64}
    if part in RESIDUALS:
        model["residual"] = RESIDUALS[part]
        layer |= {"mixer_only": False, "feed_forward": {"hidden_dim": 16}}  # one kind needs two blocks in a layer
    layers = [dict(layer) for _ in range(2)]
    if part == "ngram_embeddings":
        for index, own in enumerate(layers):
            own["ngram_embeddings"] = NGRAMS | {"index": index}
    return ModelSpec.model_validate(model | {"layers": layers})


class Measured:
    """One part's model, and its times."""

    def __init__(self, backend: str, part: str, tokens: list[int]):
        spec = spec_of(part)
        self.model = load_backend(backend).build(spec, initial_weights(spec, 0))
        self.forward, self.both = ({length: [] for length in tokens} for _ in range(2))
        self.decoded = {length: [] for length in tokens}
        draw = np.random.default_rng(0)
        self._batches = {length: draw.integers(0, 64, (2, 1, length), np.int32) for length in tokens}
        self._warm = set()

    def measure(self, length: int) -> None:
        """Add a round at this length; the first call of a program is not counted."""
        tokens, targets = self._batches[length]
        if length not in self._warm:
            self._warm.add(length)
            self.model.score(tokens, targets)
            self.model.loss_and_gradients(tokens, targets)
        self.forward[length].append(seconds(lambda: self.model.score(tokens, targets)))
        self.both[length].append(seconds(lambda: self.model.loss_and_gradients(tokens, targets)))

    def decode(self, length: int) -> None:
        """Add 25 tokens after a context of this length."""
        _, cache = self.model.prefill(self._batches[length][0], length + 64)
        token = np.zeros(1, np.int32)
        for step in range(27):
            before = time.perf_counter()
            _, cache = self.model.decode(token, cache)
            if step >= 2:
                self.decoded[length].append(time.perf_counter() - before)


def seconds(call) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--backend", required=True, choices=("jax", "mlx"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.parts) - set(PARTS)):
        parser.error(f"unknown parts: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    parts = dict.fromkeys([BASE, *(chosen.parts or PARTS)])
    found = {}
    for part in parts:
        found[part] = Measured(chosen.backend, part, chosen.tokens)
    for length in chosen.tokens:
        for turn in range(chosen.rounds):
            for part, one in found.items():
                before = time.perf_counter()
                one.measure(length)
                if turn < 2:
                    one.decode(length)
                spent = time.perf_counter() - before
                print(f"{length} tokens, round {turn + 1} of {chosen.rounds}: {part}, {spent:.1f} s", file=sys.stderr)
    print("| backend | T | part | forward / with backward, us | of attention's | decoding, ms |")
    print("|---|---|---|---|---|---|")
    for length in chosen.tokens:
        for part, one in found.items():
            per_token = [1e6 * statistics.median(times[length]) / length / 2 for times in (one.forward, one.both)]
            share = statistics.median(np.divide(one.both[length], found[BASE].both[length]))
            decoded = 1e3 * statistics.median(one.decoded[length])
            row = f"{per_token[0]:.0f} / {per_token[1]:.0f} | {share:.2g} | {decoded:.2f}"
            print(f"| {chosen.backend} | {length:,} | {part} | {row} |")


if __name__ == "__main__":
    main()
