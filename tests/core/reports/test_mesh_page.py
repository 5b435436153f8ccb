import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.config.mesh_option import load_mesh
from moezoo.core.config.run_config import load_config
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.reports.mesh_page import mesh_description

CONFIG = "configs/bench/small.yaml"
SPEC = load_config(CONFIG).model


def described(*words: str) -> str:
    # Trap: xdist's workers have COLUMNS, which limits tables.
    result = CliRunner(env={"COLUMNS": None}).invoke(main, ["describe", CONFIG, *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_mesh_option_takes_axes_or_a_file(tmp_path: Path) -> None:
    assert load_mesh("data=2, expert=auto,exchange=allgather") == MeshConfig(
        data=2, expert="auto", exchange="allgather"
    )
    assert load_mesh("configs/meshes/tiny_moe.yaml") == MeshConfig(data="auto", rules={"expert": ("data",)})
    run = tmp_path / "config.yaml"
    run.write_text("model: {}\nmesh: {fsdp: 4}\n", encoding="utf-8")
    assert load_mesh(str(run)) == MeshConfig(fsdp=4)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("data", r"--mesh is 'data'; expected AXIS=DEVICES with each axis once, e\.g\. data=2,expert=4"),
        ("data=2,data=4", r"each axis once"),
        ("", r"--mesh is ''"),
        ("data=0", r"data is 0; expected a number of devices, 1 or more, or auto"),
        ("dta=2", r"dta .*data"),
        ("data=auto,expert=auto", r"is 'auto', and so is data"),
        ("nowhere.yaml", r"no such mesh; got nowhere.yaml"),
        (CONFIG, r"has no mesh section"),
    ],
)
def test_invalid_mesh_option_raises(option: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        load_mesh(option)


def test_device_bytes_are_those_of_its_shards() -> None:
    known = mesh_description(SPEC, MeshConfig(fsdp=2, expert=4))
    rows = {row.name: row for row in known.parameters}
    assert list(rows) == [row.name for row in parameter_table(SPEC)]
    for row in parameter_table(SPEC):
        times = 4 if ".experts." in row.name else 1
        times *= 2 if "embed" in row.axes and row.role not in ("router", "norms") else 1
        assert rows[row.name].device_bytes == 4 * math.prod(row.shape) // times, row.name
    assert known.parameter_bytes == sum(row.device_bytes for row in rows.values())
    trained = [rows[row.name].device_bytes for row in parameter_table(SPEC) if row.trained]
    assert known.moment_bytes == 2 * sum(trained)
    alone = mesh_description(SPEC, MeshConfig())
    assert alone.parameter_bytes == 4 * sum(row.size for row in parameter_table(SPEC))


def test_table_shows_the_sharding_of_each_dimension() -> None:
    page = described("--mesh", "fsdp=2,expert=4")
    experts = SPEC.all_layers[-1].moe
    assert experts is not None
    width = experts.experts.hidden_dim
    assert f"{experts.num_experts} / expert 4 x {SPEC.embed_dim} / fsdp 2 x {width}" in " ".join(page.split())
    assert re.search(r"layers\.\*\.moe\.router\.w_router +[0-9]+ x", page)


def test_json_lists_all_parameters() -> None:
    known = json.loads(described("--mesh", "configs/meshes/tiny_moe.yaml", "--devices", "4", "--json"))
    assert known["devices"] == 4
    cut = {row["name"]: row["cut"] for row in known["parameters"]}
    assert cut["layers.0.moe.experts.w_down"] == [["data"], [], []]
    assert cut["embedding.weight"] == [[], []]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--mesh", "data=auto"), "an axis of the mesh is auto"),
        (("--mesh", "data=2", "--devices", "3"), "mesh is data 2, for 2 devices; got 3 devices"),
        (("--mesh", "expert=3"), "is not divisible into 3 shards (mesh.rules.expert = expert)"),
        (("--devices", "3"), "--devices is the number of devices of a mesh; got --devices 3 without --mesh"),
        (("--mesh", "data=1", "--devices", "3"), "mesh is one device; got --devices 3"),
    ],
)
def test_invalid_mesh_options_are_errors_of_one_line(words: tuple[str, ...], problem: str) -> None:
    result = CliRunner().invoke(main, ["describe", CONFIG, *words])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert problem in line
