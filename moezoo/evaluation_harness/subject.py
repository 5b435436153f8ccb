"""A model as lm-eval asks it: tokens of texts, log-likelihoods, and generated texts. lm-eval itself is not needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moezoo.api.loaded_model import LoadedModel
from moezoo.core.data.chat_template import Message
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer, with_template
from moezoo.core.errors import SpecError, TokenizerError
from moezoo.core.generation.likelihood import Likelihood, Pair, log_likelihoods, rolling_windows
from moezoo.core.generation.loop import Continuation, until_stop
from moezoo.core.progress import Progress
from moezoo.core.tokens import Integers

_FLOAT32_BYTES = 4
_DEFAULT_LENGTH = 2048  # lm-eval's, of a model whose files name none
_LOGITS_BYTES = 2**27  # of a batch, at most, where no size is given
_GENERATED_AT_ONCE = 16  # where no size is given; others were not timed
_CONTINUE_HERE = "<<<continue here>>>"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Subject:
    """A loaded model under evaluation, by the rules of lm-eval's `hf` model, so that the scores are equal.

    Attributes:
        max_length: number of tokens that the model sees at once.
        end_of_text: id of the token that ends a text; None if the tokenizer has none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_length: int | None = None,
        batch_size: int | None = 1,
        max_batch_size: int = 64,
        prefix_token: int | None = None,
        add_bos_token: bool | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare an evaluation.

        Args:
            loaded: the model.
            max_length: None: max_position_embeddings of a published model, `sequence_length` of a run trained here.
            batch_size: number of sequences in a batch; None: as many as have logits of 128 MiB, and 16 to generate.
            max_batch_size: of a `batch_size` of None.
            prefix_token: id before a text without context; None: the tokenizer's BOS token, or else its EOS token.
            add_bos_token: begin texts with the tokenizer's first tokens; None: as its files say.
            template: variables of the chat template.

        Raises SpecError: `max_length` is more than the model's number of positions.
        """
        longest = loaded.model.spec.max_length
        if max_length is not None and longest is not None and max_length > longest:
            raise SpecError(f"max_length is {max_length}, but the model has {longest} positions. Use <= {longest}.")
        self.max_length = max_length or _context_length(loaded)
        self.end_of_text = loaded.tokenizer.end_of_text
        self._loaded, self._tokenizer, self._prefix = loaded, loaded.tokenizer, prefix_token
        self._batch_size, self._max_batch_size = batch_size, max_batch_size
        self._add_bos_token, self._template = add_bos_token, dict(template or {})

    @property
    def prefix_token(self) -> int:
        """The token before a text without context. Raises TokenizerError: there is none, and none was given."""
        bos = self._tokenizer.beginning_of_text if isinstance(self._tokenizer, HuggingFaceTokenizer) else None
        found = next((token for token in (self._prefix, bos, self.end_of_text) if token is not None), None)
        if found is None:
            raise TokenizerError(
                f"the tokenizer has no token to begin a text with; got one of kind {self._tokenizer.kind}. Name an id, "
                "that of a line break for instance: --model_args ...,prefix_token_id=10."
            )
        return found

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Return the tokens of a text.

        `special`: with the tokenizer's first tokens; None: as `add_bos_token`, unless the text begins with them itself,
        as one of a chat template does.
        """
        ids: list[int] = self._tokenizer.encode(text).tolist()
        first = list(self._tokenizer.first_tokens)
        if special is None:
            has_own = bool(first) and ids[: len(first)] == first
            special = self._add_bos_token is not False and not has_own
        return [*first, *ids] if special else ids

    def score(self, pairs: Sequence[Pair], on_progress: Progress | None = None) -> list[Likelihood]:
        """Return the log-likelihood of each continuation (`log_likelihoods`). Raises DataError, OutOfMemoryError."""
        length, size = self.max_length, self._scored_at_once
        return log_likelihoods(self._loaded.model, pairs, max_length=length, batch_size=size, on_progress=on_progress)

    def score_whole(self, texts: Sequence[str], on_progress: Progress | None = None) -> list[float]:
        """Return the log-likelihood of all tokens of each text, in nats (`rolling_windows`)."""
        windows = [list(rolling_windows(self.encode(text), self.prefix_token, self.max_length)) for text in texts]
        scores = iter(self.score([window for own in windows for window in own], on_progress))
        return [sum(next(scores).nats for _ in own) for own in windows]

    def generate(
        self,
        contexts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str],
        settings: Mapping[str, Any],
        on_progress: Progress | None = None,
    ) -> list[str]:
        """Return what the model writes after each context, without what begins it there: special tokens.

        A context of more tokens than `max_length` - `max_new_tokens` loses the first ones.

        Args:
            contexts: texts.
            max_new_tokens: number of tokens to generate, at most.
            stop: texts that end a generated one; they are not cut off. As in lm-eval, they are sought in what is
                generated by itself, which has no space before its first word.
            settings: of sampling: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`. Sampled texts depend
                on the index of their context, so that a repeated one gets another text.
            on_progress: called with the number of contexts.

        Raises SpecError: an unknown setting, or no room for a context.
        """
        if unknown := sorted(set(settings) - set(_SAMPLING)):
            raise SpecError(f"unknown generation settings {', '.join(unknown)}; expected {', '.join(_SAMPLING)}.")
        room = self.max_length - max_new_tokens
        if room < 1:
            raise SpecError(
                f"max_gen_toks is {max_new_tokens}, but the model sees {self.max_length} tokens (max_length), with the "
                f"context. Use less than {self.max_length}, or a larger max_length."
            )
        rows = [np.asarray(self.encode(text)[-room:], np.int32) for text in contexts]
        texts, done = [""] * len(rows), 0
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        size = self._batch_size or min(_GENERATED_AT_ONCE, self._max_batch_size)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            made = self._generated([rows[index] for index in batch], max_new_tokens, stop, {**settings, "seed": start})
            for index, text in zip(batch, made, strict=True):
                texts[index] = text
            done += len(batch)
            if on_progress is not None:
                on_progress("generating", done, len(rows))
        return texts

    def chat_text(self, messages: Sequence[Message], *, continues: bool = False) -> str:
        """Return the text of a conversation by the chat template.

        It ends with what comes before an answer; or, with `continues`, inside the last message, which is to be
        continued. A template that refuses a system prompt is used without it, as lm-eval does.

        Raises TokenizerError: no chat template, or it cannot be applied.
        """
        tokenizer, said = with_template(self._tokenizer), list(messages)
        if continues:
            said[-1] = {**said[-1], "content": f"{said[-1]['content']}{_CONTINUE_HERE}"}
        try:
            text = tokenizer.chat_text(said, self._template, generation_prompt=not continues)
        except TokenizerError:
            without = [message for message in said if message["role"] != "system"]
            if len(without) in (0, len(said)):
                raise
            text = tokenizer.chat_text(without, self._template, generation_prompt=not continues)
        return text.rpartition(_CONTINUE_HERE)[0] if continues else text

    def _scored_at_once(self, length: int) -> int:
        fitting = _LOGITS_BYTES // (_FLOAT32_BYTES * length * self._loaded.model.spec.vocab)
        size = self._batch_size or max(1, min(self._max_batch_size, fitting))
        self._loaded.check_scoring(size * length, size, length)
        return size

    def _generated(self, rows: list[Integers], most: int, stop: Sequence[str], told: Mapping[str, Any]) -> list[str]:
        ends = self._loaded.end_tokens(chat=True)
        continuations = [Continuation(self._tokenizer, (), ends, stop) for _ in rows]
        given: dict[str, Any] = {"on_tokens": until_stop(continuations), "max_new_tokens": most, **told}
        self._loaded.generate(rows, chat=True, **given)
        return [self._decoded(continuation.tokens, ends) for continuation in continuations]

    def _decoded(self, tokens: list[int], ends: Sequence[int]) -> str:
        """Decode an answer by itself, as lm-eval does."""
        special = self._tokenizer.special_ids if isinstance(self._tokenizer, HuggingFaceTokenizer) else frozenset()
        return self._tokenizer.decode([token for token in tokens if token not in special and token not in ends])


def _context_length(loaded: LoadedModel) -> int:
    """Return the number of tokens that a model sees at once, by the files of a checkpoint, or by its training."""
    own = loaded.model.spec.max_length
    if loaded.layout is None:
        return own or loaded.config.training.sequence_length
    raw = loaded.layout.description.fields.raw
    inner = raw.get("text_config")
    named = (inner if isinstance(inner, Mapping) else raw).get("max_position_embeddings")
    return min(own or named or _DEFAULT_LENGTH, named or own or _DEFAULT_LENGTH)
