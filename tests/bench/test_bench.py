"""The command: everything runs on a tiny model, and what a caller can get wrong is one line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from moezoo.bench import contenders
from moezoo.bench.case import Case, random_prompts, random_windows
from moezoo.bench.configs import bench_config, smoke_config
from moezoo.bench.contenders import OWN, PEERS, chosen
from moezoo.bench.limit import bytes_per_step
from moezoo.bench.measure import Effort, Timings
from moezoo.bench.modes import MODES, Results, Row, bench, rows_of
from moezoo.bench.report import report
from moezoo.bench.sweep_picture import draw_sweep, points
from moezoo.cli import main
from moezoo.core.errors import BackendError, SpecError
from tests.bench.fakes import fake
from tests.support.backends_available import require_backend

ROOT = Path(__file__).parents[2]
ROWS = [
    Row("S", "train", "train", "limit", 0.5, [0.4, 0.5, 0.6], 0.7, 4096.0, 105e9, None, 1.0, None, 2**28),
    Row("S", "train", "train", "jax", 1.0, [1.0, 1.0, 1.0], 9.0, 2048.0, 52e9, None, 0.5, None, 2**30),
    Row("M", "train", "train", "jax", 4.0, [4.0, 4.0, 4.0], 9.0, 512.0, 78e9, None, 0.625, None, 2**31),
    Row("S", "decode", "batch 8", "jax", 0.01, [0.01], 2.0, 800.0, None, 6e9, 0.25),
    Row("sweep", "experts", "train, 4 experts", "jax", 0.2, [0.2], 1.0, 1e4, 1e9, None, 0.4, 1.0),
    Row("sweep", "experts", "train, 128 experts", "jax", 0.4, [0.4], 1.0, 5e3, 1e9, None, 0.2, 2.0),
    Row("sweep", "experts", "forward, 4 experts", "jax", 0.02, [0.02], 1.0, 1e5, 1e9, None, 0.4, 1.0),
    Row("sweep", "experts", "forward, 128 experts", "jax", 0.03, [0.03], 1.0, 7e4, 1e9, None, 0.3, 1.5),
    Row("S", "startup", "cold", "jax", 11.0, [11.0]),
]


def call(*words: object):
    return CliRunner().invoke(main, ["bench", *(str(word) for word in words)])


def results_of(rows: list[Row]) -> Results:
    machine = {"processor": "P", "cores": 2, "memory_bytes": 2**34, "system": "L", "variables": {"XLA_FLAGS": "x"}}
    machine |= {"load_before": [1.9, 1.0, 1.0], "load_after": [2.0, 1.0, 1.0]}
    return Results(machine, Effort(), {"jax": {"device": "cpu"}}, {"mlx-lm": "not installed"}, ["S train: why"], rows)


@pytest.mark.slow
def test_smoke_runs_every_mode_on_both_backends(tmp_path):
    """As a person starts it, in a process of its own; no time is asserted."""
    for name in OWN:
        require_backend(name)
    picture = tmp_path / "made" / "sweep.png"
    done = subprocess.run(
        [sys.executable, "-m", "moezoo", "bench", "--smoke", "--peers", "none", "--json", "--out", str(picture)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"machine", "effort", "contenders", "left_out", "failed", "rows"}
    assert result["failed"] == []
    assert {row["mode"] for row in result["rows"]} == set(MODES)
    for mode in MODES:
        rows = [row for row in result["rows"] if row["mode"] == mode]
        expected = {"jax", "mlx"} if mode == "startup" else {"jax", "mlx", "limit"}
        assert {row["contender"] for row in rows} == expected
        assert all(row["seconds"] > 0 and len(row["slices"]) == 1 for row in rows)
        assert all((row["share_of_limit"] is None) == (mode == "startup") for row in rows)
    training = {row["contender"]: row["peak_memory_bytes"] for row in result["rows"] if row["mode"] == "train"}
    assert training["limit"] is None
    assert min(training["jax"], training["mlx"]) > 2**20
    assert "experts" in result["contenders"]["jax"]
    assert "share of the limit, smoke" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "SpecError: no such mode; got 'trian'; did you mean train?; expected one of train, layer,"),
        (["train", "--config", "L"], "SpecError: no such config; got 'L'; expected S, M or the path of a YAML config."),
        (["train", "--config", ROOT / "configs/tiny/top_k.yaml"], "SpecError: model.vocab_size is null"),
        (["train", "--backend", "jaks"], "BackendError: no such backend; got 'jaks'; expected jax, mlx."),
        (["train", "--peers", "mlx_lm"], "BackendError: no such peer; got 'mlx_lm'; did you mean mlx-lm?"),
        (["train", "--peers", ","], "BackendError: no peer is named; got ','; expected transformers,"),
    ],
)
def test_what_a_caller_gets_wrong_is_one_line(words, message):
    result = call(*words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_layer_without_a_mixture_is_refused():
    config = smoke_config()
    (layer,) = config.model.layers
    dense = layer.model_copy(update={"moe": None, "feed_forward": layer.moe.experts})
    config = config.model_copy(update={"model": config.model.model_copy(update={"layers": (dense,)})})
    with pytest.raises(SpecError, match=r"model\.layers have no mixture \(mine\)"):
        bench(["layer"], {"mine": config}, {}, {}, Effort(), lambda _: None)


def test_contenders_are_those_that_are_installed_or_named(monkeypatch):
    monkeypatch.setattr(contenders, "missing_packages", lambda name: ["jax"] if name == "jax" else [])
    monkeypatch.setattr(contenders, "_missing", lambda packages: [name for name in packages if name == "torch"])
    entries, left_out = chosen(None, None)
    assert list(entries) == ["mlx", "mlx-lm"]
    assert left_out["jax"] == "not installed: jax"
    assert left_out["transformers"] == "not installed: torch"
    assert left_out["mlx-lm-as-installed"] == "slow to time; it runs when --peers names it"
    assert list(chosen("mlx", "none")[0]) == ["mlx"]
    assert list(chosen("mlx", "mlx-lm-as-installed")[0]) == ["mlx", "mlx-lm-as-installed"]
    assert list(chosen("mlx", "all")[0]) == ["mlx", "mlx-lm", "mlx-lm-as-installed"]
    with pytest.raises(BackendError, match="contender jax is not installed; missing jax"):
        chosen("jax", "none")
    with pytest.raises(BackendError, match="contender transformers is not installed; missing torch"):
        chosen("mlx", "transformers")


def test_every_contender_has_a_maker_that_exists():
    for entry in (*OWN.values(), *PEERS.values()):
        module, function = entry.maker.split(":")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert f"\ndef {function}() -> " in source


def test_a_contender_that_fails_is_reported_and_the_status_says_so(monkeypatch):
    for name, entry in {"jax": fake("quick"), "mlx": fake("dying")}.items():
        monkeypatch.setitem(OWN, name, entry)
    monkeypatch.setattr(contenders, "missing_packages", lambda name: [])
    result = call("train", "--smoke", "--peers", "none", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["failed"][0].startswith("smoke train: contender mlx ended with status 9")
    assert [row["contender"] for row in found["rows"]] == ["limit", "jax"]
    assert found["rows"][1]["share_of_limit"] == found["rows"][0]["seconds"] / 0.5
    assert found["rows"][1]["tokens_per_second"] == 2 * 16 / 0.5


def test_all_decoding_is_limited_by_one_rate():
    cases = [Case(label, "decode", smoke_config(), batch, 8, 4) for label, batch in (("one", 1), ("two", 2))]
    sizes = {case.label: bytes_per_step(case) for case in cases}
    timings = Timings(facts={"jax": {}, "limit": {}})
    for label, rates in {"one": (1e6, 9e6), "two": (2e6, 3e6, 4e6)}.items():
        timings.slices["limit", label] = [sizes[label] / rate for rate in rates]
        timings.slices["jax", label] = [sizes[label] / 1.5e6]
        for name in ("limit", "jax"):
            timings.first_seconds[name, label] = 1.0
    rows = rows_of("S", "decode", cases, timings)
    assert [row.bytes_per_second for row in rows] == pytest.approx([3e6, 1.5e6, 3e6, 1.5e6])
    assert [row.share_of_limit for row in rows] == pytest.approx([1, 0.5, 1, 0.5])


def test_report_has_a_table_for_each_mode_and_one_of_shares():
    console = Console(width=120, record=True, file=io.StringIO())
    for piece in report(results_of(ROWS)):
        console.print(piece)
    text = console.export_text()
    for piece in ("the machine was not idle before", "left out: not installed", "failed", "train S", "share of the"):
        assert piece in text
    jax = next(line for line in text.splitlines() if "52.0" in line)
    assert all(piece in jax for piece in ("0.500", "2,048", "1.00 s", "0 %", "9.0 s", "1,024"))
    shares = [line for line in text.splitlines() if "0.50 / 0.62" in line]
    assert len(shares) == 1
    assert "0.25 / -" in shares[0]


def test_sweep_is_drawn_relative_to_the_fewest_experts(tmp_path):
    assert points(ROWS, "train", "jax") == [(4, 1.0), (128, 2.0)]
    assert points(ROWS, "forward", "jax") == [(4, 1.0), (128, 1.5)]
    draw_sweep(ROWS, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_random_tokens_are_the_same_for_everyone_and_within_the_vocabulary():
    case = Case("train", "train", bench_config("S"), batch=2, context=7)
    windows = random_windows(case)
    assert windows.shape == (8, 1, 8, 257)
    assert windows.min() == 0
    assert windows.max() == 255
    assert (windows == random_windows(case)).all()
    assert random_prompts(case).shape == (2, 7)


def test_a_case_survives_its_way_into_another_process():
    case = Case("batch 1", "decode", bench_config("M"), 1, 32, 64)
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
