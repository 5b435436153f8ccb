import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from moezoo.core.checkpoint import manifest as manifest_module
from moezoo.core.checkpoint.manifest import ARRAYS
from moezoo.core.checkpoint.safetensors_file import SafetensorsFile, shapes_of
from moezoo.core.checkpoint.store import (
    CheckpointInfo,
    begin_checkpoint,
    check_names_and_shapes,
    complete_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)
from moezoo.core.errors import CheckpointError, RunError

CONFIG = "# größer\nmodel: {layers: 2}\r\n"
SYSTEM_CALLS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """Stands for SIGKILL: whatever the package does while it unwinds fails as well."""


def tensors(step, version=0):
    draw = np.random.default_rng((step, version))
    weights = {
        "embed.w": draw.standard_normal((7, 4)).astype(np.float32),
        "norm.scale": np.ones(4, np.float32),
    }
    moments = {f"{kind}_moment.{name}": w * 2 for name, w in weights.items() for kind in ("first", "second")}
    return weights, {**moments, "count": np.array(step, np.int32)}


def save(folder, step, version=0, keep=None):
    return save_checkpoint(folder, step, *tensors(step, version), CONFIG, {"version": version}, keep, tokens=step * 8)


def assert_is(path, step, version=0):
    found = load_checkpoint(path)
    weights, optimizer = tensors(step, version)
    assert (found.step, found.tokens, found.config_text, found.extra) == (
        step,
        step * 8,
        CONFIG,
        {"version": version},
    )
    for ours, expected in ((found.weights, weights), (found.optimizer, optimizer)):
        assert ours.keys() == expected.keys()
        for name, array in expected.items():
            assert ours[name].dtype == array.dtype
            np.testing.assert_array_equal(ours[name], array)


def steps(folder):
    return [info.step for info in list_checkpoints(folder)]


def hidden(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def kill_at(monkeypatch, number, run):
    """Run `run`, killing it at its `number`th system call that changes the disk; False where it has fewer.

    A file that was not yet flushed when the kill came keeps only half of its bytes, as after a power cut.
    """
    calls = 0

    def dying(name, real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= number:
                if name == "fsync" and calls == number:
                    halve(args[0])
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, dying(name, getattr(os, name)))
        try:
            run()
        except Killed:
            return True
    return False


def halve(descriptor):
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        os.ftruncate(descriptor, status.st_size // 2)


# --- saving and loading -----------------------------------------------------------------------------------


def test_all_of_it_comes_back(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 1000)
    assert path == tmp_path / "run" / "checkpoints" / "step_00001000"
    assert sorted(os.listdir(path)) == [
        "config.yaml",
        "manifest.json",
        "optimizer.safetensors",
        "weights.safetensors",
    ]
    assert_is(path, 1000)
    assert latest_checkpoint(path.parent) == (path, [])


def test_manifest_says_what_is_there(tmp_path):
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["step"], manifest["tokens"]) == (1, 3, 24)
    assert manifest["files"]["config.yaml"]["bytes"] == len(CONFIG.encode())
    assert set(manifest["files"]) == {"config.yaml", "optimizer.safetensors", "weights.safetensors"}


def test_order_is_by_step_number_and_not_by_name_or_time(tmp_path):
    for step in (100_000_000, 99_999_999, 5):
        save(tmp_path, step)
    os.utime(tmp_path / "step_00000005", (2e9, 2e9))
    assert steps(tmp_path) == [5, 99_999_999, 100_000_000]
    assert list_checkpoints(tmp_path)[0] == CheckpointInfo(5, tmp_path / "step_00000005")
    assert latest_checkpoint(tmp_path)[0].name == "step_100000000"


def test_keep_leaves_the_last_ones(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [3, 4]
    save(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [5]
    assert hidden(tmp_path) == []


def test_keep_never_deletes_the_one_just_written_nor_later_ones(tmp_path):
    for step in (1, 2, 8, 9):
        save(tmp_path, step)
    save(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3, 8, 9]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, version=0)
    path = save(tmp_path, 1, version=1, keep=1)
    assert os.listdir(tmp_path) == [path.name]
    assert_is(path, 1, version=1)


def test_extra_must_survive_json(tmp_path):
    for extra, problem in (
        ({"a": float("nan")}, "cannot be stored as JSON"),
        ({"a": np.float32(1)}, "cannot be stored as JSON"),
        ({"a": (1, 2)}, "lists for tuples"),
        ({1: 2}, "text for keys"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            save_checkpoint(tmp_path, 1, *tensors(1), CONFIG, extra, None)
    save_checkpoint(tmp_path, 1, *tensors(1), CONFIG, {"ü": [1, {"a": None}]}, None)
    assert load_checkpoint(tmp_path / "step_00000001").extra == {"ü": [1, {"a": None}]}
    assert load_checkpoint(tmp_path / "step_00000001").tokens is None


@pytest.mark.parametrize(
    ("step", "keep", "problem"),
    [(-1, None, "step is -1; expected an integer >= 0"), (1, 0, "keep is 0"), (1.0, None, "step is 1.0")],
)
def test_impossible_request_is_refused(tmp_path, step, keep, problem):
    with pytest.raises(CheckpointError, match=problem):
        save_checkpoint(tmp_path, step, {}, {}, CONFIG, {}, keep)


def test_tensor_that_cannot_be_stored_leaves_the_folder_as_it_was(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="complex128"):
        save_checkpoint(tmp_path, 2, tensors(2)[0], {"x": np.zeros(2, np.complex128)}, CONFIG, {}, 1)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    save(tmp_path, 1)
    calls = 0

    def full(_):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="no space left on device"):
        save(tmp_path, 1, version=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert_is(tmp_path / "step_00000001", 1)


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_checkpoint_is_passed_over_and_named(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    elif damage == "cut":
        (path / file).write_bytes(content[:-3])
    else:
        (path / file).write_bytes(content[:-12] + bytes([content[-12] ^ 1]) + content[-11:])
    latest, problems = latest_checkpoint(tmp_path)
    assert latest == tmp_path / "step_00000001"
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert file in problems[0]
    assert "\n" not in problems[0]
    with pytest.raises(CheckpointError, match=f"is damaged: .*{file}"):
        load_checkpoint(path)


def test_every_flipped_bit_of_the_manifest_is_noticed_or_changes_nothing(tmp_path):
    path = save(tmp_path, 2)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    problems = []
    for spot in range(len(content)):
        manifest.write_bytes(content[:spot] + bytes([content[spot] ^ (1 << spot % 8)]) + content[spot + 1 :])
        try:
            assert_is(path, 2)
        except CheckpointError as error:
            problems.append(str(error))
    assert all("manifest" in problem for problem in problems)
    assert len(problems) > len(content) // 2


def test_renamed_checkpoint_is_refused_but_a_copy_elsewhere_is_fine(tmp_path):
    path = save(tmp_path, 2)
    shutil.copytree(path, tmp_path / "best")
    path.rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match=r"its manifest is of step 2 \(renamed\?\)"):
        load_checkpoint(tmp_path / "step_00000009")
    assert_is(tmp_path / "best", 2)


def test_manifest_that_points_elsewhere_is_refused(tmp_path):
    from moezoo.core.checkpoint.manifest import _digest

    path = save(tmp_path, 2)
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    for change, problem in (
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "lists .*passwd"),
        ({"files": {"config.yaml": {"bytes": "1", "sha256": ""}}}, r"bad files\.config\.yaml\.bytes"),
        ({"step": -1}, "bad step"),
        ({"format_version": 2}, "format version 2; expected 1"),
    ):
        changed = content | change
        (path / "manifest.json").write_text(json.dumps({**changed, "sha256": _digest(changed)}))
        with pytest.raises(CheckpointError, match=problem):
            load_checkpoint(path)


def test_no_checkpoint_is_an_error_that_says_why(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*/none"):
        latest_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*/none"):
        load_checkpoint(tmp_path / "none")
    (save(tmp_path, 1) / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: .*config.yaml is missing.* Train from"):
        latest_checkpoint(tmp_path)


def test_other_names_are_not_checkpoints_and_near_ones_are_named(tmp_path):
    save(tmp_path, 1)
    for name in ("notes", "step_7", "step_000000009"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step_00000002.partial").mkdir()
    path, problems = latest_checkpoint(tmp_path)
    assert path.name == "step_00000001"
    assert [line.split(str(tmp_path) + "/")[1].split()[0] for line in problems] == [
        ".step_00000002.partial",
        "step_000000009",
        "step_7",
    ]


# --- kills ------------------------------------------------------------------------------------------------


def test_kill_at_any_call_of_a_save_keeps_the_old_ones_or_the_new_one(tmp_path, monkeypatch):
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    number, last = 1, 0
    while True:
        run = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "before", run)
        if not kill_at(monkeypatch, number, lambda run=run: save(run, 3, keep=2)):
            break
        path, problems = latest_checkpoint(run)
        step = int(path.name.removeprefix("step_"))
        assert_is(path, step)
        assert step in (2, 3)
        assert step >= last, "a later kill keeps at least as much"
        assert len(problems) == len(hidden(run))  # what is left over is named
        for info in list_checkpoints(run):  # and nothing half deleted looks whole
            assert_is(info.path, info.step)
        last = step
        save(run, 4, keep=2)
        assert steps(run) == [step, 4]
        assert hidden(run) == []
        number += 1
    assert last == 3
    assert number > 20


def test_kill_while_the_only_checkpoint_is_saved_again_keeps_one_of_the_two(tmp_path, monkeypatch):
    save(tmp_path / "before", 1)
    number, seen = 1, set()
    while True:
        run = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "before", run)
        if not kill_at(monkeypatch, number, lambda run=run: save(run, 1, version=1, keep=1)):
            break
        path, _ = latest_checkpoint(run)
        version = load_checkpoint(path).extra["version"]
        assert_is(path, 1, version)
        assert steps(run) == [1]
        seen.add((path.name, version))
        save(run, 2)
        assert steps(run) == [1, 2]
        assert_is(run / "step_00000001", 1, version)
        assert hidden(run) == []
        number += 1
    assert seen == {("step_00000001", 0), (".step_00000001.replaced", 0), ("step_00000001", 1)}


def test_kill_of_the_first_save_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    number, seen = 1, set()
    while True:
        run = tmp_path / f"killed{number}"
        if not kill_at(monkeypatch, number, lambda run=run: save(run, 1)):
            break
        try:
            assert_is(latest_checkpoint(run)[0], 1)
            seen.add("whole")
        except CheckpointError as error:
            seen.add("none" if "there is no checkpoint" in str(error) else "left over")
        number += 1
    assert seen == {"none", "left over", "whole"}


def test_kill_while_leftovers_are_tidied_loses_nothing(tmp_path, monkeypatch):
    before = tmp_path / "before"
    save(before, 1)
    save(before, 2, version=1)
    (before / "step_00000002").rename(before / ".step_00000002.replaced")
    shutil.copytree(before / "step_00000001", before / ".step_00000001.removed")
    shutil.copytree(before / "step_00000001", before / ".step_00000003.partial")
    number = 1
    while True:
        run = tmp_path / f"killed{number}"
        shutil.copytree(before, run)
        if not kill_at(monkeypatch, number, lambda run=run: save(run, 3)):
            break
        path, _ = latest_checkpoint(run)
        found = load_checkpoint(path)
        assert_is(path, found.step, 1 if found.step == 2 else 0)
        assert steps(run)[:2] == [1, 2]
        number += 1
    assert steps(run) == [1, 2, 3]
    assert hidden(run) == []


# --- arrays that several devices wrote --------------------------------------------------------------------


def write_arrays(folder, weights, optimizer):
    """As Orbax lays them out, each array in two parts where it can be."""
    named = {f"weights.{name}": array for name, array in weights.items()}
    named |= {f"optimizer.{name}": array for name, array in optimizer.items()}
    for name, array in named.items():
        store = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}}
        chunk = [max(1, -(-length // 2)) for length in array.shape]
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        metadata = {"shape": list(array.shape), "data_type": array.dtype.name, "chunk_grid": grid}
        tensorstore.open({**store, "metadata": metadata}, create=True).result().write(array).result()


def save_sharded(folder, step, version=0, keep=None):
    partial = begin_checkpoint(folder, step)
    write_arrays(partial / ARRAYS, *tensors(step, version))
    return complete_checkpoint(partial, step, CONFIG, {"version": version}, keep, tokens=step * 8)


def test_arrays_of_several_devices_come_back_whole_and_in_part(tmp_path):
    path = save_sharded(tmp_path, 5)
    assert_is(path, 5)
    found, (weights, _) = load_checkpoint(path), tensors(5)
    assert shapes_of(found.weights) == {name: array.shape for name, array in weights.items()}
    assert found.weights.dtypes["embed.w"] == np.float32
    part = slice(2, 5), slice(1, 3)
    np.testing.assert_array_equal(found.weights.reader("embed.w")(part), weights["embed.w"][part])
    assert latest_checkpoint(tmp_path) == (path, [])


def test_kinds_of_checkpoints_may_follow_each_other(tmp_path):
    for step, saved in enumerate((save, save_sharded, save, save_sharded), start=1):
        saved(tmp_path, step, keep=2)
    assert steps(tmp_path) == [3, 4]
    assert_is(tmp_path / "step_00000003", 3)
    assert_is(tmp_path / "step_00000004", 4)


def test_kill_at_every_system_call_of_a_sharded_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Of moezoo's own: what tensorstore does is not Python's, and is flushed before anything is renamed."""
    before = tmp_path / "before"
    save_sharded(before, 1)
    save_sharded(before, 2)
    number, seen = 1, set()
    while True:
        run = tmp_path / f"killed{number}"
        shutil.copytree(before, run)
        if not kill_at(monkeypatch, number, lambda run=run: save_sharded(run, 3, keep=2)):
            break
        path, _ = latest_checkpoint(run)
        found = load_checkpoint(path)
        assert_is(path, found.step)
        seen.add(found.step)
        save(run, 4, keep=1)
        assert steps(run)[-1] == 4
        assert hidden(run) == []
        number += 1
    assert seen == {2, 3}
    assert number > 20


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from moezoo.core.checkpoint import save_checkpoint
folder, step = Path(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    for version in (0, 1):
        w = np.full((64, 1024), step + version / 2, np.float32)
        save_checkpoint(folder, step, {"w": w}, {"first_moment.w": w}, "text", {"version": version}, 2)
        print(step, version, flush=True)
"""


def test_sigkill_of_a_saving_process_never_costs_a_checkpoint(tmp_path):
    step = 0
    draw = np.random.default_rng(0)
    for _ in range(4):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(step)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            first = process.stdout.readline()
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            said = [line for line in (first + process.stdout.read()).splitlines(keepends=True) if line.endswith("\n")]
        done_step, done_version = (int(word) for word in said[-1].split())
        found = load_checkpoint(latest_checkpoint(tmp_path)[0])
        assert (found.step, found.extra["version"]) >= (done_step, done_version)  # what it reported is there
        expected = np.full((64, 1024), found.step + found.extra["version"] / 2, np.float32)
        np.testing.assert_array_equal(found.weights["w"], expected)
        np.testing.assert_array_equal(found.optimizer["first_moment.w"], expected)
        step = found.step
    save(tmp_path, step + 1, keep=2)
    assert hidden(tmp_path) == []
    assert steps(tmp_path) == [step, step + 1]


# --- names and shapes -------------------------------------------------------------------------------------


def test_all_mismatches_come_in_one_error():
    found = {"a": (2, 3), "b": (4,), "extra": ()}
    expected = {"a": (3, 2), "b": (4,), "c": (5, 6)}
    with pytest.raises(CheckpointError) as caught:
        check_names_and_shapes(found, expected, "run/step_00000001")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("run/step_00000001 does not fit the spec: 1 missing, 1 unexpected, 1 of another shape.")
    assert rest == ["  ~ a [2, 3] expected [3, 2]", "  - c [5, 6] missing", "  + extra [] unexpected"]


def test_equal_names_and_shapes_pass():
    check_names_and_shapes({"b": (4,), "a": (2, 3)}, {"a": (2, 3), "b": (4,)}, "here")


def test_the_newest_is_verified_once_and_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    save_checkpoint(
        tmp_path, 1, {"w": np.ones(3, np.float32)}, {"first_moment.w": np.ones(3, np.float32)}, "", {}, None
    )
    hashed, read = [], []
    digest, one = manifest_module.sha256_of, SafetensorsFile.read
    monkeypatch.setattr(manifest_module, "sha256_of", lambda path: hashed.append(path.name) or digest(path))
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: read.append(name) or one(file, name))
    found, path, problems = load_latest_checkpoint(tmp_path)
    assert (path.name, problems, read) == ("step_00000001", [], [])
    assert sorted(hashed) == ["config.yaml", "optimizer.safetensors", "weights.safetensors"]
    np.testing.assert_array_equal(found.weights["w"], np.ones(3))
    assert read == ["w"]


def test_a_file_that_is_changed_after_it_was_verified_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": np.ones(3, np.float32)}, {}, "", {}, None)
    found = load_checkpoint(path)
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        found.weights["w"]
