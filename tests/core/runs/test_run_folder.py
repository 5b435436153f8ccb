"""The run folder: refused and killed starts, damage, a folder that moves, a full disk, two processes."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from moezoo.api import load_model
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import prepare_data
from moezoo.core.distributed.mesh import MESH_AXES, Devices
from moezoo.core.errors import CheckpointError, DataError, RunError
from moezoo.core.runs import run_manifest, run_writer
from moezoo.core.runs.base import base_digest
from moezoo.core.runs.open import describe_model, open_model
from moezoo.core.runs.run_folder import load_run, load_run_layout, prepare_run, run_of
from moezoo.core.runs.save import export, save_run
from moezoo.core.training import saving
from moezoo.core.training.loop import train
from moezoo.core.training.metrics import read_metrics
from moezoo.core.training.reporter import SilentReporter
from tests.support.recording_model import RecordingModel
from tests.support.small_run import write_config


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


class Messages(SilentReporter):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


class Acting(RecordingModel):
    """Does something in one step, such as moving the run folder."""

    def __init__(self, step, act):
        super().__init__()
        self.countdown, self.act = step, act

    def train_step(self, *arguments):
        self.countdown -= 1
        if self.countdown == 0:
            self.act()
        return super().train_step(*arguments)


def start(folder: Path, out: Path, model: RecordingModel | None = None, *, resume=False, **training):
    """Train a recording model; return what the user is told."""
    config = load_config(write_config(folder, **{"checkpoint_every": 2, "steps": 4, **training}))
    data = prepare_data(config.data, config.training.sequence_length)
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    said = Messages()
    train(config, data, model or RecordingModel(), prepare_run(out, config, resume=resume), reporter=said)
    return said.lines


def steps(out: Path):
    return [(line["step"], "loss" in line) for line in read_metrics(out / "metrics.jsonl")]


ALL = [(1, True), (2, True), (3, True), (4, True), (4, False)]
FILES = ["checkpoints", "config.yaml", "data.json", "manifest.json", "metrics.jsonl", "tokenizer.json"]


# --- starts ---------------------------------------------------------------------------------------------------------


def fail():
    raise DataError("the first batch cannot be read.")


@pytest.mark.parametrize("existing", [False, True], ids=["no folder", "empty folder"])
def test_start_that_is_refused_leaves_nothing_and_the_corrected_one_works(tmp_path, existing):
    out = tmp_path / "run"
    if existing:
        out.mkdir()
    refused = RecordingModel()
    refused.own_sequences = lambda batch: fail()
    for model in (refused, Acting(1, fail)):
        with pytest.raises(DataError, match="the first batch"):
            start(tmp_path, out, model)
        assert out.exists() == existing
        assert not existing or os.listdir(out) == []
    start(tmp_path, out)
    assert sorted(os.listdir(out)) == FILES
    assert steps(out) == ALL


def test_resume_that_is_refused_changes_no_file(tmp_path):
    out = tmp_path / "run"
    start(tmp_path, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(DataError):
        start(tmp_path, out, Acting(1, fail), resume=True, steps=6, log_every=2)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    start(tmp_path, out, resume=True, steps=6)
    assert "steps: 6" in (out / "config.yaml").read_text()
    load_run(out)


def test_start_that_fails_while_it_makes_the_folder_removes_it(tmp_path, monkeypatch):
    def full(*_):
        raise RunError("the disk is full")

    monkeypatch.setattr(run_writer, "seal_run", full)
    with pytest.raises(RunError, match="the disk is full"):
        start(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_start_that_was_killed_while_it_made_the_folder_is_cleared_by_the_next(tmp_path):
    out = tmp_path / "run"
    (out / "tokenizer").mkdir(parents=True)
    for name in ("lock.json", "tokenizer.json", "manifest.json", ".config.yaml.12-0123abcd.partial", "tokenizer/old"):
        (out / name).write_text("")
    start(tmp_path, out)
    assert sorted(os.listdir(out)) == FILES
    load_run(out)


class Killed(BaseException):
    """Simulated SIGKILL; system calls during the unwinding fail as well."""


@pytest.mark.release
def test_start_and_resume_that_are_killed_at_any_system_call_can_be_repeated(tmp_path, monkeypatch):
    calls, last = 0, 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls >= last:
                raise Killed
            return real(*arguments, **options)

        return call

    def killed(**options):
        nonlocal calls
        calls = 0
        with monkeypatch.context() as patch:
            for name in (
                "open",
                "write",
                "fsync",
                "replace",
                "rename",
                "mkdir",
                "unlink",
                "rmdir",
                "ftruncate",
                "pwrite",
            ):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                start(tmp_path, out, **options)
            except Killed:
                return True
        return False

    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed
    start(tmp_path, tmp_path / "other")  # writes the config and the token cache
    seen = set()
    while True:
        last += 1
        out = tmp_path / f"run{last}"
        if not killed():
            break
        resumed = (out / "config.yaml").exists()
        killed(resume=resumed)  # at the same call once more
        resumed = (out / "config.yaml").exists()
        seen.add(resumed)
        start(tmp_path, out, resume=resumed)
        assert sorted(os.listdir(out)) == FILES
        assert sorted(os.listdir(out / "checkpoints")) == ["step_00000002", "step_00000004"]
        assert steps(out) == ALL
        describe_model(out)
        shutil.rmtree(out)
    assert seen == {False, True}
    assert last > 50


def test_folder_with_other_files_is_refused_before_training(tmp_path):
    for name in ("tokenizer.json", "notes.txt"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("")
        with pytest.raises(RunError, match="exists and is not a run folder; expected a new or empty folder"):
            start(tmp_path, out)
        assert os.listdir(out) == [name]


def test_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = RecordingModel()
    with pytest.raises(RunError, match=r"cannot create the folder .*file.*: .*is not a folder"):
        start(tmp_path, tmp_path / "file" / "run", model)
    assert model.keys == []


def test_run_without_a_checkpoint_starts_anew_and_says_what_it_drops(tmp_path):
    out = tmp_path / "run"
    start(tmp_path, out)
    shutil.rmtree(out / "checkpoints")
    (out / ".metrics.jsonl.12-0123abcd.partial").write_text("")
    (out / "checkpoints" / ".step_00000002.partial").mkdir(parents=True)
    said = start(tmp_path, out, resume=True)
    assert any("its save was killed" in line for line in said)
    metrics = out / "metrics.jsonl"
    assert (
        f"no checkpoint was saved in {out}: training starts anew, at step 1; the steps in {metrics} are dropped" in said
    )
    assert sorted(os.listdir(out)) == FILES
    assert sorted(os.listdir(out / "checkpoints")) == ["step_00000002", "step_00000004"]
    assert steps(out) == ALL


# --- while it trains ------------------------------------------------------------------------------------------------


def test_second_process_is_refused_while_a_run_is_trained(tmp_path):
    out, seen = tmp_path / "run", []

    def second():
        for resume in (False, True):
            with pytest.raises(
                RunError, match=rf"is being trained by process {os.getpid()} on .* expected one process"
            ):
                start(tmp_path, out, resume=resume)
            seen.append(resume)

    start(tmp_path, out, Acting(3, second))
    assert seen == [False, True]
    assert sorted(os.listdir(out)) == FILES
    assert steps(out) == ALL


def test_of_two_new_runs_in_one_folder_the_later_is_refused_and_harms_nothing(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"another process has written to .* since this one started"):
        start(tmp_path, out, Acting(1, lambda: start(tmp_path, out)))
    assert sorted(os.listdir(out)) == FILES
    assert load_run(out)[2].step == 4


def test_an_earlier_checkpoint_opens_by_its_folder(tmp_path, monkeypatch):
    start(tmp_path, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert (open_model(step).step, open_model(tmp_path / "run").step) == (2, 4)
    assert (describe_model(step), run_of(step)) == (describe_model(tmp_path / "run"), tmp_path / "run")
    assert base_digest(step) == base_digest(tmp_path / "run")  # this model does not learn
    monkeypatch.chdir(step)
    assert open_model(".").tokenizer.content_hash == open_model(step).tokenizer.content_hash
    (step / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step_00000002"):
        open_model(step)


@pytest.mark.parametrize("step", [3, 4])  # metrics are written after 3, a checkpoint after 4
def test_folder_moved_or_deleted_while_training_is_one_error(tmp_path, step):
    out = tmp_path / "run"
    for act in (lambda: out.rename(tmp_path / "moved"), lambda: shutil.rmtree(out)):
        with pytest.raises(RunError, match=r"run was moved or deleted while it was trained.* --resume"):
            start(tmp_path, out, Acting(step, act), log_every=2, steps=6)
        assert not out.exists()
    assert load_run(tmp_path / "moved")[2].step == 2
    (tmp_path / "moved").rename(out)
    assert any("ended without closing" in line for line in start(tmp_path, out, resume=True, steps=6, log_every=2))
    assert load_run(out)[2].step == 6


def test_full_disk_while_metrics_are_written_saves_the_steps_done(tmp_path, monkeypatch):
    out, real, room = tmp_path / "run", os.write, [3000]

    def write(descriptor, content):
        written = min(len(content), room[0])
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= written
        return real(descriptor, content[:written])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunError) as error:
            start(tmp_path, out, steps=40, checkpoint_every=100)
    done = [step for step, _ in steps(out)]
    assert done == list(range(1, len(done) + 1))
    assert len(done) > 1
    expected = (
        f"cannot write {out}/metrics.jsonl: no space left on device. Remove what is in the way, free disk space, or "
    )
    kept = f"use another folder. The checkpoint of step {len(done) + 1} is kept: continue with --resume."
    assert str(error.value) == expected + kept
    assert sorted(os.listdir(out)) == FILES
    start(tmp_path, out, resume=True, steps=40, checkpoint_every=100)
    assert [step for step, trained in steps(out) if trained] == [n for n in range(1, 41) if n != len(done) + 1]


def test_data_that_fails_while_training_saves_the_steps_done(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read\. The checkpoint of step 2 is kept: continue with --resume\."):
        start(tmp_path, tmp_path / "run", Acting(3, fail), checkpoint_every=100)
    assert load_run(tmp_path / "run")[2].step == 2


def test_checkpoint_that_cannot_be_saved_is_one_error_that_names_the_one_kept(tmp_path, monkeypatch):
    out, calls = tmp_path / "run", []

    def full(folder, *_, tokens):
        calls.append(folder)
        raise RunError("the disk is full.")

    model = Acting(3, lambda: monkeypatch.setattr(saving, "save_checkpoint", full))
    with pytest.raises(RunError, match=r"^the disk is full\. The checkpoint of step 2 is kept: continue with --resume"):
        start(tmp_path, out, model)
    assert len(calls) == 1, "saving is not tried twice"
    monkeypatch.undo()
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    start(tmp_path, out, resume=True)
    assert steps(out) == ALL


def test_sharded_checkpoint_that_cannot_be_saved_leaves_no_partial_folder(tmp_path):
    out = tmp_path / "run"

    class Sharded(RecordingModel):
        def checkpoint_writer(self, names=None):
            def write(arrays):
                arrays.mkdir()
                return self

            return write

        def finish(self):
            raise RunError("the disk is full.")

    with pytest.raises(RunError, match=r"^the disk is full\.$"):
        start(tmp_path, out, Sharded())
    assert os.listdir(out / "checkpoints") == []
    assert "lock.json" not in os.listdir(out)


@pytest.mark.parametrize("vanished", [True, False])
def test_checkpoint_that_vanishes_while_the_model_is_built_gives_the_newer_one(tmp_path, monkeypatch, vanished):
    out, built = tmp_path / "run", []
    start(tmp_path, out)

    class Reading(RecordingModel):
        def devices(self):
            return Devices(dict.fromkeys(MESH_AXES, 1), 1, None)

        def build(self, spec, weights):
            built.append(spec)
            if len(built) == 1:  # as sharded files that a run in training prunes while they are read
                if vanished:
                    start(tmp_path, out, resume=True, steps=6, keep_checkpoints=1)
                raise CheckpointError("cannot read the arrays")
            return super().build(spec, weights)

    if vanished:
        assert load_model(out, Reading()).step == 6
    else:
        with pytest.raises(CheckpointError, match="cannot read the arrays"):
            load_model(out, Reading())


@pytest.mark.parametrize("existing", [False, True], ids=["no folder", "empty folder"])
def test_save_and_export_that_fail_leave_no_files(tmp_path, monkeypatch, existing):
    start(tmp_path, tmp_path / "run")
    config, tokenizer, checkpoint, _ = load_run(tmp_path / "run")
    out = tmp_path / "out"
    if existing:
        out.mkdir()

    class Unreadable(dict):
        def __getitem__(self, name):
            raise CheckpointError("a damaged tensor")

    weights = Unreadable(checkpoint.weights)
    weights.shapes, weights.dtypes = checkpoint.weights.shapes, checkpoint.weights.dtypes
    for attempt in (
        lambda: save_run(out, config, tokenizer, weights, 4, None),
        lambda: export(weights, config, tokenizer, None, out),
    ):
        with pytest.raises(CheckpointError, match="a damaged tensor"):
            attempt()
        assert out.exists() == existing
        assert not existing or os.listdir(out) == []
    out.mkdir(exist_ok=True)
    (out / "notes.txt").write_text("")
    with pytest.raises(RunError, match="is not empty"):
        save_run(out, config, tokenizer, checkpoint.weights, 4, None)
    assert os.listdir(out) == ["notes.txt"]


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 2
    file.write_bytes(content)


READ_BY = {
    "config.yaml": [describe_model],
    "manifest.json": [describe_model, load_run, load_run_layout],
    "tokenizer.json": [load_run],
    "tokenizer/a.jinja": [load_run],
    "huggingface/b": [load_run_layout],
}


def test_damaged_file_of_a_run_is_named_wherever_it_is_read(tmp_path):
    run = tmp_path / "run"
    start(tmp_path, run)
    config_text = (run / "config.yaml").read_text()
    for folder, file in (("tokenizer", "a.jinja"), ("huggingface", "b")):
        (run / folder).mkdir()
        (run / folder / file).write_text("{{ messages }}")
    run_writer.seal_run(run, run_writer.STATIC, config_text)
    for name, reads in READ_BY.items():
        for damage in (flip, Path.unlink):
            out = tmp_path / f"{damage.__name__} {name.replace('/', ' ')}"
            shutil.copytree(run, out)
            damage(out / name)
            if damage is Path.unlink and name == "manifest.json":
                load_run(out)  # as a run of an earlier version
            elif damage is flip or name != "config.yaml":  # without config.yaml it is no run any more
                for read in reads:
                    with pytest.raises(
                        RunError, match=rf"run {out} is damaged: .*{name}.*Restore the file from a copy"
                    ):
                        read(out)
    for name in ("huggingface/b", "config.yaml"):
        flip(run / name)
        with pytest.raises(RunError, match=rf"is damaged: the SHA-256 of {name}"):
            start(tmp_path, run, resume=True)


def test_config_replaced_while_it_is_verified_is_not_called_damaged(tmp_path, monkeypatch):
    out = tmp_path / "run"
    start(tmp_path, out)
    texts = [f"# {number}\n" + (out / "config.yaml").read_text() for number in range(3)]
    real = run_manifest.sha256_of

    def meanwhile(path):
        if texts:
            run_manifest.replace_file(out, "config.yaml", texts.pop())
        return real(path)

    monkeypatch.setattr(run_manifest, "sha256_of", meanwhile)
    describe_model(out)
    assert texts == []


def test_config_replaced_by_a_killed_resume_is_not_called_damaged(tmp_path, monkeypatch):
    out = tmp_path / "run"
    start(tmp_path, out)
    real, calls = os.replace, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == stage:
            raise KeyboardInterrupt
        real(*paths)

    for stage in (1, 2, 3):
        with monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                run_manifest.replace_file(out, "config.yaml", f"# {stage}\n" + (out / "config.yaml").read_text())
        describe_model(out)
    text = (out / "config.yaml").read_text()
    assert text.startswith("# 3\n")
    run_manifest.replace_file(out, "config.yaml", text)  # lists it again
    flip(out / "config.yaml")
    with pytest.raises(RunError, match=r"the SHA-256 of config\.yaml differs"):
        describe_model(out)
