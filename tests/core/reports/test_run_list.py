"""`moezoo runs`: which folders are runs, in which state, and what is said about damaged ones."""

import json
import os
import re
from pathlib import Path

from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.reports.run_list import list_runs
from moezoo.core.runs.run_lock import RunLock
from moezoo.core.runs.sessions import append_line, read_sessions
from tests.support.made_run import made_run


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["runs", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_runs_are_listed_with_their_state_and_losses(tmp_path: Path) -> None:
    made = made_run()
    made.lines[-1]["loss"] = 1.25
    finished = made.write(tmp_path / "finished")
    append_line(finished, {"started": "2026-11-30T04:00:00+00:00", "command": "moezoo train a"})
    append_line(finished, {"ended": "2026-11-30T05:00:00+00:00", "last_step": 400})
    made.lines = made.lines[:10]
    (tmp_path / "more").mkdir()
    made.write(tmp_path / "more" / "running")
    made.write(tmp_path / "stopped")
    for age, name in enumerate(("stopped", "finished", "more/running")):
        os.utime(tmp_path / name / "metrics.jsonl", (10**9 + 3600 * age,) * 2)
    lock = RunLock(tmp_path / "more" / "running" / "lock.json")
    listed = json.loads(call(tmp_path, "--json")[1])["runs"]
    lock.release()
    assert [(run["name"], run["state"], run["step"], run["steps"]) for run in listed] == [
        ("more/running", "running", 100, 400),
        ("finished", "finished", 400, 400),
        ("stopped", "stopped", 100, 400),
    ]
    assert (listed[1]["loss"], listed[1]["validation"], listed[1]["sessions"]) == (1.25, None, 1)
    assert listed[1]["session"]["command"] == "moezoo train a"
    assert listed[1]["session"]["last_step"] == 400
    assert re.search("finished +finished +400 of 400 +1.2500 ", call(tmp_path)[1])
    assert [run.name for run in list_runs(finished).runs] == ["finished"]


def test_damaged_runs_have_a_line_each_and_obey_no_terminal(tmp_path: Path) -> None:
    made = made_run()
    for name in ("config", "metrics", "sessions", "x\x1b[b]"):
        made.write(tmp_path / name)
    (tmp_path / "config" / "config.yaml").write_text("model: 3")
    (tmp_path / "metrics" / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n{"step": 5')
    (tmp_path / "sessions" / "sessions.jsonl").mkdir()
    (tmp_path / "not_a_run").mkdir()
    (tmp_path / "not_a_run" / "config.yaml").write_text("model: 3")
    code, out, err = call(tmp_path)
    assert code == 0
    states = sorted(line.split()[1] for line in out.strip().splitlines()[2:])
    assert states == ["damaged", "finished", "finished", "stopped"]
    assert "x\\x1b[b]" in out
    assert "\x1b" not in out + err
    assert len(err.splitlines()) == 3
    assert call(tmp_path / "not_a_run")[1].startswith("no runs below")
    assert call(tmp_path / "nowhere")[0] == 1


def test_a_session_after_half_a_line_begins_a_new_line(tmp_path: Path) -> None:
    (tmp_path / "sessions.jsonl").write_bytes(b'{"started": "a"}\n{"start')
    append_line(tmp_path, {"started": "b"})
    problems: list[str] = []
    assert [session["started"] for session in read_sessions(tmp_path, problems)] == ["a", "b"]
    assert len(problems) == 1
