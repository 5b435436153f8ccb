"""Text in and text out, streams, and the words by which a model and the package present themselves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import moezoo
from moezoo.core.errors import DataError, RunError, SpecError, TokenizerError


@pytest.fixture(scope="module")
def model(owls: Path) -> moezoo.LoadedModel:
    return moezoo.load(owls / "runs" / "owls", "mlx")


def test_the_text_of_a_text_is_that_of_its_ids(model: moezoo.LoadedModel) -> None:
    ids = model.generate(model.encode_prompt("3 owls saw")[None], max_new_tokens=9)
    text = model.generate("3 owls saw", max_new_tokens=9)
    assert (type(text), text) == (str, model.tokenizer.decode(ids[0]))
    assert model.generate(["3 owls saw", "12 o"], max_new_tokens=9)[0] == text
    assert model.generate(("3 owls saw",), max_new_tokens=9) == [text]


def test_a_stream_has_the_pieces_of_what_is_generated(model: moezoo.LoadedModel) -> None:
    prompts, options = ["3 owls saw", "12 o"], {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    columns = list(zip(*model.generate(prompts, stream=True, **options), strict=True))
    assert ["".join(column) for column in columns] == model.generate(prompts, **options)
    ids = np.array([[0, 1], [2, 3]])
    streamed = np.stack(list(model.generate(ids, stream=True, **options)), axis=1)
    np.testing.assert_array_equal(streamed, model.generate(ids, **options))


def test_a_wrong_argument_is_an_error_of_one_line(model: moezoo.LoadedModel) -> None:
    whole = model.generate("3 owls", max_new_tokens=9)
    assert model.generate("3 owls", max_new_tokens=9, stop=whole[3:6]) == whole.partition(whole[3:6])[0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"stop": [5]}, "stop is"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'; expected an integer >= 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ]
    for settings, message in wrong:
        with pytest.raises(SpecError, match=re.escape(message)):
            model.generate("3 owls", **settings)
    with pytest.raises(DataError, match=r"tokens is object \[2\]; expected integers"):
        model.forward(cast(Any, [[1, 2], [3]]))


def test_wrong_sizes_modes_and_data_are_errors_of_one_line(model: moezoo.LoadedModel, owls: Path) -> None:
    text = str(owls / "text.txt")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: moezoo.load(model.path, max_length=0), "max_length is 0; expected an integer >= 1"),
        (lambda: model.trace(text, sequence_length=0), "sequence_length is 0; expected an integer >= 1"),
        (lambda: model.trace(text, batch_size=-1), "batch_size is -1"),
        (lambda: model.trace([]), "a trace needs data; got none"),
        (lambda: model.forward(cast(Any, [[1]]), without="layers[1]", mode=cast(Any, "x")), "unknown mode; got 'x'"),
    ]
    for call, message in calls:
        with pytest.raises(moezoo.MoezooError, match=re.escape(message)):
            call()


def test_a_config_is_no_model(owls: Path) -> None:
    for path in ("fables", str(owls / "owls.yaml")):
        with pytest.raises(RunError, match="is a config, not a model"):
            moezoo.load(path)
    with pytest.raises(RunError, match=r"did you mean fables\?; expected"):
        moezoo.load("fabels")


def test_models_are_compared_by_their_paths(
    owls: Path, model: moezoo.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND", "mlx")
    monkeypatch.setattr("moezoo.core.comparison.result.compare_loaded", lambda a, b, *_, **__: (a, b))
    a, b = cast(Any, moezoo.compare(model.path, model, owls / "text.txt"))
    assert (a.path, b) == (model.path, model)


def test_a_text_ends_before_its_end_token(model: moezoo.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model.generate("3 owls saw", max_new_tokens=9)
    end = int(model.tokenizer.encode(text[4])[0])
    monkeypatch.setattr(type(model), "end_tokens", lambda self, chat=False: (end,))
    assert model.generate("3 owls saw", max_new_tokens=9) == text[: text.index(text[4])]


def test_a_model_without_template_does_not_chat(model: moezoo.LoadedModel) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        model.chat("Hello")


def test_a_model_says_its_source_parts_size_and_backend(model: moezoo.LoadedModel) -> None:
    assert repr(model) == (
        f"<LoadedModel {model.path}, step 8: 2 layers of width 20, 2 of 5 experts; 11.2 k parameters, 6.92 k active; "
        "mlx>"
    )


def test_the_package_lists_its_public_names() -> None:
    assert dir(moezoo) == sorted([*moezoo.__all__, "__version__"])
    assert all(hasattr(moezoo, name) for name in dir(moezoo))
