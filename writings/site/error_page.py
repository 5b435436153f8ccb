"""The index of error messages as Markdown: a section for each topic, an entry for each message."""

import html
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from writings.site.error_index import CLOSE, OPEN, ErrorMessage, error_messages


@dataclass(frozen=True)
class Topic:
    """Errors of some files.

    Fields:
        name: heading.
        paths: of files or folders, relative to the package; the longest that fits a message is its topic.
        meaning: what these errors have in common, and what helps.
    """

    name: str
    paths: tuple[str, ...]
    meaning: str


TOPICS = (
    Topic(
        "Configs and model specs",
        (
            "core/config",
            "core/spec",
            "core/training/check_routers.py",
            "core/runs/init_from.py",
            "core/distributed/mesh.py",
        ),
        "A value of the YAML config is impossible, or two do not fit. The message begins with the path of the value "
        "(`model.layers[0].moe.router.top_k`) and names the file. `moezoo schema` gives editors completion and checks; "
        "`moezoo zoo --list` has an example config of each part. See [transformer](../transformer.md) and "
        "[routing](../routing.md).",
    ),
    Topic(
        "Grammars of synthetic text",
        ("core/data/grammar",),
        "A grammar file of a dataset has a rule that cannot be parsed or whose entropy cannot be computed. See "
        "[exact_entropy](../exact_entropy.md).",
    ),
    Topic(
        "Data",
        ("core/data", "core/tokens.py", "core/reference/losses.py"),
        "A text, shard, dataset or conversation is missing, damaged, too short, or does not fit the model. "
        "`moezoo preview CONFIG` shows what a config reads. See [data](../data.md) and [chat_data](../chat_data.md).",
    ),
    Topic(
        "Tokenizers and chat templates",
        (
            "core/data/tokenizers.py",
            "core/data/tokenizer_files.py",
            "core/data/huggingface_tokenizer.py",
            "core/data/load_tokenizer.py",
            "core/data/chat_template.py",
            "core/limited_process.py",
        ),
        "A tokenizer cannot be read, or cannot encode a text; a chat template is missing or fails. See "
        "[chat_data](../chat_data.md).",
    ),
    Topic(
        "Run folders",
        ("core/runs", "core/doctor", "core/reports", "core/trackers", "core/training/metric_columns.py"),
        "A run folder is missing, in use, damaged, or does not fit what is asked of it. `moezoo runs` lists runs; "
        "`moezoo doctor RUN` says what is wrong with one. See [runs](../runs.md) and [reliability](../reliability.md).",
    ),
    Topic(
        "Checkpoints",
        ("core/checkpoint", "jax_backend/distributed/checkpoint_writer.py", "core/files.py"),
        "A file of weights is missing, damaged, or does not fit the model. Nothing is read from a damaged checkpoint; "
        "an older one of the run may be whole. See [checkpoints](../checkpoints.md).",
    ),
    Topic(
        "Published checkpoints",
        (
            "core/huggingface",
            "core/hub.py",
            "core/runs/convert_layout.py",
            "core/runs/adapters.py",
            "core/runs/base.py",
        ),
        "A Hugging Face folder, a hub id or an adapter cannot be read, or has a field or tensor that is not supported: "
        "an unknown one is refused rather than ignored. See [huggingface](../huggingface.md) and "
        "[adapter](../adapter.md).",
    ),
    Topic(
        "Quantization",
        ("core/quantization", "core/huggingface/mlx_quantization.py", "core/huggingface/quantized_tensors.py"),
        "Codes and scales do not fit each other, or a format is not supported. See [quantization](../quantization.md).",
    ),
    Topic(
        "Memory",
        ("core/cost", "cli/failures.py"),
        "What is asked for needs more memory than is free; the message has both numbers. Use a smaller batch or "
        "sequence, `training.rematerialize`, bfloat16, or a mesh; `moezoo describe` and `moezoo plan` show what takes "
        "it, and `--allow-overcommit` tries all the same. See [cost](../cost.md).",
    ),
    Topic(
        "Training",
        ("core/training", "core/reference", "core/random.py", "api/run.py", "api/ready_run.py"),
        "Training cannot go on: the loss is not finite, a gradient is damaged, or the disk is full. The last good "
        "checkpoint is kept. See [optimizer](../optimizer.md) and [reliability](../reliability.md).",
    ),
    Topic(
        "Generation, chat and models in Python",
        ("core/generation", "core/backend.py", "core/errors.py", "api", "core/reference/sampling.py", "__init__.py"),
        "A prompt, an option of sampling or a sequence is one that the model cannot take. See "
        "[generation](../generation.md) and [sampling](../sampling.md).",
    ),
    Topic(
        "lm-eval",
        ("evaluation_harness",),
        "An option of `--model_args`, or of a task's generation, that the model cannot follow. See "
        "[evaluation_harness](../evaluation_harness.md).",
    ),
    Topic(
        "Serving",
        ("server", "cli/serve.py"),
        "The server refuses a request, with this text in OpenAI's error object. See [serving](../serving.md).",
    ),
    Topic(
        "Traces, analysis and interventions",
        (
            "core/traces",
            "core/analysis",
            "core/explorer",
            "core/interventions",
            "core/comparison",
            "core/layer_routing.py",
        ),
        "A trace is damaged or does not belong to this model and data, or an expert is named that is not there. See "
        "[traces](../traces.md), [trace_formats](../trace_formats.md) and [interventions](../interventions.md).",
    ),
    Topic(
        "Backends and devices",
        ("backends.py", "core/distributed", "jax_backend", "mlx_backend", "core/extras.py"),
        "A backend or package is not installed, a device is missing, or processes do not find each other. "
        "`moezoo --version` says what is installed. See [scaling](../scaling.md).",
    ),
    Topic(
        "Parity checks",
        ("core/parity",),
        "Implementations cannot be compared on this model. See [parity](../parity.md).",
    ),
    Topic(
        "Parameters",
        ("core/parameters",),
        "Parameters do not have the names or shapes that the spec gives them. See [architecture](../architecture.md).",
    ),
    Topic("Benchmarks", ("bench", "cli/bench.py"), "A benchmark cannot be run as asked. See [bench](../bench.md)."),
    Topic(
        "Command line",
        ("cli",),
        "An option does not fit the others, or a file. [Command line](command_line.md) lists all options.",
    ),
)


def topic_of(path: str) -> Topic:
    """Return the topic of a file of the package. Raises LookupError: it has none."""
    folders = [path, *map(str, PurePosixPath(path).parents)]
    for folder in folders:
        for topic in TOPICS:
            if folder in topic.paths:
                return topic
    raise LookupError(f"{path} belongs to no topic of the error index; add it to TOPICS in writings/site/error_page.py")


def error_page(repository: str) -> str:
    """Return the index; `repository` is the address of the package's folder, where links to code lead."""
    by_topic: dict[str, list[ErrorMessage]] = {topic.name: [] for topic in TOPICS}
    for message in error_messages():
        by_topic[topic_of(message.path).name].append(message)
    lines = []
    for topic in TOPICS:
        lines += [f"## {topic.name}", topic.meaning]
        ordered = sorted(by_topic[topic.name], key=lambda message: re.sub(r"[^a-z ]", "", message.text.lower()))
        lines += [_entry(message, repository) for message in ordered]
    return "\n\n".join(lines)


def _entry(message: ErrorMessage, repository: str) -> str:
    doing = f": {html.escape(_plain(message.doing))}" if message.doing else ""
    where = f"{message.path.removesuffix('.py').replace('/', '.')}.{message.function}".rstrip(".")
    problem, _, advice = message.text.partition(". ")
    do = f'<p class="do"><strong>What to do:</strong> {_shown(advice)}</p>' if advice else ""
    link = f'<a class="headerlink" href="#{message.anchor}" title="Permanent link">&para;</a>'
    return (
        f'<div class="error"><h3 id="{message.anchor}">{_shown(message.stem)}{link}</h3>'
        f'<p class="message"><code>{message.kind}: {_shown(problem.rstrip("."))}.</code></p>{do}'
        f'<p class="from">From <a href="{repository}/{message.path}#L{message.line}"><code>{where}</code></a>{doing}'
        "</p></div>"
    )


def _shown(text: str) -> str:
    return html.escape(text, quote=False).replace(OPEN, "<var>").replace(CLOSE, "</var>")


def _plain(text: str) -> str:
    return text.replace("`", "")
