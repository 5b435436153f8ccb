"""`moezoo bench`: smoke test of all modes, selection of contenders, errors and report."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from moezoo.bench import contenders, modes
from moezoo.bench.case import Case, random_prompts, random_windows
from moezoo.bench.configs import bench_config, smoke_config, sweep_config
from moezoo.bench.contenders import OWN, PEERS, select_contenders
from moezoo.bench.limit import bytes_per_step
from moezoo.bench.measure import Effort, Timings
from moezoo.bench.modes import MODES, bench
from moezoo.bench.quantized import quantized_folder
from moezoo.bench.report import closing, heading, table_of
from moezoo.bench.results import Results, Row, ratios, rows_of
from moezoo.bench.sweep_picture import draw_sweep, points
from moezoo.cli.main import main
from moezoo.core.errors import BackendError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
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


def text_of(pieces) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    for piece in pieces:
        console.print(piece)
    return console.export_text()


@pytest.mark.release
@pytest.mark.slow
def test_smoke_runs_every_mode_on_both_backends(tmp_path):
    """Run the command as a user does, in its own process; no times are asserted."""
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
    assert result.keys() == {
        "machine",
        "effort",
        "contenders",
        "left_out",
        "failed",
        "incomplete",
        "rows",
        "relative_to_peers",
    }
    assert result["failed"] == []
    assert not result["incomplete"]
    assert {row["mode"] for row in result["rows"]} == set(MODES)
    for mode in MODES:
        rows = [row for row in result["rows"] if row["mode"] == mode]
        expected = {"jax", "mlx"} if mode == "startup" else {"jax", "mlx", "limit"}
        assert {row["contender"] for row in rows} == expected
        assert all(row["seconds"] > 0 and len(row["slices"]) >= 1 for row in rows)
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
        (["train", "--config", "L"], "SpecError: no such config; got 'L'"),
        (["train", "--config", ROOT / "configs/tiny/top_k.yaml"], "SpecError: model.vocab_size is null"),
        (["train", "--backend", "jaks"], "BackendError: no such backend; got 'jaks'; expected one of jax, mlx."),
        (["train", "--peers", "mlx_lm"], "BackendError: no such peer; got 'mlx_lm'; did you mean mlx-lm?"),
        (["train", "--quantize", "4bit"], "SpecError: --quantize is for decoding; got mode train."),
        (
            ["decode", "--quantize", "7bit"],
            "bits of quantization mode affine is 7; expected 2 or 3 or 4 or 5 or 6 or 8",
        ),
        (["train", "--peers", ","], "BackendError: no peer is named; got ','; expected one or more of transformers,"),
    ],
)
def test_user_errors_are_one_line(words, message):
    result = call(*words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_quantized_case_is_a_folder_of_codes():
    config = sweep_config(None, 4)
    with quantized_folder(Case("batch 1", "decode", config, 1, 8, 4, bits=4)) as folder:
        checkpoint = open_checkpoint(folder)
        weights = {name: checkpoint.weights.stored(name) for name in checkpoint.weights}
    up, router = weights["layers.1.moe.experts.w_up"], weights["layers.1.moe.router.w_router"]
    assert [str(each.format) for each in (up, router)] == [f"{bits}-bit affine, groups of 64" for bits in (4, 8)]
    assert up.scales.dtype == np.float32
    assert up.shape == (4, 256, 256)
    assert not folder.exists()


def test_model_without_moe_layer_raises():
    config = smoke_config()
    (layer,) = config.model.layers
    dense = layer.model_copy(update={"moe": None, "feed_forward": layer.moe.experts})
    config = config.model_copy(update={"model": config.model.model_copy(update={"layers": (dense,)})})
    with pytest.raises(SpecError, match=r"model\.layers has no MoE layer \(mine\)"):
        bench(["layer"], {"mine": config}, {}, {}, Effort(), lambda *_: None)


def test_installed_or_named_contenders_are_selected(monkeypatch):
    monkeypatch.setattr(contenders, "missing_packages", lambda name: ["jax"] if name == "jax" else [])
    monkeypatch.setattr(contenders, "_missing", lambda packages: [name for name in packages if name == "torch"])
    entries, skipped = select_contenders(None, None)
    assert list(entries) == ["mlx", "mlx-lm"]
    assert skipped["jax"] == "not installed: jax"
    assert skipped["transformers"] == "not installed: torch"
    assert skipped["mlx-lm-as-installed"] == "slow; runs only if named in --peers"
    assert list(select_contenders("mlx", "none")[0]) == ["mlx"]
    assert list(select_contenders("mlx", "mlx-lm-as-installed")[0]) == ["mlx", "mlx-lm-as-installed"]
    assert list(select_contenders("mlx", "all")[0]) == ["mlx", "mlx-lm", "mlx-lm-as-installed"]
    with pytest.raises(BackendError, match="contender jax is not installed; missing jax"):
        select_contenders("jax", "none")
    with pytest.raises(BackendError, match="contender transformers is not installed; missing torch"):
        select_contenders("mlx", "transformers")


def test_maker_of_every_contender_exists():
    for entry in (*OWN.values(), *PEERS.values()):
        module, function = entry.maker.split(":")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert f"\ndef {function}() -> " in source


def test_failed_contender_is_reported_and_sets_the_exit_status(monkeypatch):
    for name, entry in {"jax": fake("quick"), "mlx": fake("dying")}.items():
        monkeypatch.setitem(OWN, name, entry)
    monkeypatch.setattr(contenders, "missing_packages", lambda name: [])
    result = call("train", "--smoke", "--peers", "none", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["failed"][0].startswith("smoke train: contender mlx exited with status 9")
    assert [row["contender"] for row in found["rows"]] == ["limit", "jax"]
    assert found["rows"][1]["share_of_limit"] == found["rows"][0]["seconds"] / 0.5
    assert found["rows"][1]["tokens_per_second"] == 2 * 16 / 0.5


def test_contender_beyond_the_limit_is_repeated_and_marked_and_a_signal_keeps_what_is_measured(monkeypatch):
    monkeypatch.setattr(modes, "LIMIT", fake("slow"))
    seen, printed = [], []

    def stop_in_the_second_round(what: str, done: int, total: int | None) -> None:
        if "repeated slice" in what:
            os.kill(os.getpid(), signal.SIGTERM)

    def show(rows: list[Row], complete: bool) -> None:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(table_of(rows, complete))
        printed.append(console.export_text())

    arguments = ({}, {"jax": fake("quick")}, {}, Effort())
    whole = bench(["train"], *arguments, lambda what, *_: seen.append(what), show, smoke=True)
    assert sum("repeated slice" in what for what in seen) == 2
    assert [(row.contender, row.beats_limit, len(row.slices)) for row in whole.rows] == [
        ("limit", False, 2),
        ("jax", True, 2),
    ]
    assert (whole.stopped, whole.to_json()["incomplete"]) == (None, False)
    assert "> 1 (!)" in printed[0]
    assert "4.000" not in printed[0]
    assert [row["share_of_limit"] for row in whole.to_json()["rows"]] == [1.0, None]
    stopped = bench(["train", "layer"], *arguments, stop_in_the_second_round, show, smoke=True)
    assert (stopped.stopped, stopped.to_json()["incomplete"]) == (128 + signal.SIGTERM, True)
    assert [(row.mode, row.contender, len(row.slices)) for row in stopped.rows] == [
        ("train", "limit", 1),
        ("train", "jax", 1),
    ]
    assert "train smoke, incomplete" in printed[1]


def test_decoding_cases_share_one_bandwidth():
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


def test_report_has_a_table_per_mode_and_one_of_shares():
    console = Console(width=120, record=True, file=io.StringIO())
    results = results_of(ROWS)
    console.print(heading(results.machine, [1.9, 1.0, 1.0], results.effort, 200, 12))
    for rows in (ROWS[:2], ROWS[2:3], ROWS[3:4]):
        console.print(table_of(rows, complete=True))
    for piece in closing(results):
        console.print(piece)
    text = console.export_text()
    for piece in ("the machine is not idle", "skipped: not installed", "failed", "train S", "share of the"):
        assert piece in text
    jax = next(line for line in text.splitlines() if "52.0" in line)
    assert all(piece in jax for piece in ("0.500", "2,048", "1.00 s", "0 %", "9.0 s", "1,024"))
    shares = [line for line in text.splitlines() if "0.50 / 0.62" in line]
    assert len(shares) == 1
    assert "0.25 / -" in shares[0]


def test_backends_are_compared_with_peers_turn_by_turn():
    slices = {"jax": [1.0, 2.0, 4.0], "mlx": [2.0, 2.0], "transformers": [2.0, 3.0, 4.0], "limit": [1.0, 1.0, 1.0]}
    rows = [Row("S", "train", "train", name, 1.0, each, share_of_limit=0.5) for name, each in slices.items()]
    (ratio,) = ratios(rows)
    assert (ratio.contender, ratio.peer, ratio.median, ratio.lowest, ratio.highest) == (
        "jax",
        "transformers",
        1.5,
        1,
        2,
    )
    assert text_of(closing(results_of(rows))).count("1.50 (1.00-2.00)") == 1


def test_disturbed_slices_are_counted():
    quiet, disturbed = (replace(ROWS[1], foreign_load=shares) for shares in ([0.0, 0.01, 0.05], [0.0, 0.4, 0.06]))
    assert "2 of 3" in text_of([table_of([ROWS[0], disturbed], complete=True)])
    assert "disturbed" not in text_of([table_of([ROWS[0], quiet], complete=True)])
    assert "at most 5% of the cores" in text_of(closing(results_of([quiet])))
    assert "above 5% in 2 of 6 slices" in text_of(closing(results_of([quiet, disturbed])))
    assert "not known" in text_of(closing(results_of(ROWS)))


def test_sweep_is_plotted_relative_to_the_fewest_experts(tmp_path):
    assert points(ROWS, "train", "jax") == [(4, 1.0), (128, 2.0)]
    assert points(ROWS, "forward", "jax") == [(4, 1.0), (128, 1.5)]
    draw_sweep(ROWS, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_random_tokens_are_equal_for_all_contenders_and_in_the_vocabulary():
    case = Case("train", "train", bench_config("S"), batch=2, context=7)
    windows = random_windows(case)
    assert windows.shape == (8, 1, 8, 257)
    assert windows.min() == 0
    assert windows.max() == 255
    assert (windows == random_windows(case)).all()
    assert random_prompts(case).shape == (2, 7)


def test_case_round_trips_through_json():
    case = Case("batch 1", "decode", bench_config("M"), 1, 32, 64)
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
