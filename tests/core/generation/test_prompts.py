"""Prompts of files."""

import pytest

from moezoo.core.errors import DataError
from moezoo.core.generation.prompts import Prompt, read_prompts


def test_lines_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("3 owls\r\n\n {a \u2028b\n".encode())
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"))] == ["3 owls", " {a \u2028b"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"prompt": "3\\nowls"}\n\n{"prompt": "x", "id": 4}\n')
    assert read_prompts(str(lines)) == [Prompt("3\nowls"), Prompt("x")]
    assert read_prompts(str(lines))[0].title == "3 owls"
    lines.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    (prompt,) = read_prompts(str(lines))
    assert prompt.title == "hello"
    assert [each["role"] for each in prompt.conversation("be brief")] == ["system", "user"]
    own = Prompt(messages=[{"role": "system", "content": "long"}, {"role": "user", "content": "hello"}])
    assert own.conversation("be brief") == own.messages


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "file has no prompts"),
        ('{"text": "a"}', "line is no prompt; got the keys"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": 3}', "field 'prompt' is not a text"),
        ('{"messages": []}', "messages is list"),
        ('{"prompt": "a"}\n{"messages": [{"role": "user"}]}', "file mixes prompt and messages"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, content, error):
    lines = tmp_path / "a.jsonl"
    lines.write_text(content)
    with pytest.raises(DataError, match=error):
        read_prompts(str(lines))
