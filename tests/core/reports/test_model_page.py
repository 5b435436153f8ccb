"""The page, the header and the JSON of a model show the numbers of the cost model."""

import io
import json
from dataclasses import asdict

import pytest
from rich.console import Console

from moezoo.core.config.run_config import load_config, parse_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.cost.flops import flops_per_token
from moezoo.core.cost.memory import kv_cache_bytes_per_token, training_memory
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.reports.model_page import config_description, config_page, training_header
from moezoo.core.reports.text import bytes_text, count

CONFIG = """
model:
  vocab_size: null
  embed_dim: 20
  layers:
    - attention: {num_heads: 8, num_kv_heads: 2, head_dim: 6, qkv_bias: true, qk_norm: {}}
      feed_forward: {hidden_dim: 28}
    - repeat: 2
      attention: {num_heads: 8, num_kv_heads: 8, head_dim: 6, position: {kind: none}}
      moe:
        num_experts: 7
        router: {top_k: 2}
        experts: {hidden_dim: 12}
        shared: {num_experts: 2, hidden_dim: 9}
        dispatch: {kind: capacity, factor: 1.25}
        losses: [{kind: switch_balance, coefficient: 0.01}]
    - attention: {num_heads: 8, num_kv_heads: 8, head_dim: 6, position: {kind: none}}
      moe:
        num_experts: 7
        router: {top_k: 2}
        experts: {hidden_dim: 12}
        shared: {num_experts: 2, hidden_dim: 9}
        dispatch: {kind: capacity, factor: 1.25}
        losses: [{kind: switch_balance, coefficient: 0.01}]
data:
  sources: [{kind: dataset, name: fables}]
  tokenizer: {kind: TOKENIZER}
training: {steps: 10, batch_size: 6, sequence_length: 24, gradient_accumulation: 3}
optimizer: {learning_rate: 1.0e-3}
"""


def config(tokenizer="byte"):
    return parse_config(CONFIG.replace("TOKENIZER", tokenizer))


def rendered(renderable, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("number", "parameters", "flops", "size"),
    [
        (0, "0", "0 FLOPs", "0 B"),
        (999, "999", "999 FLOPs", "999 B"),
        (1000, "1.00 k", "1.00 kFLOPs", "1000 B"),
        (1234567, "1.23 M", "1.23 MFLOPs", "1.18 MiB"),
        (9996, "10.0 k", "10.0 kFLOPs", "9.76 KiB"),
        (99960, "100 k", "100 kFLOPs", "97.6 KiB"),
        (999_600, "1.00 M", "1.00 MFLOPs", "976 KiB"),
        (46_700_000_000, "46.7 B", "46.7 GFLOPs", "43.5 GiB"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(number, parameters, flops, size):
    assert (count(number), count(number, "FLOPs"), bytes_text(number)) == (parameters, flops, size)


def test_json_equals_the_cost_model():
    known = config_description(config()).to_json()
    spec = config().model.model_copy(update={"vocab_size": 256})
    counts = parameter_counts(spec)
    assert known["parameters"]["total"] == counts.total
    assert known["parameters"]["active"] == counts.active
    assert known["flops_per_token"]["training"]["total"] == flops_per_token(spec, 24, True).total
    assert known["kv_cache_bytes_per_token"] == kv_cache_bytes_per_token(spec)
    memory = training_memory(config().model_copy(update={"model": spec}))
    assert known["training_memory_bytes"] == {"total": memory.total, **asdict(memory)}
    assert known["training"]["tokens"] == 10 * 6 * 24
    assert known["training"]["flops"] == 10 * 6 * 24 * flops_per_token(spec, 24, True).total
    assert json.loads(json.dumps(known)) == known


def test_consecutive_equal_layers_are_one_run():
    layers = config_description(config()).to_json()["layers"]
    assert [(run["first"], run["last"]) for run in layers] == [(0, 0), (1, 3)]
    assert layers[0]["attention"] == "8 heads of 6, 2 key/value, RoPE 10,000, qk norm, qkv bias"
    assert layers[1]["attention"] == "8 heads of 6, no positions"
    assert layers[1]["feed_forward"].startswith("2 of 7 experts, SwiGLU 12; 2 shared, SwiGLU 9; softmax")
    assert "capacity 1.25" in layers[1]["feed_forward"]


@pytest.mark.parametrize(
    ("tokenizer", "size", "assumed"),
    [
        ("byte", 256, None),
        ("ids, vocab_size: 77", 77, None),
        ("character", 43, None),
        ("huggingface, path: some/tokenizer", 32_768, "a vocabulary of 32,768 tokens; some/tokenizer is not a"),
    ],
)
def test_null_vocabulary_follows_the_tokenizer_or_is_assumed(tokenizer, size, assumed):
    known = config_description(config(tokenizer))
    assert known.model.spec.vocab == size
    assert (known.assumed or "").startswith(assumed or "")
    assert (known.assumed is None) == (assumed is None)
    assert ("assumed:" in rendered(config_page(known, "x.yaml"))) == (assumed is not None)


def test_vocabulary_size_of_the_config_is_used():
    known = config_description(
        parse_config(CONFIG.replace("TOKENIZER", "character").replace("vocab_size: null", "vocab_size: 65"))
    )
    assert (known.model.spec.vocab, known.assumed) == (65, None)


def test_page_fits_100_columns_and_shows_totals():
    page = rendered(config_page(config_description(config()), "configs/tiny/x.yaml"))
    counts = parameter_counts(config().model.model_copy(update={"vocab_size": 256}))
    assert max(map(len, page.splitlines())) <= 100
    assert len(page.splitlines()) <= 50
    assert page.splitlines()[0].strip() == "configs/tiny/x.yaml"
    assert f"{count(counts.total)} parameters, {count(counts.active)} active per token" in page
    for words in ("1 to 3", "routed experts", "forward, per token", "training memory", "vocabulary 256"):
        assert words in page


def test_header_shows_facts_verbatim():
    sized = with_vocab_size(config(), 256)
    text = rendered(training_header(sized, {"device": "cpu (2 visible) [bold]", "experts": "blocks"}))
    assert "cpu (2 visible) [bold]" in text
    assert "144 tokens (6 x 24, in 3 micro-batches), 10 steps" in text
    assert "active per token" in text
    assert "FLOPs per token, forward and backward" in text
    assert "scanned" not in text
    scanned = sized.training.model_copy(update={"layers": "scanned"})
    assert "scanned: consecutive equal layers" in rendered(
        training_header(sized.model_copy(update={"training": scanned}), {})
    )


def test_the_page_of_a_design_says_what_it_can_be_exported_as():
    spec = load_config("configs/tiny/top_k.yaml")
    known = config_description(spec, exported=True)
    assert known.to_json()["exports"]["families"][0] == "mixtral"
    assert "export: as mixtral (or " in rendered(config_page(known, "x.yaml"))
    assert "export:" not in rendered(config_page(config_description(spec), "x.yaml"))


def test_the_page_of_a_design_says_what_stands_in_the_way_of_an_export():
    known = config_description(load_config("configs/tiny/p_norm.yaml"), exported=True)
    page = " ".join(rendered(config_page(known, "x.yaml")).split())
    assert "the nearest is mixtral, which has model.layers[0].moe.router.renormalize" in page
    assert known.to_json()["exports"]["nearest"] == {
        "family": "mixtral",
        "differences": [
            {"path": "model.layers[0].moe.router.renormalize", "here": "p_norm", "there": "sum"},
            {"path": "model.layers[0].moe.router.renormalize_order", "here": 2.0, "there": 1.0},
        ],
    }
