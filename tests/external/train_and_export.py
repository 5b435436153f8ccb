"""Train each family for ten steps and export it, for `check_export.py` to check with transformers and mlx-lm.

    python tests/external/train_and_export.py OUT [CASE ...] [--backend jax|mlx] [--spelling hub|saved|designed]
    python tests/external/check_export.py OUT/*

The first one runs in moezoo's environment, the second in one with torch and mlx-lm. A case is a fixture of
tests/data/huggingface; by default one of every family. config.json has the format of the hub, or with `--spelling
saved` that of transformers 5, beside which the export has mlx-lm's. With `--spelling designed` only the fixture's spec
counts, as if the model were designed here: it starts from random weights and is written as the first family that
computes it. Else training starts from the fixture's weights, on
random tokens, and changes every trainable parameter (AdamW, learning rate 1e-3), including the selection bias. Each
exported folder also contains `expected.npz`: tokens, and moezoo's logits and greedy tokens for that folder.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import moezoo  # noqa: E402
from moezoo.cli.main import main as command  # noqa: E402
from moezoo.core.generation.loop import generate  # noqa: E402
from moezoo.core.huggingface.family import family_of  # noqa: E402
from moezoo.core.huggingface.fields import Fields  # noqa: E402
from moezoo.core.reference.sampling import SamplingOptions  # noqa: E402
from tests.huggingface.test_families import main_cases  # noqa: E402
from tests.support.fixtures import read_fixture, text_config, write_checkpoint  # noqa: E402

STEPS, BATCH, LENGTH = 10, 4, 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--spelling", choices=["hub", "saved", "designed"], default="hub")
    options = parser.parse_args()
    for case in options.case or main_cases():
        print(f"{case} ...", flush=True)
        train_and_export(case, options.out / case, options.backend, options.spelling)
    return 0


def train_and_export(case: str, out: Path, backend: str, spelling: Literal["hub", "saved", "designed"]) -> None:
    """Write the trained checkpoint of one case, and moezoo's outputs for it."""
    described = read_fixture(case).description["config"]
    text = text_config(described)
    vocab = int(text.get("unpadded_vocab_size", text["vocab_size"]))  # ids that have logits
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / case
        np.save(folder.parent / "batches.npy", random.integers(0, vocab, (STEPS, BATCH, LENGTH), np.int32))
        if spelling == "designed":
            fields = Fields(described, case, read_fixture(case).description.get("max_length"))
            start = {"model": family_of(fields).spec_of(fields).model_dump(mode="json")}
        else:
            start = {"init_from": str(write_checkpoint(case, folder, spelling=spelling))}
        data = {"sources": [{"kind": "batches", "path": str(folder.parent / "batches.npy")}]}
        config = {
            **start,
            "data": data | ({"tokenizer": {"kind": "ids", "vocab_size": vocab}} if spelling == "designed" else {}),
            "training": {"steps": STEPS, "batch_size": BATCH, "sequence_length": LENGTH},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "constant"}},
        }
        (folder.parent / "config.yaml").write_text(yaml.safe_dump(config))
        words = ["train", str(folder.parent / "config.yaml"), "--backend", backend, "--out", f"{scratch}/run"]
        result = CliRunner().invoke(command, words, catch_exceptions=False)
        if result.exit_code:
            raise SystemExit(f"{case}: {result.output}")
        model = moezoo.load(f"{scratch}/run", backend=backend)
        for note in model.save(out, format="huggingface"):
            print(f"  {note}")
        model = moezoo.load(out, backend=backend)  # reload: 16-bit files have rounded the trained weights
        # No token twice: equal tokens have equal biases in Doge's first layer, and a top-k of ties has any order.
        ids = np.stack([random.permutation(vocab)[:LENGTH].astype(np.int32) for _ in range(2)])
        options = SamplingOptions(
            temperature=0.0
        )  # beyond a token that ends a text, as the other implementations go on
        logits, greedy = model.forward(ids).logits, generate(model.model, ids, max_new_tokens=12, options=options)
        np.savez(out / "expected.npz", input_ids=ids, logits=logits, greedy=greedy)


if __name__ == "__main__":
    sys.exit(main())
