"""Checks TensorBoard, wandb and trackio on a run that is killed, stopped and resumed.

    python -m tests.external.check_trackers

Each tracker is read back with its own reader, and compared with metrics.jsonl. Needs `pip install moezoo[trackers]`.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moezoo.core.training.metrics import read_metrics
from tests.support.small_run import write_config

STEPS, CHECKPOINT_EVERY = 240, 50

Points = dict[str, dict[int, float]]  # by name and step
Rows = list[tuple[int, dict[str, float]]]


def train(folder: Path, *words: str) -> subprocess.Popen[str]:
    config = write_config(
        folder, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, validate_every=40, final_validation_sequences=8
    )
    command = [sys.executable, "-m", "moezoo", "train", str(config), "--backend", "mlx", "--out", str(folder / "run")]
    command += ["--set", "trackers=[tensorboard,wandb,trackio]", "--set", "data.tokenizer={kind: byte}", *words]
    command += ["--set", "training.validation_sequences=4"]
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "MOEZOO_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_after(process: subprocess.Popen[str], run: Path, step: int, number: int) -> None:
    """Send a signal once a step is logged, and wait for the end."""
    while process.poll() is None and last_step(run) < step:
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    print(f"{signal.Signals(number).name} after step {last_step(run)}: exit status {process.returncode}")
    if number == signal.SIGTERM and process.returncode != 0:
        raise SystemExit(output)


def last_step(run: Path) -> int:
    try:
        return max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0)
    except OSError:
        return 0


def expected(run: Path) -> Points:
    """What metrics.jsonl has, by the trackers' names, for a few that stand for all."""
    points: Points = {"loss/total": {}, "layers.1/max_vio": {}, "layers.0/load/2": {}, "validation/loss": {}}
    for row in read_metrics(run / "metrics.jsonl"):
        if "loss" in row:
            points["loss/total"][row["step"]] = row["loss"]
            points["layers.1/max_vio"][row["step"]] = row["routing"][1]["worst_load"] - 1
            points["layers.0/load/2"][row["step"]] = row["routing"][0]["load"][2] * 5
        else:
            points["validation/loss"][row["step"]] = row["validation_loss"]
    return points


def of_rows(rows: Rows, names: Points) -> Points:
    """Points by name; a step that a name has twice is an error."""
    points: Points = {name: {} for name in names}
    for step, values in rows:
        for name in names.keys() & values.keys():
            assert step not in points[name], f"{name} has step {step} twice"
            points[name][step] = values[name]
    return points


def tensorboard_points(folder: Path, names: Points) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    config = events.Tensors("config/text_summary" if "config/text_summary" in events.Tags()["tensors"] else "config")
    print(f"  {len(events.Tags()['scalars'])} scalars, config of {len(config[-1].tensor_proto.string_val[0]):,} bytes")
    return of_rows([(event.step, {name: event.value}) for name in names for event in events.Scalars(name)], names)


def wandb_points(folder: Path, names: Points) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    rows: Rows = []
    identities = set()
    files = sorted((folder / "run" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    for content in (content for file in files for content in wandb_records(file.read_bytes())):
        record = Record.FromString(content)
        if record.HasField("run"):
            identities.add(record.run.run_id)
        if record.HasField("history"):
            items = record.history.item
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append((int(values.pop("_step")), values))
    assert len(identities) == 1, identities
    print(f"  {len(files)} offline runs with one id")
    return of_rows(rows, names)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    position, begun = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        begun += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4) and position <= len(data):  # whole, or the last part
            yield begun
            begun = b""


def trackio_points(folder: Path, names: Points) -> Points:
    connection = sqlite3.connect(folder / "trackio" / "moezoo.db")
    found = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    configs = connection.execute("SELECT config FROM configs").fetchall()
    assert len({row[0] for row in found}) == len(configs) == 1, (configs, {row[0] for row in found})
    print(f"  one run, {found[0][0]}, with {len(json.loads(configs[0][0]))} sections of its config")
    return of_rows([(row[1], json.loads(row[2])) for row in found], names)


def differences(wanted: Points, found: Points) -> Iterator[str]:
    for name, points in wanted.items():
        missing = sorted(points.keys() - found[name].keys())
        if missing:  # after SIGKILL, what wandb and trackio had not written yet
            yield f"{name} lacks steps {missing[0]} to {missing[-1]} ({len(missing)})"
        if found[name].keys() - points.keys():
            yield f"{name} has other steps {sorted(found[name].keys() - points.keys())}"
        wrong = [step for step in points.keys() & found[name].keys() if abs(points[step] - found[name][step]) > 1e-5]
        if wrong:
            yield f"{name} has other values at {wrong}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = folder / "run"
        stop_after(train(folder), run, 70, signal.SIGKILL)
        killed = last_step(run)
        stop_after(train(folder, "--resume"), run, 130, signal.SIGTERM)
        last = train(folder, "--resume")
        print(last.communicate(timeout=300)[0].splitlines()[-1], f"(exit status {last.returncode})")
        wanted = expected(run)
        assert set(wanted["loss/total"]) == set(range(1, STEPS + 1)), "metrics.jsonl lacks a step"
        readers: dict[str, Callable[[Path, Points], Points]] = {
            "tensorboard": tensorboard_points,
            "wandb": wandb_points,
            "trackio": trackio_points,
        }
        failed = False
        for tracker, read in readers.items():
            print(tracker)
            problems = list(differences(wanted, read(folder, wanted)))
            failed |= any("lacks" not in problem or tracker == "tensorboard" for problem in problems)
            for problem in problems or [f"all {STEPS} steps and 6 validations once, values as in metrics.jsonl"]:
                print(f"  {problem}")
        print(f"SIGKILL came after step {killed}; checkpoints are {CHECKPOINT_EVERY} steps apart")
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
