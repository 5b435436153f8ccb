"""The Python API behind `import moezoo`: a loaded model, and its evaluation on a file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moezoo.core.backend import Backend, Model, Output, check_length
from moezoo.core.config.run_config import Config, with_compute
from moezoo.core.data.prepare import whole_file
from moezoo.core.data.token_store import Progress
from moezoo.core.data.tokenizers import HuggingFaceTokenizer, Ids, IdsLike, Tokenizer
from moezoo.core.errors import DataError, SpecError, TokenizerError
from moezoo.core.generation.config import GenerationConfig
from moezoo.core.generation.loop import generate
from moezoo.core.huggingface.layout import Layout
from moezoo.core.huggingface.nonfinite import nonfinite_warning
from moezoo.core.runs.open import open_model
from moezoo.core.runs.save import export, save_run
from moezoo.core.tokens import IGNORED, Integers
from moezoo.core.training.evaluation import Evaluation, evaluate


class LoadedModel:
    """A model with its tokenizer and config, on one backend."""

    def __init__(
        self,
        model: Model,
        config: Config,
        tokenizer: Tokenizer,
        step: int,
        problems: list[str],
        layout: Layout | None = None,
        generation: GenerationConfig | None = None,
    ):
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.step = step
        self.problems = problems  # what a person should know about the files, a line each
        self.layout = layout  # of the Hugging Face checkpoint that it is, or began from
        self.generation = (generation or GenerationConfig()).ending_with(tokenizer.end_of_text)

    def forward(self, tokens: Integers, targets: Integers | None = None) -> Output:
        """Logits, routing and, given targets, losses.

        Args:
            tokens: int32 [B, T], 0 <= token < V.
            targets: int32 [B, T], the token after each; -1 where there is none to predict.

        Returns:
            `.logits` float32 [B, T, V]; `.routing`, one per MoE layer with `.layer`, `.expert` int32 [B, T, K]
            (descending weight, ties to the lower id) and `.weight` float32 [B, T, K]; `.losses` by name.

        Raises DataError: a token outside the vocabulary, not two dimensions, or more tokens than learned positions.
        """
        checked = self._checked(tokens, "tokens")
        return self.model.forward(checked, None if targets is None else self._checked(targets, "targets", IGNORED))

    @property
    def first_token(self) -> int | None:
        """The token before every text (`<s>`) where the model was trained with one and its tokenizer puts it there."""
        if self.generation.special_tokens and isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self.tokenizer.first_token
        return None

    def encode_prompt(self, text: str, *, chat: bool = False) -> Ids:
        """Token ids of a prompt, int32 [T].

        The tokenizer of a Hugging Face folder, or of a run that began from one, adds the special tokens that it adds by
        itself; other runs were trained without.
        `chat`: the text as a user's message in the tokenizer's chat template, up to where the answer begins.

        Raises TokenizerError: a tokenizer of ids only, or without a chat template.
        """
        if chat:
            return self._tokenizer_with_template().encode_chat([{"role": "user", "content": text}])
        if self.generation.special_tokens and isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self.tokenizer.encode_with_special_tokens(text)
        return self.tokenizer.encode(text)

    def generate(
        self,
        tokens: Integers | Sequence[IdsLike],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        on_tokens: Callable[[Integers], None] | None = None,
    ) -> Integers:
        """Continue prompts int32 [B, T], or B prompts of any lengths: int32 [B, new]. Temperature 0 is greedy.

        What is None is as `self.generation` says, which a Hugging Face folder's generation_config.json fills; where
        that says nothing, 32 new tokens, greedy. It ends early when each sequence has one of `generation.end_tokens`.

        `on_tokens` is called with each new column, int32 [B]. Raises DataError as `forward`, SpecError for bad options
        and for a generation_config.json that asks for what is not done here.
        """
        rows = self._prompts(tokens)
        return generate(
            self.model,
            rows,
            max_new_tokens=self.generation.new_tokens(max_new_tokens, max(len(row) for row in rows), 32),
            options=self.generation.options(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            ),
            end_tokens=self.generation.end_tokens,
            padding=self.generation.padding,
            on_tokens=on_tokens,
        )

    def save(self, path: str | Path, format: Literal["moezoo", "huggingface"] = "moezoo") -> list[str]:
        """Write the model into a new folder, and return notes for a person, a line each.

        `moezoo`: weights, config and tokenizer, which `moezoo.load` reads on either backend. `huggingface`: the files
        of the checkpoint that it was read from, or that its run began from, with the weights as they are now (those
        that did not change come out bit for bit); or those of a family that computes the same, if it was designed here.

        Raises RunError: the folder exists and is not empty. Raises SpecError: a format not known, or a model that no
        family computes.
        """
        match format:
            case "moezoo":
                save_run(
                    Path(path), self.config, self.tokenizer, self.model.export_parameters(), self.step, self.layout
                )
                return []
            case "huggingface":
                weights = self.model.export_parameters()
                return export(weights, self.config, self.tokenizer, self.layout, Path(path))
            case _:
                raise SpecError(f"no such format; got {format!r}; expected 'moezoo' or 'huggingface'.")

    def _tokenizer_with_template(self) -> HuggingFaceTokenizer:
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            return self.tokenizer
        raise TokenizerError(
            f"there is no chat template; got a tokenizer of kind {self.tokenizer.kind}; expected a Hugging Face "
            "tokenizer that has one. Prompt without chat."
        )

    def _prompts(self, tokens: Integers | Sequence[IdsLike]) -> list[Integers]:
        """Prompts of any lengths, each checked."""
        try:
            return list(self._checked(np.asarray(tokens), "tokens"))
        except ValueError:  # NumPy's, for rows of unequal length
            return [self._checked(np.asarray(row)[None], "tokens")[0] for row in tokens]

    def _checked(self, tokens: Integers, name: str, lowest: int = 0) -> Integers:
        array = np.asarray(tokens)
        if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{name} is {array.dtype} {list(array.shape)}; expected integers [B, T], B and T >= 1.")
        if array.min() < lowest or array.max() >= self.model.spec.vocab:
            worst = array.min() if array.min() < lowest else array.max()
            rule = f"{lowest} <= token < {self.model.spec.vocab} (vocab_size)"
            raise DataError(f"{name} has token {worst}; expected {rule}.")
        check_length(self.model.spec, array.shape[1], f"{name} of {array.shape[1]}")
        return array.astype(np.int32)


def load_model(
    path: str | Path, backend: str | Backend | None = None, compute: str | None = None, max_length: int | None = None
) -> LoadedModel:
    """See `moezoo.load`."""
    from moezoo.backends import load_backend

    opened = open_model(path, max_length)
    config = opened.config if compute is None else with_compute(opened.config, compute)
    realized = load_backend(backend) if backend is None or isinstance(backend, str) else backend
    model = realized.build(config.model, opened.weights)
    problems = list(opened.problems)
    if opened.checkpoint is not None:
        warning = nonfinite_warning(list(opened.checkpoint.weights.nonfinite), str(opened.path))
        problems += [warning] if warning else []
    return LoadedModel(model, config, opened.tokenizer, opened.step, problems, opened.layout, opened.generation)


_LOGITS_BYTES = 2**27


def evaluate_file(
    loaded: "LoadedModel",
    path: str,
    *,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    on_reading: Progress | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """`evaluate` on all of a file, of text or token ids (`data.whole_file`).

    A window is as long as in training (512 for a checkpoint from elsewhere), or the file where that is shorter. Models
    from elsewhere get the token before it that their tokenizer puts before every text. The batch is that of training,
    or as many windows as keep the logits of one within 128 MiB.
    """
    model, training = loaded.model, loaded.config.training
    split = whole_file(path, loaded.tokenizer, model.spec.vocab, on_reading)
    first_token = loaded.first_token
    length = sequence_length or max(1, min(training.sequence_length, split.num_tokens - 1))
    fitting = max(1, _LOGITS_BYTES // (4 * length * model.spec.vocab))
    return evaluate(
        model,
        split,
        loaded.tokenizer,
        sequence_length=length,
        batch_size=batch_size or min(training.batch_size, fitting),
        first_token=first_token,
        on_progress=on_progress,
    )
