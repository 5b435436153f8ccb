"""The site's index of errors has every message of the code, and its option tables every option."""

import ast
import re
from collections.abc import Callable

import click
import pytest

import moezoo
from moezoo.cli.main import main
from moezoo.core.config.validate import validate
from moezoo.core.errors import MoezooError
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.spec import MoESpec
from writings.site.error_index import PACKAGE, ErrorMessage, builds_error, error_messages, messages_of, source
from writings.site.error_page import TOPICS, error_page, topic_of
from writings.site.option_tables import option_tables

# Errors whose text is that of another error, which is in the index.
PASSED_ON = {
    "core/config/validate.py:validate",
    "core/data/huggingface_tokenizer.py:HuggingFaceTokenizer.encode_turns",
    "core/data/token_cache.py:_read_signed",
    "core/data/token_cache.py:_verify",
    "core/limited_process.py:LimitedProcess.call",
    "core/traces/trace_file.py:_Columns.read",
    "core/traces/trace_file.py:open_trace",
    "server/requests.py:_Fields._sampling",
}


LAYER = {"num_experts": 7, "experts": {"hidden_dim": 8}}


@pytest.fixture(scope="module")
def messages() -> list[ErrorMessage]:
    return error_messages()


def test_every_error_of_the_code_is_in_the_index() -> None:
    without, built = set(), set()
    for path, function, node in source().calls:
        if not isinstance(node, ast.Call):
            continue
        if (builder := source().builder(node, path)) is not None:
            built.add((builder.path, builder.name))
        makes_error = isinstance(node.func, ast.Name) and node.func.id in source().errors
        if makes_error and not (function and builds_error(function)) and not list(messages_of(path, function, node)):
            without.add(f"{path}:{function.name if function else ''}")
    assert without == PASSED_ON
    builders = {(each.path, each.name) for named in source().functions.values() for each in named if builds_error(each)}
    assert builders == built


def test_every_message_has_a_topic_and_a_place_of_its_own(messages: list[ErrorMessage]) -> None:
    assert {topic_of(message.path) for message in messages} == set(TOPICS)
    assert [path for topic in TOPICS for path in topic.paths if not (PACKAGE / path).exists()] == []
    anchors = [message.anchor for message in messages]
    assert len(set(anchors)) == len(anchors) > 700
    page = error_page("https://example.org")
    assert all(f'<h3 id="{anchor}">' in page for anchor in anchors)


FAILING: dict[str, Callable[[], object]] = {
    "an impossible value": lambda: validate(MoESpec, LAYER | {"router": {"top_k": 9}}, "mine.yaml"),
    "an unknown key": lambda: validate(MoESpec, LAYER | {"routre": {}}, "mine.yaml"),
    "a missing folder": lambda: moezoo.load("no/such/run"),
    "an option out of range": lambda: SamplingOptions(temperature=-1.0),
}


@pytest.mark.parametrize("call", FAILING.values(), ids=FAILING)
def test_an_error_as_it_is_printed_fits_its_message(call: Callable[[], object], messages: list[ErrorMessage]) -> None:
    with pytest.raises(MoezooError) as caught:
        call()
    line = f"{caught.type.__name__}: {str(caught.value).splitlines()[0]}"
    assert [message for message in messages if message.kind in line and message.pattern.fullmatch(line)], line


def test_the_python_page_has_every_public_name() -> None:
    page = (PACKAGE.parent / "writings" / "reference" / "python.md").read_text(encoding="utf-8")
    named = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert set(moezoo.__all__) - {MoezooError.__name__} <= named  # errors are on it by their module


def test_option_tables_have_every_option_and_no_html_of_a_help_text() -> None:
    tables = option_tables()
    sections = dict(re.findall(r"^## moezoo ([\w-]+)\n(.*?)(?=^## |\Z)", tables, re.DOTALL | re.MULTILINE))
    assert list(sections) == list(main.commands)
    for name, command in main.commands.items():
        options = [flag for each in command.params if isinstance(each, click.Option) for flag in each.opts]
        assert [flag for flag in options if f"`{flag}`" not in sections[name]] == []
    assert "<" not in re.sub(r"`[^`]*`", "", tables)
