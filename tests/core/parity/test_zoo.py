"""`moezoo zoo`: its tables, JSON and exit status, with fake parity reports."""

import io
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import moezoo
from moezoo.cli.main import main
from moezoo.core.parity.causality import Causality
from moezoo.core.parity.report import Comparison, ParityReport, ParityTolerances
from moezoo.core.parity.zoo import all_features, zoo

TINY = Path(__file__).parents[3] / "configs" / "tiny"
PAIRS = ("reference/jax", "reference/mlx", "jax/mlx")


def report_of(path: Path) -> ParityReport:
    """A fake report in which the gradients of `capacity` differ by infinity and all else agrees."""
    gradient = float("inf") if path.stem == "capacity" else 3e-6
    rows = [
        Comparison(pair, kind, kind, value, value, 1e-5)
        for pair in PAIRS
        for kind, value in (("logits", 2e-7), ("gradient", gradient))
    ]
    causality = (Causality("reference", "inference", None, 0.0, 1e-9),)
    nowhere = dict.fromkeys(PAIRS)
    return ParityReport(str(path), 2, 8, PAIRS, {}, (), tuple(rows), nowhere, ParityTolerances(), causality=causality)


def call(*words: object) -> Result:
    return CliRunner().invoke(main, ["zoo", *(str(word) for word in words)])


def rendered(table: object) -> list[str]:
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for name in ("capacity", "dense"):
        shutil.copy(TINY / f"{name}.yaml", tmp_path)
    return tmp_path


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moezoo, "parity", report_of)


def test_list_shows_every_feature_with_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = call("--list", TINY)
    assert result.exit_code == 0, result.stderr
    shown = {row: config.name for row, config in zoo(TINY).rows}
    lines = [line.strip() for line in result.stdout.splitlines()]
    starts = [next(line for line in lines if line.startswith(f"{feature} ")) for feature in all_features()]
    assert [line.split()[-1] for line in starts] == [shown[feature] for feature in all_features()]
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_json_has_features_and_configs() -> None:
    content = json.loads(call("--list", "--json", TINY).stdout)
    assert content.keys() == {"passed", "parts", "configs"}
    assert content["passed"] is None  # nothing was checked
    assert [row["part"] for row in content["parts"]] == list(all_features())
    assert all(row.keys() == {"part", "config"} for row in content["parts"])
    names = [config["name"] for config in content["configs"]]
    assert names == sorted(path.stem for path in TINY.glob("*.yaml"))
    assert {row["config"] for row in content["parts"]} <= set(names)
    for config in content["configs"]:
        assert config.keys() == {"name", "source", "features", "differences", "passed", "causal"}
        assert config["source"]
        assert (config["differences"], config["passed"], config["causal"]) == (None, None, None)


def test_features_without_a_config_are_named_and_fail(two: Path) -> None:
    result = call("--list", two)
    assert result.exit_code == 1
    assert "parts without a config: " in result.stderr
    assert "attention: latent" in result.stderr
    assert "dispatch: capacity" not in result.stderr
    assert json.loads(call("--list", "--json", two).stdout)["passed"] is False


def test_table_of_figures_fits_100_columns() -> None:
    lines = rendered(zoo(TINY, report_of).table())
    assert max(map(len, lines)) <= 100
    rows = [line.split()[:5] for line in lines]
    assert ["dense", "3e-06", "3e-06", "3e-06", "causal"] in rows
    assert ["capacity", "inf", "inf", "inf", "causal"] in rows


def test_failing_config_is_named_and_its_figures_are_json(checked: None, two: Path) -> None:
    result = call("--json", two, "--out", two / "table.md")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("; parity failures: capacity")
    capacity, dense = json.loads(result.stdout, parse_constant=pytest.fail)["configs"]
    assert dense["differences"] == {pair: [2e-7, 3e-6] for pair in PAIRS}
    assert (dense["passed"], dense["causal"]) == (True, "causal")
    assert capacity["differences"] == {pair: [2e-7, "inf"] for pair in PAIRS}
    assert capacity["passed"] is False
    page = (two / "table.md").read_text()
    assert "| dispatch: capacity | [capacity](../configs/tiny/capacity.yaml) | 2e-07, inf |" in page
    assert "| attention: latent | **none** |" in page


def test_zoo_passes_if_all_features_are_shown_and_all_configs_agree() -> None:
    assert zoo(TINY, lambda path: report_of(Path("x.yaml"))).passed is True
    assert zoo(TINY, report_of).passed is False


def test_folder_without_configs_is_an_error_of_one_line(tmp_path: Path) -> None:
    result = call(tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"SpecError: {tmp_path} has no configs; expected *.yaml files. Use the folder configs/tiny of the project.\n"
    )
    (tmp_path / "x.yaml").write_text("model: 3")
    assert call("--list", tmp_path).stderr.startswith("SpecError: model is 3; ")
