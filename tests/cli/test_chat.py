"""A conversation: its answers are those of a model that reads everything, its caches keep what was said."""

import json
import os
import signal

import numpy as np
import pytest
from click.testing import CliRunner

import moezoo
from moezoo.api.conversation import Conversation
from moezoo.cli.chat import until_interrupt
from moezoo.cli.main import main
from moezoo.core.generation.session import shared_length
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint

# Of what an assistant said, later prompts have the beginning only, as if the rest were thinking.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>"
    "{{ message.content[:4] if message.role == 'assistant' and forgets else message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("chat"), "mixtral")


def written(folder, case):
    require_backend("mlx")
    return write_tokenizer(write_checkpoint(case, folder / case), template=TEMPLATE)


@pytest.mark.parametrize(
    ("case", "forgets"),
    [
        ("mixtral", True),
        ("qwen3_next", True),
        pytest.param("mixtral", False, marks=pytest.mark.release),
        pytest.param("qwen3_next", False, marks=pytest.mark.release),
    ],
)
def test_answers_are_those_to_the_whole_conversation(case, forgets, tmp_path):
    model = moezoo.load(written(tmp_path, case), backend="mlx")
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    chat = Conversation(model, system="the mat", template={"forgets": forgets}, **settings)
    prompt = said = new = np.zeros(0, np.int32)
    for text in ("the cat", "the owl saw them", "the dog ran"):
        keep, held = len(prompt) - 1, len(said) - (len(new) == 6)  # the last of 6 tokens is not read
        before, answer = list(chat.messages), "".join(chat.say(text))
        prompt = model.encode_chat([*before, {"role": "user", "content": text}], forgets=forgets)
        common = shared_length(said, prompt)
        new = model.generate(prompt[None], chat=True, **settings)[0]
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
        whole = model.tokenizer.decode(np.concatenate([prompt, new]))
        assert answer == whole.removeprefix(model.tokenizer.decode(prompt)).split("<end>")[0]
        if case == "qwen3_next" and 0 < common < held:
            assert chat.session.num_shared == keep  # where the answer is introduced
        else:
            assert chat.session.num_shared == min(common, held)
        assert chat.session.num_read == len(prompt) - chat.session.num_shared
        said = np.concatenate([prompt, new])


def test_lines_are_messages_and_lines_are_answers(folder):
    chat = Conversation(moezoo.load(folder, backend="mlx"), max_new_tokens=5, temperature=0.0)
    answers = ["".join(chat.say(text)) for text in ("the cat", "the owl")]
    words = ["chat", str(folder), "--backend", "mlx", "--max-new-tokens", "5", "--temperature", "0"]
    result = CliRunner().invoke(main, words, input="the cat\n\nthe owl\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    wrong = CliRunner().invoke(main, [*words, "--set-template", "x"])
    assert wrong.stderr.startswith("DataError: --set-template is 'x'; expected NAME=VALUE")


def test_generate_sets_variables_of_the_template(folder, tmp_path):
    model, prompts = moezoo.load(folder, backend="mlx"), tmp_path / "prompts.jsonl"
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the owl saw"}]
    messages = [*said, {"role": "user", "content": "the dog"}]
    prompts.write_text(json.dumps({"messages": messages}))
    words = ["generate", str(folder), "--backend", "mlx", "--max-new-tokens", "5", "--temperature", "0", "--json"]
    for forgets in (True, False):
        asked = [*words, "--prompts", str(prompts), "--set-template", f"forgets={str(forgets).lower()}"]
        sample = json.loads(CliRunner().invoke(main, asked).stdout)
        ids = model.encode_chat(messages, forgets=forgets)
        assert sample["tokens"] == model.generate(ids[None], max_new_tokens=5, chat=True, temperature=0.0)[0].tolist()
    wrong = CliRunner().invoke(main, [*words, "--prompt", "the cat", "--set-template", "forgets=true"])
    assert wrong.stderr.startswith("DataError: --set-template is for a chat; got no chat; expected --chat too")


def test_ctrl_c_ends_an_answer_after_its_token_and_what_was_said_is_kept(folder):
    chat = Conversation(moezoo.load(folder, backend="mlx"), max_new_tokens=20, temperature=0.0)
    whole, handler, shown = "".join(chat.say("the cat")), signal.getsignal(signal.SIGINT), []
    chat = Conversation(moezoo.load(folder, backend="mlx"), max_new_tokens=20, temperature=0.0)
    pieces = chat.say("the cat")
    for number, piece in enumerate(until_interrupt(pieces)):
        shown.append(piece)
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
    pieces.close()
    assert len(shown) == 3
    assert chat.messages[-1]["content"] == "".join(shown)
    assert whole.startswith("".join(shown))
    assert signal.getsignal(signal.SIGINT) is handler
    "".join(chat.say("the owl"))
    assert chat.session.num_shared >= 4


def test_a_second_ctrl_c_does_not_wait():
    def pieces():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield "never"

    with pytest.raises(KeyboardInterrupt):
        list(until_interrupt(pieces()))
