"""Chat templates: the text that transformers renders, and bounds for a hostile template."""

import datetime
import time

import pytest

from moezoo.core.data import chat_template
from moezoo.core.data.chat_template import render_chat, render_request
from moezoo.core.limited_process import LimitedProcess, LimitedProcessError

MESSAGES = [
    {"role": "system", "content": "Be brief.", "name": None},
    {"role": "user", "content": [{"type": "text", "text": "<b>ä</b> & 'x'"}]},
    {"role": "assistant", "content": "  yes ", "reasoning": "because", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "user", "content": "why?\n"},
]
FEATURES = """
{%- set ns = namespace(first=true, n=0) %}
{{ bos_token }}
{% for message in messages %}
  {%- if message.content is string %}
    <|{{ message['role'] }}|>{{ message.content | trim }}
  {%- else %}
    {{- message.content | tojson(indent=1) }}{{ message.name is defined }}
  {%- endif %}
  {%- if message.role == 'assistant' %}
    {% generation %}{{ message.reasoning_content ~ message.thinking }}{% endgeneration %}
    {{- message.tool_calls | tojson }}
    {%- continue %}
  {%- endif %}
  {%- set ns.n = ns.n + 1 %}
{% endfor %}
{{ dict(a=1) | tojson }}{{ strftime_now('%Y') }}{{ ns.n }}{{ tools is none }}{{ range(3) | list }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def test_a_template_renders_as_in_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    spoken = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]
    (theirs,), _ = render_jinja_template([spoken], chat_template=FEATURES, add_generation_prompt=True, bos_token="<s>")
    assert render_chat(FEATURES, MESSAGES, {"bos_token": "<s>"}) == theirs
    assert str(datetime.date.today().year) in theirs


HOSTILE = {
    "time": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 3000000000 }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "width": "{{ '%2000000000d' % 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{" + "[" * 5000 + "]" * 5000 + "}}",
    "syntax": "{% for",
    "file": "{% include '/etc/passwd' %}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "own words": "{{ raise_exception('no\nsystem ' * 999) }}",
    "surrogate": "{{ '\\ud800' }}{{ messages[0].nope.x }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line_in_bounded_time_and_memory(name, monkeypatch):
    if name == "time":
        short = LimitedProcess("moezoo.core.data.chat_template:render_request", seconds=0.1)
        monkeypatch.setattr(chat_template, "_process", lambda: short)
    started = time.monotonic()
    with pytest.raises(LimitedProcessError) as caught:
        render_chat(HOSTILE[name], MESSAGES, {})
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_very_long_conversation_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_CHARACTERS", 99)
    with pytest.raises(ValueError, match="the conversation has 100 characters; expected at most 99"):
        render_request({"template": "{{ 'a' * 100 }}", "messages": [], "variables": {}})
