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
from moezoo.core.checkpoint import store
from moezoo.core.checkpoint.manifest import ARRAYS, manifest_digest
from moezoo.core.checkpoint.safetensors_file import SafetensorsFile, shapes_of
from moezoo.core.checkpoint.store import (
    CheckpointInfo,
    begin_checkpoint,
    check_names_and_shapes,
    clean_up,
    complete_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)
from moezoo.core.errors import CheckpointError, RunError

CONFIG = "# größer\nmodel: {layers: 2}\r\n"
SYSTEM_CALLS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """Simulated SIGKILL; system calls during the unwinding fail as well."""


def config_text(version):
    return f"{CONFIG}# version {version}"


def version_of(checkpoint):
    return int(checkpoint.config_text.split()[-1])


def tensors(step, version=0):
    draw = np.random.default_rng((step, version))
    weights = {
        "embed.w": draw.standard_normal((7, 4)).astype(np.float32),
        "norm.scale": np.ones(4, np.float32),
    }
    moments = {f"{kind}_moment.{name}": w * 2 for name, w in weights.items() for kind in ("first", "second")}
    return weights, {**moments, "count": np.array(step, np.int32)}


def latest_checkpoint(folder):
    _, path, problems = load_latest_checkpoint(folder)
    return path, problems


def save(folder, step, version=0, keep=None):
    return save_checkpoint(folder, step, *tensors(step, version), config_text(version), keep, tokens=step * 8)


def assert_is(path, step, version=0):
    found = load_checkpoint(path)
    weights, optimizer = tensors(step, version)
    assert (found.step, found.tokens, found.config_text) == (step, step * 8, config_text(version))
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
    """Run `run` and kill it at its `number`th system call that changes the disk; False if it has fewer calls.

    A file that was not yet synced at the kill keeps only half of its bytes, as after a power loss.
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


def test_checkpoint_round_trip(tmp_path):
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


def test_manifest_lists_step_tokens_and_files(tmp_path):
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["step"], manifest["tokens"]) == (1, 3, 24)
    assert manifest["files"]["config.yaml"]["bytes"] == len(config_text(0).encode())
    assert set(manifest["files"]) == {"config.yaml", "optimizer.safetensors", "weights.safetensors"}


def test_checkpoints_are_sorted_by_step_not_by_name_or_time(tmp_path):
    for step in (100_000_000, 99_999_999, 5):
        save(tmp_path, step)
    os.utime(tmp_path / "step_00000005", (2e9, 2e9))
    assert steps(tmp_path) == [5, 99_999_999, 100_000_000]
    assert list_checkpoints(tmp_path)[0] == CheckpointInfo(5, tmp_path / "step_00000005")
    assert latest_checkpoint(tmp_path)[0].name == "step_100000000"


def test_keep_retains_the_last_checkpoints(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [3, 4]
    save(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [5]
    assert hidden(tmp_path) == []


def test_keep_never_deletes_the_new_checkpoint_or_later_steps(tmp_path):
    for step in (1, 2, 8, 9):
        save(tmp_path, step)
    save(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3, 8, 9]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, version=0)
    path = save(tmp_path, 1, version=1, keep=1)
    assert os.listdir(tmp_path) == [path.name]
    assert_is(path, 1, version=1)


def test_tokens_are_optional(tmp_path):
    path = save_checkpoint(tmp_path, 1, *tensors(1), CONFIG, None)
    assert load_checkpoint(path).tokens is None


def test_older_manifest_with_values_in_extra_is_readable(tmp_path):
    path = save(tmp_path, 2)
    content = json.loads((path / "manifest.json").read_text())
    assert content["extra"] == {}  # the key stays in the format
    del content["sha256"]
    content["extra"] = {"ü": [1, {"a": None}]}
    (path / "manifest.json").write_text(json.dumps({**content, "sha256": manifest_digest(content)}))
    assert_is(path, 2)


@pytest.mark.parametrize(
    ("step", "keep", "problem"),
    [(-1, None, "step is -1; expected an integer >= 0"), (1, 0, "keep is 0"), (1.0, None, "step is 1.0")],
)
def test_invalid_arguments_raise(tmp_path, step, keep, problem):
    with pytest.raises(CheckpointError, match=problem):
        save_checkpoint(tmp_path, step, {}, {}, CONFIG, keep)


def test_unsupported_dtype_leaves_the_folder_unchanged(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="complex128"):
        save_checkpoint(tmp_path, 2, tensors(2)[0], {"x": np.zeros(2, np.complex128)}, CONFIG, 1)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_full_disk_leaves_the_folder_unchanged(tmp_path, monkeypatch):
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
def test_damaged_checkpoint_is_skipped_and_named(tmp_path, file, damage):
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


def test_flipped_bit_in_the_manifest_is_detected_or_harmless(tmp_path):
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


def test_renamed_checkpoint_raises_but_a_copy_in_another_folder_loads(tmp_path):
    path = save(tmp_path, 2)
    shutil.copytree(path, tmp_path / "best")
    path.rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match=r"its manifest is for step 2 \(was the folder renamed\?\)"):
        load_checkpoint(tmp_path / "step_00000009")
    assert_is(tmp_path / "best", 2)


def test_manifest_with_paths_outside_the_folder_raises(tmp_path):
    path = save(tmp_path, 2)
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    for change, problem in (
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "lists .*passwd"),
        ({"files": {"config.yaml": {"bytes": "1", "sha256": ""}}}, r"invalid files\.config\.yaml\.bytes"),
        ({"step": -1}, "invalid step"),
        ({"format_version": 2}, "format version 2; expected 1"),
    ):
        changed = content | change
        (path / "manifest.json").write_text(json.dumps({**changed, "sha256": manifest_digest(changed)}))
        with pytest.raises(CheckpointError, match=problem):
            load_checkpoint(path)


def test_missing_checkpoint_error_has_the_reason(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*/none"):
        latest_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*/none"):
        load_checkpoint(tmp_path / "none")
    (save(tmp_path, 1) / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*: .*config.yaml is missing.* Train from"):
        latest_checkpoint(tmp_path)


def test_other_names_are_ignored_and_similar_ones_are_reported(tmp_path):
    save(tmp_path, 1)
    for name in ("notes", "step_7", "step_000000009"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step_00000002.partial").mkdir()  # of a save in progress, as far as a reader knows
    path, problems = latest_checkpoint(tmp_path)
    assert path.name == "step_00000001"
    assert [line.split(str(tmp_path) + "/")[1].split()[0] for line in problems] == [
        "step_000000009",
        "step_7",
    ]


# --- kills ------------------------------------------------------------------------------------------------


def test_kill_at_any_system_call_of_a_save_keeps_old_or_new_checkpoint(tmp_path, monkeypatch):
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
        assert problems == []
        for info in list_checkpoints(run):  # no half-deleted checkpoint looks complete
            assert_is(info.path, info.step)
        leftovers = hidden(run)
        assert len(clean_up(run)) == len(leftovers)
        assert hidden(run) == []
        last = step
        save(run, 4, keep=2)
        assert steps(run) == [step, 4]
        assert hidden(run) == []
        number += 1
    assert last == 3
    assert number > 20


def test_kill_while_the_only_checkpoint_is_replaced_keeps_one_version(tmp_path, monkeypatch):
    save(tmp_path / "before", 1)
    number, seen = 1, set()
    while True:
        run = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "before", run)
        if not kill_at(monkeypatch, number, lambda run=run: save(run, 1, version=1, keep=1)):
            break
        path, _ = latest_checkpoint(run)
        version = version_of(load_checkpoint(path))
        assert_is(path, 1, version)
        assert steps(run) == [1]
        seen.add((path.name, version))
        save(run, 2)
        assert steps(run) == [1, 2]
        assert_is(run / "step_00000001", 1, version)
        assert hidden(run) == []
        number += 1
    assert seen == {("step_00000001", 0), (".step_00000001.replaced", 0), ("step_00000001", 1)}


def test_kill_of_the_first_save_leaves_no_incomplete_checkpoint(tmp_path, monkeypatch):
    number, seen = 1, set()
    while True:
        run = tmp_path / f"killed{number}"
        if not kill_at(monkeypatch, number, lambda run=run: save(run, 1)):
            break
        try:
            assert_is(latest_checkpoint(run)[0], 1)
            seen.add("complete")
        except CheckpointError as error:
            seen.add("none" if "there is no checkpoint" in str(error) else "incomplete")
        number += 1
    assert seen == {"none", "incomplete", "complete"}


def test_kill_during_the_cleanup_loses_no_checkpoint(tmp_path, monkeypatch):
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


# --- reading while another process saves -------------------------------------------------------------------


def during(monkeypatch, name, act):
    """Patch a function of the store: its first call runs `act` before the real one."""
    real, acts = getattr(store, name), [act]

    def patched(*args):
        if acts:
            acts.pop()()
        return real(*args)

    monkeypatch.setattr(store, name, patched)


@pytest.mark.parametrize("stage", ["verify", "_load"])
def test_checkpoint_pruned_while_it_is_opened_gives_the_newer_one(tmp_path, monkeypatch, stage):
    save(tmp_path, 1)
    during(monkeypatch, stage, lambda: save(tmp_path, 2, keep=1))
    path, problems = latest_checkpoint(tmp_path)
    assert (path.name, problems) == ("step_00000002", [])
    assert_is(path, 2)


def test_checkpoint_replaced_while_it_is_verified_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    manifest = manifest_module.read_manifest(tmp_path / "step_00000002")
    monkeypatch.setattr(manifest_module, "read_manifest", lambda path: manifest)
    during(monkeypatch, "verify", lambda: (monkeypatch.undo(), save(tmp_path, 2, version=1)))
    path, problems = latest_checkpoint(tmp_path)
    assert (path.name, problems) == ("step_00000002", [])
    assert_is(path, 2, 1)


def test_loaded_checkpoint_is_readable_after_it_was_pruned(tmp_path):
    save(tmp_path, 1)
    loaded, _, _ = load_latest_checkpoint(tmp_path)
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]
    weights, optimizer = tensors(1)
    for found, expected in ((loaded.weights, weights), (loaded.optimizer, optimizer)):
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_checkpoints_that_change_at_every_attempt_end_in_an_error(tmp_path, monkeypatch):
    save(tmp_path, 1)
    step = iter(range(2, 99))
    monkeypatch.setattr(store, "_ATTEMPTS", 3)

    def verify(path):
        save(tmp_path, next(step), keep=1)
        raise CheckpointError("gone")

    monkeypatch.setattr(store, "verify", verify)
    with pytest.raises(CheckpointError, match=r"change faster than they can be read, in 3 attempts\. Wait"):
        latest_checkpoint(tmp_path)


# --- sharded checkpoints ------------------------------------------------------------------------------------


def write_arrays(folder, weights, optimizer):
    """Write arrays in Orbax's layout, each in two chunks if possible."""
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
    return complete_checkpoint(partial, step, config_text(version), keep, tokens=step * 8)


def test_sharded_checkpoint_loads_whole_and_in_slices(tmp_path):
    path = save_sharded(tmp_path, 5)
    assert_is(path, 5)
    found, (weights, _) = load_checkpoint(path), tensors(5)
    assert shapes_of(found.weights) == {name: array.shape for name, array in weights.items()}
    assert found.weights.dtypes["embed.w"] == np.float32
    part = slice(2, 5), slice(1, 3)
    np.testing.assert_array_equal(found.weights.reader("embed.w")(part), weights["embed.w"][part])
    assert latest_checkpoint(tmp_path) == (path, [])


def test_whole_and_sharded_checkpoints_may_alternate(tmp_path):
    for step, saved in enumerate((save, save_sharded, save, save_sharded), start=1):
        saved(tmp_path, step, keep=2)
    assert steps(tmp_path) == [3, 4]
    assert_is(tmp_path / "step_00000003", 3)
    assert_is(tmp_path / "step_00000004", 4)


@pytest.mark.slow
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.release), 3])
def test_kill_at_any_system_call_of_a_sharded_save_keeps_a_checkpoint(tmp_path, monkeypatch, every):
    """System calls of moezoo only: tensorstore's are not made in Python, and finish before the rename."""
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
        number += every
    assert seen == {2, 3}
    assert number > 20


SAVE_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from moezoo.core.checkpoint.store import save_checkpoint
folder, step = Path(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    for version in (0, 1):
        w = np.full((64, 1024), step + version / 2, np.float32)
        save_checkpoint(folder, step, {"w": w}, {"first_moment.w": w}, f"# {version}", 2)
        print(step, version, flush=True)
"""


@pytest.mark.slow
def test_sigkill_during_saves_never_loses_a_checkpoint(tmp_path):
    step = 0
    draw = np.random.default_rng(0)
    for _ in range(4):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(step)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            first = process.stdout.readline()
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            lines = [line for line in (first + process.stdout.read()).splitlines(keepends=True) if line.endswith("\n")]
        done_step, done_version = (int(word) for word in lines[-1].split())
        found = load_checkpoint(latest_checkpoint(tmp_path)[0])
        assert (found.step, version_of(found)) >= (done_step, done_version)  # every reported save is complete
        expected = np.full((64, 1024), found.step + version_of(found) / 2, np.float32)
        np.testing.assert_array_equal(found.weights["w"], expected)
        np.testing.assert_array_equal(found.optimizer["first_moment.w"], expected)
        step = found.step
    save(tmp_path, step + 1, keep=2)
    assert hidden(tmp_path) == []
    assert steps(tmp_path) == [step, step + 1]


# --- names and shapes -------------------------------------------------------------------------------------


def test_all_mismatches_are_in_one_error():
    found = {"a": (2, 3), "b": (4,), "extra": ()}
    expected = {"a": (3, 2), "b": (4,), "c": (5, 6)}
    with pytest.raises(CheckpointError) as caught:
        check_names_and_shapes(found, expected, "run/step_00000001")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("run/step_00000001 does not match the spec: 1 missing, 1 unexpected, 1 with another shape.")
    assert rest == ["  ~ a [2, 3] expected [3, 2]", "  - c [5, 6] missing", "  + extra [] unexpected"]


def test_equal_names_and_shapes_pass():
    check_names_and_shapes({"b": (4,), "a": (2, 3)}, {"a": (2, 3), "b": (4,)}, "here")


def test_newest_checkpoint_is_verified_once_and_read_lazily(tmp_path, monkeypatch):
    ones = np.ones(3, np.float32)
    save_checkpoint(tmp_path, 1, {"w": ones}, {"first_moment.w": ones}, "", None)
    hashed, read = [], []
    digest, one = manifest_module.sha256_of, SafetensorsFile.read
    monkeypatch.setattr(manifest_module, "sha256_of", lambda path: hashed.append(path.name) or digest(path))
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: read.append(name) or one(file, name))
    found, path, problems = load_latest_checkpoint(tmp_path)
    assert (path.name, problems, read) == ("step_00000001", [], [])
    assert sorted(hashed) == ["config.yaml", "optimizer.safetensors", "weights.safetensors"]
    np.testing.assert_array_equal(found.weights["w"], np.ones(3))
    assert read == ["w"]


def test_file_changed_after_verification_raises(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": np.ones(3, np.float32)}, {}, "", None)
    found = load_checkpoint(path)
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        found.weights["w"]
