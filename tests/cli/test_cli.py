"""The command line: frozen options, fast help, and one-line errors for wrong input."""

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import moezoo
from moezoo.cli.main import main
from moezoo.core.parameters import parameter_table
from moezoo.core.traces.summary import summarize
from moezoo.core.traces.trace_file import open_trace, save_trace
from tests.support.backends_available import require_backend
from tests.support.small_run import write_config
from tests.support.traces import synthetic_trace

SURFACE = {
    "train": [
        *("CONFIG", "--backend", "--out", "--set", "--mesh", "--resume", "--replay"),
        *("--allow-overcommit", "--allow-changed-data", "--coordinator"),
        *("--num-processes", "--process-id", "--startup-timeout", "--heartbeat-timeout", "--shutdown-timeout"),
    ],
    "launch": ["--nproc", "COMMAND..."],
    "init": ["NAME", "--from"],
    "generate": [
        "PATH",
        *("--prompt", "--prompts", "--chat", "--system", "--set-template"),
        "--tokens",
        "--adapter",
        "--backend",
        "--allow-overcommit",
        "--compute",
        "--max-length",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--seed",
        *("--samples", "--stop", "--json"),
    ],
    "chat": [
        *("PATH", "--system", "--set-template", "--stop", "--adapter", "--backend", "--allow-overcommit", "--compute"),
        *("--max-length", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p"),
        *("--repetition-penalty", "--seed"),
    ],
    "serve": [
        *("PATH", "--host", "--port", "--name", "--max-tokens", "--adapter", "--backend", "--allow-overcommit"),
        *("--compute", "--max-length"),
    ],
    "eval": [
        *("PATH", "--data", "--sequence-length", "--batch-size", "--windows", "--without", "--mode", "--importance"),
        *("--top-k", "--replay", "--adapter", "--backend", "--allow-overcommit", "--json"),
    ],
    "plot": ["RUN...", "--out", "--json"],
    "runs": ["FOLDER", "--json"],
    "describe": ["PATH", "--set", "--mesh", "--devices", "--memory", "--adapter", "--json"],
    "plan": [
        "CONFIG",
        "--set",
        "--mesh",
        "--devices",
        "--memory",
        "--accelerator",
        "--formula",
        "--topology",
        "--json",
    ],
    "compare": [
        *("A", "B", "--data", "--backend", "--compute", "--adapter", "--sequence-length", "--batch-size", "--windows"),
        *("--allow-overcommit", "--json"),
    ],
    "parity": ["PATH", "--replay", "--adapter", "--json", "--all"],
    "convert": [
        *("PATH", "OUT", "--whole", "--quantize", "--mode", "--group-size", "--router", "--recipe", "--dequantize"),
        *("--layout", "--adapter", "--merge", "--push", "--public", "--json"),
    ],
    "zoo": ["CONFIGS", "--json", "--list", "--out"],
    "schema": [],
    "bench": [
        "train|layer|decode|startup|experts",
        "--backend",
        "--config",
        "--peers",
        "--quantize",
        "--slices",
        "--slice-seconds",
        "--smoke",
        "--out",
        "--json",
    ],
    "data": ["NAME", "--file"],
    "preview": ["CONFIG", "--set", "--examples"],
    "analyze": [
        *("TRACE...", "--max-tokens", "--cache", "--policy", "--shared", "--model", "--expert-bytes", "--bandwidth"),
        *("--json", "--csv", "--pictures"),
    ],
    "trace": [
        *("PATH", "--out", "--data", "--training-data", "--max-tokens", "--generate", "--inference"),
        *("--sequence-length", "--batch-size", "--adapter", "--backend", "--allow-overcommit", "--json"),
        *("--from", "--to", "--model", "--layers", "--experts", "--top-k"),
    ],
    "explore": ["TRACE [TRACE2", "--out", "--tokens", "--demo"],
    "doctor": ["PATH", "--quick", "--forward", "--backend", "--json"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of two steps, in the same folder as its config."""
    require_backend("mlx")
    config = write_config(folder, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEZOO_CACHE", str(folder / "cache"))
        result = CliRunner().invoke(main, ["train", str(config), "--backend", "mlx", "--out", str(folder / "run")])
    assert result.exit_code == 0, result.output
    return folder / "run"


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def assert_error(result: Result, kind: str, *pieces: str) -> None:
    """Assert a one-line error, exit status 1, and no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith(f"{kind}: "), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for piece in pieces:
        assert piece in result.stderr, result.stderr


def test_surface_is_frozen() -> None:
    found = {}
    for name, command in main.commands.items():
        found[name] = [
            parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(click.Context(command))
            for parameter in command.params
        ]
    assert {name: [word.strip("[]") for word in words] for name, words in found.items()} == SURFACE


def test_every_command_has_a_summary_that_fits_and_every_option_a_help_text() -> None:
    for name, command in main.commands.items():
        summary = str(command.help).splitlines()[0]
        assert len(summary) <= 75, name
        for option in command.params:
            if isinstance(option, click.Option):
                text = str(option.help)
                assert text[:1].isupper(), (name, option.name, text)
                assert text.endswith("."), (name, option.name, text)


def test_help_cuts_no_summary_in_a_narrow_terminal() -> None:
    for width in (40, 60, 80, 200):
        shown = "".join(CliRunner().invoke(main, ["--help"], terminal_width=width).output.split())
        for command in main.commands.values():
            assert "".join(str(command.help).splitlines()[0].split()) in shown


def test_help_is_fast_and_loads_no_framework() -> None:
    code = (
        "import resource, sys\n"
        "from click.testing import CliRunner\n"
        "import moezoo; from moezoo.cli.main import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "assert not {'jax', 'mlx', 'mlx.core', 'flax', 'transformers', 'torch'} & set(sys.modules)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF); print(usage.ru_utime + usage.ru_stime)"
    )
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3)]
    assert min(seconds) < 0.3, seconds


def test_public_api_is_small() -> None:
    classes = ["Config", "LoadedModel", "ModelSpec", "MoezooError", "Run"]
    functions = ["compare", "explore", "load", "load_config", "parameter_table", "parity", "train"]
    assert moezoo.__all__ == [*classes, *functions]
    for name in moezoo.__all__:
        assert getattr(moezoo, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = moezoo.nothing


def test_train_writes_a_complete_run_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml",
        "data.json",
        "manifest.json",
        "tokenizer.json",
        "metrics.jsonl",
        "picture.png",
        "sessions.jsonl",
        "checkpoints",
    }
    assert (trained / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_records_how_it_was_trained(trained: Path) -> None:
    started, ended = map(json.loads, (trained / "sessions.jsonl").read_text().splitlines())
    assert started["command"].startswith("moezoo")
    assert set(started["versions"]) == {"moezoo", "Python", "numpy", "mlx"}
    assert started["versions"]["numpy"] == np.__version__
    assert {"commit", "folder", "host", "platform", "cores", "processes", "first_step"} <= set(started)
    assert "MLX" in started["facts"]["device"]
    assert [len(source["digest"]) for source in started["data"]] == [64]
    assert (ended["last_step"], ended["error"]) == (2, None)
    assert datetime.fromisoformat(ended["ended"]) >= datetime.fromisoformat(started["started"])


def test_launch_passes_the_backend_of_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, tuple[str, ...], str]] = []
    monkeypatch.setattr("moezoo.core.distributed.launch.launch", lambda *words: started.append(words))
    monkeypatch.setenv("BACKEND", "mlx")
    for words in (["--backend", "jax"], ["--backend=jax"], ["--set", "a=b"]):
        assert call("launch", "--nproc", 3, "train", "c.yaml", *words).exit_code == 0
        assert started[-1][:2] == (3, ("train", "c.yaml", *words))
    assert [backend for _, _, backend in started] == ["jax", "jax", "mlx"]
    assert_error(call("launch", "--nproc", 2, "eval", "run"), "RunError", "launch runs `train`", "got 'eval'")


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_greedy_text_is_the_same_on_both_backends(trained: Path, backend: str) -> None:
    require_backend(backend)
    words = ["generate", trained, "--prompt", "7 owls", "--temperature", 0, "--max-new-tokens", 20]
    result = call(*words, "--backend", backend)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("7 owls")
    assert len(result.stdout.strip("\n")) <= 26
    assert result.stdout == call(*words, "--backend", "mlx").stdout


def test_batched_prompts_of_unequal_length_match_single_prompts(trained: Path) -> None:
    words = ["generate", trained, "--temperature", 0, "--max-new-tokens", 8, "--backend", "mlx"]
    together = call(*words, "--prompt", "7", "--prompt", "7 owls").output
    texts = [part.split("\n", 1)[1].rstrip("\n") for part in together.split("--- sample ")[1:]]
    assert texts == [call(*words, "--prompt", prompt).output.rstrip("\n") for prompt in ("7", "7 owls")]


def test_samples_differ_and_the_seed_is_reproducible(trained: Path) -> None:
    words = ["generate", trained, "--prompt", "7", "--samples", 3, "--max-new-tokens", 30, "--backend", "mlx", "--seed"]
    first = call(*words, 1).stdout
    assert first == call(*words, 1).stdout
    assert first != call(*words, 2).stdout
    samples = first.split("--- sample ")[1:]
    assert len({sample[2:] for sample in samples}) == 3


def test_eval_json(trained: Path) -> None:
    result = call("eval", trained, "--backend", "mlx", "--json")
    values = json.loads(result.stdout)
    assert values["step"] == 2
    assert values["bits_per_byte"] == pytest.approx(values["validation_loss"] / 0.6931472, rel=1e-6)
    assert len(values["routing"]) == 2
    checkpoint = call("eval", trained / "checkpoints" / "step_00000002", "--backend", "mlx", "--json")
    assert json.loads(checkpoint.stdout) | {"path": str(trained)} == values


def test_eval_without_experts(trained: Path) -> None:
    words = ["eval", trained, "--backend", "mlx", "--windows", 3]
    whole = json.loads(call(*words, "--json").stdout)
    name = "layers[1].experts[2-3]"
    values = json.loads(call(*words, "--without", name, "--mode", "reroute", "--json").stdout)
    change = values["without"]
    assert (change["experts"], change["mode"]) == (name, "reroute")
    assert change["loss"] == pytest.approx(whole["validation_loss"], rel=1e-6)
    assert change["loss"] + change["change"] == pytest.approx(values["validation_loss"], rel=1e-6)
    assert values["routing"][1]["load"][2:4] == [0, 0]
    assert "without layers[1].experts[0], silenced: " in call(*words, "--without", "layers[1].experts[0]").stdout
    ranked = json.loads(call(*words, "--importance", "--without", name, "--json").stdout)
    assert ranked["validation_loss"] == whole["validation_loss"]
    assert sorted((row["layer"], row["expert"]) for row in ranked["importance"]["experts"]) == [(1, 2), (1, 3)]
    assert "layer  expert  change ± standard error" in call(*words, "--importance").stdout
    assert_error(call(*words, "--without", "layers[1].experts[5]"), "SpecError", "layer 1 has no expert 5", "0-4")
    assert_error(call(*words, "--mode", "silence"), "DataError", "--mode silence has no experts")


def test_eval_of_nan_is_one_line(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = SimpleNamespace(validation_loss=math.nan)
    monkeypatch.setattr("moezoo.core.training.evaluation.evaluate", lambda *words, **options: losses)
    result = call("eval", trained, "--backend", "mlx", "--windows", 1)
    assert_error(result, "DataError", "the loss on the data of the run is nan", "computes NaN", "moezoo doctor")


def test_eval_with_other_experts_per_token(trained: Path) -> None:
    words = ["eval", trained, "--backend", "mlx", "--windows", 3]
    result = call(*words, "--top-k", 1)
    assert result.stdout.startswith("step 2, top_k 1: ")
    assert call(*words, "--top-k", 2).stdout.partition(": ")[2] == call(*words).stdout.partition(": ")[2]
    assert_error(call(*words, "--top-k", 6), "SpecError", "router.top_k is 6, but num_experts is 5")


def test_eval_of_a_file_does_not_need_the_run_data(trained: Path, folder: Path) -> None:
    (folder / "other.txt").write_text("12 owls saw 144 mice. " * 4)
    words = ["eval", trained, "--data", folder / "other.txt", "--backend", "mlx"]
    values = json.loads(call(*words, "--json").stdout)
    assert values["data"] == str(folder / "other.txt")
    assert (values["windows"], values["sequence_length"]) == (4, 24)
    assert json.loads(call(*words, "--sequence-length", 10, "--json").stdout)["windows"] == 9
    (folder / "short.txt").write_text("12 owls")
    assert "(1 window of 6 tokens)" in call("eval", trained, "--data", folder / "short.txt", "--backend", "mlx").stdout


def test_trace_has_the_losses_of_eval_and_python_records_the_same(trained: Path, folder: Path) -> None:
    out = folder / "t.safetensors"
    assert "tokens, 2 MoE layers, loss" in call("trace", trained, "--backend", "mlx", "--out", out).stdout
    trace = open_trace(out)
    assert [len(value or "") for value in (trace.info.weights_sha256, trace.info.spec_sha256)] == [64, 64]
    evaluated = json.loads(call("eval", trained, "--backend", "mlx", "--json").stdout)
    assert summarize(trace).loss == pytest.approx(evaluated["validation_loss"], rel=1e-12)
    replayed = json.loads(call("eval", trained, "--backend", "mlx", "--json", "--replay", out).stdout)
    assert replayed["validation_loss"] == pytest.approx(evaluated["validation_loss"], rel=1e-6)
    (folder / "owls.txt").write_text("12 owls saw 144 mice. " * 4)
    data, more = f"owls={folder / 'owls.txt'}", ("--max-tokens", 50, "--generate", 2, "--json")
    values = json.loads(call("trace", trained, "--backend", "mlx", "--data", data, "--out", out, *more).stdout)
    assert (values["tokens"], values["generated"]) == (52, 2)
    again = moezoo.load(trained, "mlx").trace({"owls": folder / "owls.txt"}, max_tokens=50, generate=2)
    assert again.info == open_trace(out).info
    np.testing.assert_array_equal(again.rows().expert, open_trace(out).rows().expert)
    training = ("--training-data", "--max-tokens", 500, "--out", out)
    assert call("trace", trained, "--backend", "mlx", *training).exit_code == 0
    options = ("--set", "training.steps=1", "--set", "training.final_validation_sequences=3")
    command = ("train", folder / "small.yaml", "--backend", "mlx", *options)
    assert call(*command, "--replay", out, "--out", folder / "replayed").exit_code == 0
    assert_error(call("trace", folder, "--out", out), "DataError", "is not a run folder, so it has no data")
    assert_error(call("trace", trained, "--out", out, "--data", data, "--data", data), "DataError", "one name twice")


def test_analyze_measures_traces_and_simulates_caches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    paths = [folder / "early.safetensors", folder / "late.safetensors"]
    for path in paths:
        save_trace(path, synthetic_trace(num_tokens=300, layers=(1, 2), num_experts=14, vocab=20))
    cache = ["--cache", "0.000016MiB", "--expert-bytes", "0.000001MiB", "--bandwidth", "7GB/s"]
    out = ["--csv", folder / "tables", "--pictures", folder / "pictures"]
    result = call("analyze", *paths, *cache, *out)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for title in (
        "All traces",
        "Load",
        "Domains",
        "Vocabulary",
        "Co-activation",
        "Predictability",
        "Distinct",
        "Cache",
    ):
        assert f"\n{title}" in result.stdout, title
    assert len(list((folder / "tables").iterdir())) == 8
    assert {path.stem for path in (folder / "pictures").iterdir()} == {
        *("load", "domains", "coactivation", "saturation", "cache")
    }
    values = json.loads(call("analyze", paths[0], "--max-tokens", 100, *cache, "--policy", "best", "--json").stdout)
    assert [each["tokens"] for each in values["traces"]] == [100]
    assert [each["policy"] for each in values["cache"]] == ["best"]
    assert_error(call("analyze", paths[0], "--cache", "8GiB"), "DataError", "does not name its model", "--expert-bytes")
    assert_error(call("analyze", paths[0], "--policy", "lruu"), "SpecError", "'lruu'", "did you mean lru?")
    assert_error(call("analyze", paths[0], "--bandwidth", "7GB"), "SpecError", "--bandwidth is '7GB'")


def test_the_size_of_cached_experts_is_that_of_the_model(trained: Path, folder: Path) -> None:
    out = folder / "own.safetensors"
    assert call("trace", trained, "--backend", "mlx", "--max-tokens", 50, "--out", out).exit_code == 0
    cached = json.loads(call("analyze", out, "--cache", "1MiB", "--json").stdout)["cache"][0]
    experts = [
        row for row in parameter_table(moezoo.load_config(trained / "config.yaml").model) if ".experts." in row.name
    ]
    assert cached["loaded_bytes"] == 4 * sum(row.size for row in experts)  # the first use of each


def test_plot_draws_a_run_and_says_how_it_ended(trained: Path, folder: Path) -> None:
    result = call("plot", trained, "--out", folder / "plot.png", "--json")
    assert json.loads(result.stdout)["runs"][0]["step"] == 2
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert_error(call("plot", trained, "--out", "plot.svg"), "RunError", "got 'plot.svg'", "ends in .png")


def test_describe_and_schema(trained: Path) -> None:
    assert "active" in call("describe", trained / "config.yaml").stdout
    assert json.loads(call("describe", trained / "config.yaml", "--json").stdout)
    schema = json.loads(call("schema").stdout)
    assert {"init_from", "model", "adapter", "data", "training", "optimizer", "mesh", "trackers"} == schema[
        "properties"
    ].keys()


def test_unknown_key_suggests_the_nearest_key(folder: Path) -> None:
    path = write_config(folder)
    path.write_text(path.read_text().replace("top_k", "topk"))
    result = call("describe", path)
    assert result.exit_code == 1
    assert "model.layers[0].moe.router.topk is not a known key; did you mean top_k?" in result.stderr


def test_invalid_sizes(folder: Path) -> None:
    path = write_config(folder)
    assert_error(
        call("describe", path, "--set", "model.layers[0].moe.router.top_k=9"),
        "SpecError",
        f"model.layers[0].moe.router.top_k is 9, but num_experts is 5 ({path}). Use top_k <= 5.",
    )
    assert_error(
        call("describe", path, "--set", "model.layers[0].attention.num_kv_heads=3"),
        "SpecError",
        "model.layers[0].attention.num_heads is 4, which is not divisible by num_kv_heads = 3",
    )
    assert_error(call("describe", path, "--set", "mesh.expert=0"), "SpecError", "mesh.expert is 0")
    assert_error(
        call("describe", path, "--set", "training.batch_size=two"), "SpecError", "training.batch_size is 'two'"
    )
    assert_error(call("describe", path, "--set", "nonsense"), "SpecError", "not of the form path=value")


def test_yaml_numbers_are_converted_by_the_field(folder: Path) -> None:
    path = write_config(folder)
    path.write_text(path.read_text().replace("0.003", "1e-4"))
    assert moezoo.load_config(path).optimizer.learning_rate == 1e-4
    path.write_text(path.read_text().replace("steps: 8", "steps: 8\n  steps: 9"))
    assert_error(call("describe", path), "SpecError", "duplicate key 'steps'")


def test_missing_files(folder: Path) -> None:
    path = write_config(folder)
    assert_error(call("train", folder / "no.yaml"), "SpecError", "no such config", "no.yaml")
    missing = f"data.sources[0].path={folder / 'no.txt'}"
    assert_error(call("train", path, "--out", folder / "a", "--set", missing), "DataError", "no.txt")
    assert_error(call("eval", folder / "no_run"), "DataError", "is not a run folder, so it has no data", "--data")
    assert_error(
        call("generate", folder / "no_run", "--prompt", "7"), "RunError", "no_run does not exist; expected a run folder"
    )
    assert not (folder / "a").exists()


def test_text_shorter_than_a_sequence_is_an_error(folder: Path) -> None:
    path = write_config(folder)
    (folder / "text.txt").write_text("too short")
    assert_error(call("train", path, "--out", folder / "b"), "DataError", "text.txt")
    assert not (folder / "b").exists()


def test_vocabulary_mismatch(folder: Path) -> None:
    path = write_config(folder)
    assert_error(
        call("train", path, "--out", folder / "c", "--set", "model.vocab_size=9"),
        "SpecError",
        "model.vocab_size is 9, but the tokenizer (character) has",
    )


def test_prompt_outside_the_vocabulary(trained: Path) -> None:
    assert_error(call("generate", trained, "--prompt", "schön", "--backend", "mlx"), "TokenizerError", "ö")
    assert_error(call("generate", trained, "--prompt", "", "--backend", "mlx"), "DataError", "--prompt is empty")


def test_generate_continues_token_ids(trained: Path) -> None:
    words = ["generate", trained, "--backend", "mlx", "--temperature", 0, "--max-new-tokens", 4]
    result = call(*words, "--tokens", "3, 1,2")
    assert result.exit_code == 0, result.output
    ids = [int(piece) for piece in result.stdout.split(",")]
    assert ids[:3] == [3, 1, 2]
    assert len(ids) == 7
    assert_error(call(*words, "--tokens", "3,x"), "DataError", "--tokens is '3,x'; expected token ids")
    outside = call(*words, "--tokens", "3,9999999999")
    assert_error(outside, "DataError", "token 9999999999")
    assert outside.stdout == ""
    assert_error(call(*words), "DataError", "expected --prompt TEXT")
    assert_error(call(*words, "--tokens", "1", "--prompt", "7"), "DataError", "expected --prompt TEXT")
    assert_error(call(*words, "--tokens", "1", "--chat"), "DataError", "expected --prompt TEXT")


def test_generate_reads_prompts_from_files_and_stdin(trained: Path, tmp_path: Path) -> None:
    words = ["generate", trained, "--backend", "mlx", "--temperature", 0, "--max-new-tokens", 8]
    (tmp_path / "prompts.txt").write_text("7 owls\n\n8\n")
    shown = call(*words, "--prompts", tmp_path / "prompts.txt").stdout
    assert [line for line in shown.splitlines() if line.startswith("---")] == [
        "--- sample 1: 7 owls",
        "--- sample 1: 8",
    ]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "7 owls"}\n{"prompt": "8"}\n')
    lines = call(*words, "--prompts", tmp_path / "prompts.jsonl", "--json", "--samples", 20).stdout.splitlines()
    samples = [json.loads(line) for line in lines]  # two batches
    assert [(each["prompt"], each["sample"]) for each in samples[19:21]] == [("7 owls", 19), ("8", 0)]
    assert f"--- sample 1: 7 owls\n7 owls{samples[0]['text']}\n--- sample 1: 8\n8{samples[20]['text']}\n" == shown
    assert (len(samples), len(samples[0]["tokens"]), samples[0]["ended_by"]) == (40, 8, "length")
    piped = CliRunner().invoke(main, [*map(str, words), "--prompt", "-"], input="7 owls\n").stdout
    assert piped == f"7 owls{samples[0]['text']}\n"
    lines = CliRunner().invoke(main, [*map(str, words), "--prompts", "-"], input="7 owls\n8\n").stdout
    assert lines == shown
    assert_error(call(*words, "--prompts", "-"), "DataError", "--prompts has none")
    assert_error(call(*words, "--prompts", tmp_path / "none.txt"), "DataError", "none.txt")
    assert_error(call(*words, "--prompt", "7", "--system", "x"), "DataError", "--system is for a chat")


def test_generate_stops_at_a_text(trained: Path) -> None:
    words = ["generate", trained, "--backend", "mlx", "--temperature", 0, "--max-new-tokens", 12, "--prompt", "7 owls"]
    whole = call(*words).stdout.removesuffix("\n").removeprefix("7 owls")
    stop = whole[3:6]
    kept = whole[: whole.index(stop)]
    assert call(*words, "--stop", "never", "--stop", stop).stdout == f"7 owls{kept}\n"
    sample = json.loads(call(*words, "--stop", stop, "--json").stdout)
    assert (sample["text"], sample["ended_by"], len(sample["tokens"])) == (kept, "stop", len(kept) + 3)
    model = moezoo.load(trained, "mlx")
    assert (
        model.generate(model.encode_prompt("7 owls")[None], max_new_tokens=12, stop=[stop])[0].tolist()
        == (sample["tokens"])
    )
    assert_error(call(*words, "--stop", ""), "SpecError", "a stop string is empty")


def test_chat_needs_a_template(trained: Path) -> None:
    words = ["generate", trained, "--backend", "mlx", "--chat", "--prompt", "7"]
    assert_error(call(*words), "TokenizerError", "no chat template; got a tokenizer of kind character")


def test_bad_sampling_options(trained: Path) -> None:
    assert_error(call("generate", trained, "--prompt", "7", "--temperature", -1), "SpecError", "temperature")
    assert_error(call("generate", trained, "--prompt", "7", "--top-p", 2), "SpecError", "top_p")


def test_unwritable_folder(folder: Path) -> None:
    path = write_config(folder)
    (folder / "file").write_text("")
    assert_error(call("train", path, "--backend", "mlx", "--out", folder / "file" / "run"), "RunError", "file/run")


def test_existing_run_without_resume(trained: Path, folder: Path) -> None:
    result = call("train", write_config(folder, steps=2), "--backend", "mlx", "--out", trained)
    assert_error(result, "RunError", "already contains a run", "--resume")


def test_unknown_and_missing_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(folder)
    assert_error(call("train", path, "--backend", "jaxx"), "BackendError", "did you mean jax?")
    monkeypatch.setitem(sys.modules, "mlx", None)
    assert_error(
        call("train", path, "--backend", "mlx", "--out", folder / "d"),
        "BackendError",
        "backend mlx needs mlx, not installed here. Run `pip install 'moezoo[mlx]'`",
        "--backend",
    )
    wanted = "comparing the backends needs mlx, not installed here. Run `pip install 'moezoo[mlx]'`."
    assert_error(call("parity", path), "BackendError", wanted)


def test_load_forward_generate_save(trained: Path, tmp_path: Path) -> None:
    import numpy as np

    require_backend("jax")
    model = moezoo.load(trained, backend="jax")
    tokens = model.tokenizer.encode("12 owls saw")[None, :]
    out = model.forward(tokens[:, :-1], targets=tokens[:, 1:])
    assert out.logits.shape == (1, 10, model.config.model.vocab)
    assert out.logits.dtype == np.float32
    assert [row.layer for row in out.routing] == [0, 1]
    assert all(row.expert.shape == (1, 10, 2) and row.expert.dtype == np.int32 for row in out.routing)
    assert all((np.diff(row.weight, axis=-1) <= 0).all() for row in out.routing)
    assert {"loss", "cross_entropy", "switch_balance", "router_z"} <= out.losses.keys()
    model.save(tmp_path / "saved")
    other = moezoo.load(tmp_path / "saved", backend="mlx")
    assert np.abs(other.forward(tokens).logits - model.forward(tokens).logits).max() < 1e-4
    assert np.array_equal(
        model.generate(tokens, max_new_tokens=12, temperature=0.0), other.generate(tokens, max_new_tokens=12)
    )
    around = other.forward(tokens, without="layers[1].experts[0-2]", mode="reroute").routing[1].expert
    assert set(around.reshape(-1)) == {3, 4}
    with pytest.raises(moezoo.MoezooError, match="expected 0 <= token <"):
        model.forward(np.array([[10_000]]))
    with pytest.raises(moezoo.MoezooError, match="expected a new or empty folder"):
        model.save(tmp_path / "saved")
    with pytest.raises(moezoo.MoezooError, match="unknown format"):
        model.save(tmp_path / "other", format="gguf")  # type: ignore[arg-type]


def test_version_names_the_backends() -> None:
    lines = dict(line.split(" ", 1) for line in call("--version").output.splitlines())
    assert lines["moezoo"] == moezoo.__version__
    assert {"Python", "numpy", "jax", "flax", "optax", "mlx"} <= set(lines)
