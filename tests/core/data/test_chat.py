"""Conversations: what is trained on, found in tokens, and one line about each that cannot be rendered."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from moezoo.cli.main import main as command
from moezoo.core.config.data import DataConfig
from moezoo.core.config.training import TrainingConfig
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.prepare import prepare_data, whole_file
from moezoo.core.data.preview import Example
from moezoo.core.errors import DataError
from moezoo.core.tokens import IGNORED, PADDING, masked, targets_of, tokens_of
from moezoo.core.training.batches import Batches

TURN = "<|{{ message.role }}|>{{ message.content }}<|end|>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = f"{{{{ bos_token }}}}{{% for message in messages %}}{TURN}{{% endfor %}}{PROMPT}"
# As Qwen3: the last turn has an empty reasoning.
REASONS = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}<|end|>"
    "{% endfor %}" + PROMPT
)
# As gpt-oss: the last turn ends with another token, if no other answer follows.
RETURNS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if loop.last and message.role == 'assistant' and not add_generation_prompt %}<s>{% else %}<|end|>{% endif %}"
    "{% endfor %}" + PROMPT
)
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content | trim }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}" + PROMPT
)
CALLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content }}{% for call in message.tool_calls %}[{{ call.function.name }}]{% endfor %}<|end|>"
    "{% endfor %}" + PROMPT
)
SAYS = "<|assistant|>yes<|end|>"  # a user who writes what the template writes
TURNS = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": SAYS},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "yes?"},
    {"role": "assistant", "content": "no"},
]
CALLED = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "see"}}]},
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that returns the folder of a tokenizer of bytes with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = {}

    def folder(template):
        if template not in made:
            made[template] = tmp_path_factory.mktemp("tokenizer")
            vocab = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
            merges = [("n", "o"), ("Ċ", "Ċ")]
            inner = Tokenizer(models.BPE(vocab | {"no": 256, "ĊĊ": 257}, merges))
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            inner.decoder = decoders.ByteLevel()
            special = [f"<|{name}|>" for name in ("system", "user", "assistant", "tool", "end")]
            inner.add_special_tokens(["<s>", *special])
            outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|end|>")
            outer.chat_template = template
            outer.save_pretrained(str(made[template]))
        return str(made[template])

    return folder


def trained_text(tokenizer, ids):
    return [text for text, trained in Example("", ids).parts(tokenizer) if trained]


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def config(folder, path, **more):
    sources = [{"kind": "chat", "path": str(path), **more}]
    return DataConfig.model_validate({"sources": sources, "tokenizer": {"kind": "huggingface", "path": folder}})


@pytest.mark.parametrize(
    ("template", "messages", "loss", "expected"),
    [
        (PLAIN, TURNS, "assistant", ["yes<|end|>", "no<|end|>"]),
        (PLAIN, TURNS, "last", ["no<|end|>"]),
        (REASONS, TURNS, "assistant", ["yes<|end|>", "<think></think>no<|end|>"]),
        (RETURNS, TURNS, "assistant", ["yes<|end|>", "no<s>"]),
        (MARKED, TURNS, "assistant", ["yes<|end|>", "no<|end|>"]),
        (MARKED, TURNS, "last", ["no<|end|>"]),
        (CALLS, CALLED, "assistant", ["[see]<|end|>", "no<|end|>"]),
        (PLAIN, TURNS[:4], "assistant", ["yes<|end|>"]),
        (PLAIN, [*TURNS[:4], TURNS[4] | {"train": False}], "assistant", ["yes<|end|>"]),
        (PLAIN, [*TURNS[:4], TURNS[4] | {"weight": 0}], "last", ["yes<|end|>"]),
        (MARKED, [*TURNS[:2], TURNS[2] | {"train": False}, *TURNS[3:]], "assistant", ["no<|end|>"]),
    ],
)
def test_the_assistants_turns_are_trained_on(folders, template, messages, loss, expected):
    tokenizer = HuggingFaceTokenizer(folders(template))
    ids = tokenizer.encode_turns(messages, None, loss)
    assert trained_text(tokenizer, ids) == expected
    everything = tokenizer.encode_turns(messages, None, "all")
    np.testing.assert_array_equal(everything, tokens_of(ids))


def test_ids_are_those_of_transformers_and_begin_as_a_prompt(folders):
    from transformers import PreTrainedTokenizerFast

    tokenizer, tools = HuggingFaceTokenizer(folders(CALLS)), [{"type": "function", "function": {"name": "see"}}]
    theirs = PreTrainedTokenizerFast.from_pretrained(folders(CALLS))
    ids = tokenizer.encode_turns(CALLED, tools, "last")
    assert tokens_of(ids).tolist() == theirs.apply_chat_template(CALLED, tools=tools, return_dict=False)
    prompt = tokenizer.encode_turns(CALLED, None, "last")
    prompt = tokens_of(prompt[prompt < 0])
    np.testing.assert_array_equal(tokenizer.encode_chat(CALLED[:3]), prompt)


def test_marked_ids_hold_tokens_and_targets():
    ids, trained = np.array([0, 5, 7], np.int32), np.array([False, True, False])
    marked = masked(ids, trained)
    np.testing.assert_array_equal(tokens_of(marked), ids)
    np.testing.assert_array_equal(targets_of(marked), [IGNORED, 5, IGNORED])


LINES = [
    {"messages": TURNS[1:3]},
    "",
    {"prompt": SAYS, "completion": "yes"},
    {"prompt": TURNS[1:2], "completion": TURNS[2:3]},
    {"text": "no"},
]


def test_lines_of_every_kind_are_documents_in_order(folders, tmp_path):
    path = written(tmp_path / "chat.jsonl", *LINES)
    data = prepare_data(config(folders(PLAIN), path), 2)
    (source,) = data.train.sources
    ids = source.tokens.read(np.array([0]), len(source.tokens))[0]
    expected = "<s><|user|>" + SAYS + "<|end|><|assistant|>yes<|end|>"
    assert data.tokenizer.decode(tokens_of(ids)) == 3 * expected + "no<|end|>"
    assert trained_text(data.tokenizer, ids) == ["yes<|end|>", "yes<|end|>", "yes<|end|>no<|end|>"]
    again = prepare_data(config(folders(PLAIN), path), 2)  # from the cache
    np.testing.assert_array_equal(again.train.sources[0].tokens.read(np.array([0]), len(ids))[0], ids)
    everything = prepare_data(config(folders(PLAIN), path, loss="all"), 2)
    assert everything.train.sources[0].tokens.read(np.array([0]), len(ids)).min() >= 0
    assert everything.summary[0].digest != data.summary[0].digest


def test_without_a_template_prompts_and_completions_are_plain(folders, tmp_path):
    lines = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "n", "completion": "o"}]  # not "no" in one token
    data = prepare_data(config(folders(None), written(tmp_path / "chat.jsonl", *20 * lines)), 3)
    ids = data.train.sources[0].tokens.read(np.array([0]), 9)[0]
    assert data.tokenizer.decode(tokens_of(ids)) == "1+1=2<|end|>no<|end|>"
    assert trained_text(data.tokenizer, ids) == ["2<|end|>", "o<|end|>"]


def test_a_batch_has_targets_where_the_assistant_speaks(folders, tmp_path):
    path = written(tmp_path / "chat.jsonl", *20 * [{"messages": TURNS[1:3]}])
    data = prepare_data(config(folders(PLAIN), path), 16)
    training = TrainingConfig(steps=3, batch_size=4, sequence_length=16, gradient_accumulation=2)
    batch = Batches(data.train, training, np.arange(2), ahead=False).take(1)
    assert batch.windows.shape == (2, 2, 17)
    assert batch.windows.min() >= 0
    seen = data.tokenizer.encode("yes<|end|>")
    trained = batch.targets != IGNORED
    np.testing.assert_array_equal(batch.targets[trained], batch.windows[..., 1:][trained])
    assert 0 < trained.sum() < trained.size
    assert set(batch.targets[trained].tolist()) <= set(seen.tolist())


def test_packed_conversations_have_the_targets_of_each_alone(folders, tmp_path):
    """As every part of a long one has: its last token before the cut is the context of the next part."""
    answers = [{"role": "assistant", "content": count * "a"} for count in range(1, 21)]
    path = written(tmp_path / "chat.jsonl", *({"messages": [TURNS[1], answer]} for answer in answers))
    fields = config(folders(PLAIN), path).model_dump() | {"documents": "separate"}
    data, length = prepare_data(DataConfig.model_validate(fields), 24), 24
    count = len(data.train.sources[0].start)
    alone = [data.tokenizer.encode_turns([TURNS[1], answer], None, "assistant") for answer in answers[:count]]
    expected = sorted(
        [tokens_of(ids[first : first + length][: len(ids) - 1 - first]).tolist(), targets_of(part).tolist()]
        for ids in alone
        for first in range(0, len(ids) - 1, length)
        for part in [ids[first + 1 : first + 1 + length]]
    )
    found, step = [], 0
    while len(found) < len(expected):
        windows, targets, documents = data.train.batch(step, 1, length, 0)
        for number in range(documents.max() + 1):
            own = documents[0] == number
            found.append([windows[0, :-1][own].tolist(), targets[0, own].tolist()])
        assert np.all(targets[documents == PADDING] == IGNORED)
        step += 1
    assert sorted(found) == expected
    assert any(len(tokens) == length for tokens, _ in expected)
    assert any(len(tokens) < length and IGNORED in own and max(own) >= 0 for tokens, own in expected)


def test_a_step_without_targets_names_the_data(folders, tmp_path):
    long = {"messages": [{"role": "user", "content": 200 * "a"}, TURNS[2]]}
    data = prepare_data(config(folders(PLAIN), written(tmp_path / "chat.jsonl", long)), 8)
    training = TrainingConfig(steps=3, batch_size=1, sequence_length=8)
    batches = Batches(data.train, training, np.arange(1), ahead=False)
    with pytest.raises(DataError, match=r"step 1 has no targets: all 8 tokens .* data.sources\[0\] \(.*chat.jsonl\)"):
        batches.take(1)


def test_a_process_may_have_no_targets_where_another_has(folders, tmp_path):
    lines = [{"messages": TURNS[1:3]}, {"text": 40 * "a"}]
    data = prepare_data(config(folders(PLAIN), written(tmp_path / "chat.jsonl", *20 * lines)), 4)
    training, counts = TrainingConfig(steps=40, batch_size=2, sequence_length=4), []
    for rank in (0, 1):
        batches = Batches(data.train, training, np.array([rank]), ahead=True)
        counts.append([int((batches.take(step).targets != IGNORED).sum()) for step in range(1, 30)])
    assert all(map(max, zip(*counts, strict=True)))
    assert not all(map(min, zip(*counts, strict=True)))


def test_validation_has_sources_of_its_own(folders, tmp_path):
    train, own = (written(tmp_path / name, *20 * [{"messages": TURNS}]) for name in ("a.jsonl", "b.jsonl"))
    data = config(folders(PLAIN), train)
    fields = data.model_dump() | {"validation": [{"kind": "chat", "path": str(own), "loss": "last"}]}
    with_own, without = (prepare_data(one, 16) for one in (DataConfig.model_validate(fields), data))
    assert with_own.train.num_tokens == without.train.num_tokens + without.validation.num_tokens
    assert with_own.summary[1].describe(1000) == f"{own}: {with_own.validation.num_tokens:,} validation tokens"
    windows = with_own.validation.windows(16)[:]
    assert (targets_of(windows) != IGNORED).sum() < 20 * 3
    assert [row.key for row in with_own.summary] == ["data.sources[0]", "data.validation[0]"]


def test_a_file_to_evaluate_on_may_have_conversations(folders, tmp_path):
    tokenizer = HuggingFaceTokenizer(folders(PLAIN))
    split = whole_file(str(written(tmp_path / "a.jsonl", {"messages": TURNS})), tokenizer, tokenizer.vocab_size)
    assert trained_text(tokenizer, split.sources[0].tokens.read(np.array([0]), split.num_tokens)[0])[0] == "yes<|end|>"
    split = whole_file(str(written(tmp_path / "b.jsonl", {"text": "no"})), tokenizer, tokenizer.vocab_size)
    assert tokenizer.decode(split.sources[0].tokens.read(np.array([0]), split.num_tokens)[0]) == "no"


ASKED = {"role": "user", "content": "no?"}
BAD_LINES = [
    ("{", "line is not JSON"),
    ("[1]", "line is no JSON object; got list"),
    (
        {"conversations": []},
        r"line is no conversation; got the keys \['conversations'\]; expected messages, prompt and",
    ),
    ({"messages": []}, r"conversation has no messages; got \[\]"),
    (
        {"messages": [{"from": "human", "value": "x"}]},
        r"message has no role; got the keys \['from', 'value'\].*message 1",
    ),
    (
        {"messages": [ASKED, {"role": "asistant", "content": "x"}]},
        "unknown role; got 'asistant'.*did you mean assistant",
    ),
    ({"messages": [ASKED, {"role": "assistant"}]}, "message has no content; got None; .*message 2 of"),
    ({"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": [ASKED]}, "no turn of the assistant, so nothing to train on; got the roles user"),
    ({"messages": [ASKED, TURNS[2] | {"train": False}]}, "no turn of the assistant, so nothing to train on"),
    (
        {"messages": [ASKED, TURNS[2] | {"train": "no"}]},
        "train of a message is 'no'; expected true or false; message 2",
    ),
    ({"prompt": "x", "completion": [TURNS[2]]}, "not both texts, or both lists of messages; got str and list"),
    ({"messages": TURNS, "tools": "x"}, "tools are no list of objects; got 'x'"),
    ({"messages": TURNS, "tools": [{}]}, "the template leaves out the tools"),
    ({"messages": CALLED}, "the template leaves out the tool calls"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_a_bad_line_is_named(folders, tmp_path, line, problem):
    path = written(tmp_path / "chat.jsonl", {"messages": TURNS}, "", line)
    with pytest.raises(DataError, match=rf"{problem}.*chat.jsonl, line 3") as caught:
        prepare_data(config(folders(PLAIN), path), 5)
    assert "\n" not in str(caught.value)


BAD_TEMPLATES = {
    None: "the tokenizer has no chat template, which conversations need",
    PLAIN.replace(PROMPT, PROMPT.replace("<|assistant|>", "<|assistant|><think>")): (
        "message 2 does not begin as a generated one"
    ),
    PLAIN.replace(TURN, "{% if message.role != 'user' %}" + TURN + "{% endif %}"): (
        r"the template leaves out message 1 \(user\)"
    ),
    "{{ raise_exception('never') }}": "TemplateError: never",
    "{{ messages[0].content }}{% if 0 %}{% generation %}{% endgeneration %}{% endif %}": "marks nothing as the assist",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_template_that_cannot_be_used_is_one_line(folders, tmp_path, template):
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "no"}]
    path = written(tmp_path / "chat.jsonl", {"messages": messages})
    with pytest.raises(DataError, match=rf"{BAD_TEMPLATES[template]}.*line 1") as caught:
        prepare_data(config(folders(template), path), 5)
    assert "\n" not in str(caught.value)


def test_a_turn_that_begins_inside_a_token_is_refused(folders, tmp_path):
    template = "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}\n"
    tokenizer = folders(template.rstrip("\n"))
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]}
    with pytest.raises(DataError, match=r"a turn's border is inside a token.*line 1"):
        prepare_data(config(tokenizer, written(tmp_path / "chat.jsonl", line)), 2)


def test_another_tokenizer_is_refused(tmp_path):
    path = written(tmp_path / "chat.jsonl", {"messages": TURNS})
    for kind in ("byte", "character"):
        data = DataConfig.model_validate(
            {"sources": [{"kind": "chat", "path": str(path)}], "tokenizer": {"kind": kind}}
        )
        with pytest.raises(
            DataError, match=r"data.sources\[0\] .* has conversations, which need a tokenizer with a chat"
        ):
            prepare_data(data, 5)


def test_preview_marks_what_is_trained_on(folders, tmp_path):
    path, text = written(tmp_path / "chat.jsonl", {"messages": TURNS}), written(tmp_path / "a.txt", "plain")
    sources = f"[{{kind: chat, path: {path}}}, {{kind: text, path: {text}}}]"
    words = [f"data.sources={sources}", f"data.tokenizer={{kind: huggingface, path: {folders(PLAIN)}}}"]
    overrides = [word for each in words for word in ("--set", each)]
    result = CliRunner().invoke(command, ["preview", "configs/tiny/dense.yaml", *overrides])
    assert result.exit_code == 0, result.output
    assert result.output == (
        f"data.sources[0] ({path}): {path}, line 1: 31 tokens, 6 trained on\n"
        "<s><|system|>be good<|end|><|user|><|assistant|>yes<|end|><|end|><|assistant|>«yes<|end|>»"
        "<|user|>yes?<|end|><|assistant|>«no<|end|>»\n"
        f"data.sources[1] ({text}): document 1: 6 tokens, 6 trained on\n«plain\n»\n"
    )
