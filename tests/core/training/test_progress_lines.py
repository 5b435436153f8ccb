"""Progress of `moezoo.train`: in a notebook, bars that are one output each; messages below them."""

import sys
from types import ModuleType
from typing import Any

import pytest

from moezoo.core.training.metrics import StepRecord
from moezoo.core.training.progress_lines import LineReporter, NotebookReporter, python_reporter


class Outputs(ModuleType):
    """A replacement for `IPython.display` that keeps the content of each output, and how often it was set."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.shown: list[dict[str, str]] = []
        self.updates = 0

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.shown.append(content)
        outputs, place = self, len(self.shown) - 1

        class Handle:
            def update(self, content: dict[str, str], *, raw: bool) -> None:
                assert raw
                outputs.shown[place] = content
                outputs.updates += 1

        return Handle()


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Outputs:
    fake = Outputs()
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    return fake


def record(step: int) -> StepRecord:
    return StepRecord(step, 0, {"loss": 1.0, "cross_entropy": 1.0}, 1.0, 1e-3, None)


def test_a_notebook_has_bars_and_other_places_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(python_reporter(), LineReporter)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert isinstance(python_reporter(), NotebookReporter)


def test_training_and_each_validation_are_one_output_with_the_last_state(
    outputs: Outputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = NotebookReporter()
    reporter.start(0, 40)
    assert outputs.shown[0]["text/plain"] == "compiling and running step 1 ..."
    for step in range(1, 41):
        reporter.step(record(step))
    for _ in range(2):
        for done in (0, 4, 8):
            reporter.progress("evaluating", done, 8)
    reporter.message("validation loss <1")
    reporter.stop()
    assert [content["text/plain"].split("  eta")[0] for content in outputs.shown] == [
        "step     40/40",
        "evaluating: 8 of 8 windows",
        "evaluating: 8 of 8 windows",
    ]
    assert outputs.shown[0]["text/html"].startswith('<progress value="40" max="40"')
    assert outputs.updates < 20  # not each of 40 steps, which take less than a fifth of a second
    assert capsys.readouterr().out == "validation loss <1\n"


def test_a_finished_run_has_no_bar_of_training_and_text_is_no_markup(outputs: Outputs) -> None:
    reporter = NotebookReporter()
    reporter.start(40, 40)
    reporter.progress("<b>", 1, None)
    assert [content["text/html"] for content in outputs.shown] == ["<code>&lt;b&gt;: 1 windows</code>"]
