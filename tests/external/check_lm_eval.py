"""Evaluate one exported checkpoint by lm-eval's `hf` model and by `moezoo` on both backends, and compare every sample.

    python -m tests.external.check_lm_eval [--keep FOLDER]

A tiny model is trained for a few steps and exported. The tasks are made here: multiple choice (answers of one token and
of several), perplexity of texts longer than the context, and generation with stop strings; each as it is, with examples
and with the chat template, in batches of 1 and of 5. Log-likelihoods of samples have to be equal to 1e-5 of their size
and the scores to 1e-6, greedy flags and texts exactly. Needs `moezoo[jax,mlx,hf,eval]` and `lm-eval[hf]`; no network.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import moezoo
from tests.huggingface.tiny_tokenizer import SENTENCES, write_tokenizer
from tests.support.fixtures import write_checkpoint

NOUNS, VERBS = ("cat", "dog", "owl", "mat"), ("sat on", "ran to", "saw")
CONTEXT = 48  # tokens
SCORE, SAMPLE = 1e-6, 1e-5

TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": [" the o", "mat"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def documents() -> Iterator[dict[str, Any]]:
    """Yield documents that serve all tasks."""
    for number, noun in enumerate(NOUNS):
        for verb in VERBS:
            choices = [" the cat", " the dog ran to the owl", " the", " a owl"]
            text = " and ".join(f"the {noun} {verb} the {other}" for other in NOUNS * (1 + 2 * number))
            question = f"{'and ' * (40 * number)}the {noun} {verb}"
            yield {"question": question, "choices": choices, "answer": number % 4, "text": text}


def write_tasks(folder: Path) -> None:
    """Write the tasks and their documents."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents()))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        whole = {"task": name, **source, "fewshot_split": "test", **task, "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def exported(folder: Path) -> Path:
    """Return the folder of a checkpoint that moezoo has trained a little and exported."""
    start = write_tokenizer(write_checkpoint("mixtral", folder / "start"))
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    (folder / "text.txt").write_text("\n".join(SENTENCES * 40))
    run = moezoo.train(
        {
            "init_from": str(start),
            "data": {"sources": [{"kind": "text", "path": str(folder / "text.txt")}]},
            "training": {"steps": 30, "batch_size": 4, "sequence_length": 32},
            "optimizer": {"kind": "adamw", "learning_rate": 3e-3, "schedule": {"kind": "constant"}},
        },
        backend="mlx",
        out=folder / "run",
        progress=False,
    )
    run.load("mlx").save(folder / "exported", "huggingface")
    return folder / "exported"


def evaluated(folder: Path, name: str, model: str, arguments: str, *words: str) -> tuple[dict[str, Any], list[Any]]:
    """Run lm-eval; return its scores by task and metric, and the responses of all samples by task and document."""
    out = folder / "results" / name
    command = [sys.executable, "-m", "moezoo.evaluation_harness", "--model", model, "--model_args", arguments]
    command += ["--tasks", *TASKS, "--include_path", str(folder / "tasks"), "--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment = os.environ | offline
    made = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    if made.returncode != 0:
        raise SystemExit(made.stdout + made.stderr)
    (results,) = out.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    samples = []
    for task in TASKS:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples += [(task, row["doc_id"], row["resps"]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    return scores, samples


def numbers(value: Any) -> Iterator[float | str]:
    """Yield the numbers and texts inside lists; lm-eval writes numbers of responses as texts."""
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    else:
        try:
            yield float(value)
        except ValueError:
            yield str(value)


def differences(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> tuple[float, float, int]:
    """Return the largest relative difference of a score and of a log-likelihood, and the number of other texts."""
    score = max(
        abs(value - theirs[0][task][metric]) / max(1.0, abs(value))
        for task, metrics in ours[0].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and not math.isnan(value)
    )
    sample, other = 0.0, 0
    for (*key, own), (*their_key, their) in zip(ours[1], theirs[1], strict=True):
        assert key == their_key
        for a, b in zip(numbers(own), numbers(their), strict=True):
            if isinstance(a, str) or isinstance(b, str):
                other += a != b
            else:
                sample = max(sample, abs(a - b) / max(1.0, abs(a)))
    return score, sample, other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="new folder for checkpoint and results; else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        (folder / "tasks").mkdir(parents=True)
        write_tasks(folder / "tasks")
        checkpoint = exported(folder)
        ways = {
            "as it is": ("--batch_size", "1"),
            "2 examples, batches of 5": ("--num_fewshot", "2", "--batch_size", "5"),
            "chat template, 1 example": ("--apply_chat_template", "--num_fewshot", "1", "--batch_size", "5"),
        }
        print("| | scores differ by | log-likelihoods | texts and flags |\n|---|---|---|---|")
        wrong = 0
        for number, (way, words) in enumerate(ways.items()):
            # Trap: with its logits_cache, lm-eval scores windows of equal inputs and unequal lengths at wrong places.
            told = f"pretrained={checkpoint},dtype=float32,logits_cache=False"
            theirs = evaluated(folder, f"hf{number}", "hf", told, "--device", "cpu", *words)
            found = {}
            for backend in ("jax", "mlx"):
                told = f"pretrained={checkpoint},backend={backend}"
                found[backend] = evaluated(folder, f"{backend}{number}", "moezoo", told, *words)
            pairs = {"jax, hf": (found["jax"], theirs), "mlx, hf": (found["mlx"], theirs)}
            for pair, (one, other) in {**pairs, "jax, mlx": (found["jax"], found["mlx"])}.items():
                score, sample, texts = differences(one, other)
                wrong += score > SCORE or sample > SAMPLE or texts > 0
                print(f"| {way}: {pair} | {score:.1e} | {sample:.1e} | {texts} of {len(one[1])} differ |", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
