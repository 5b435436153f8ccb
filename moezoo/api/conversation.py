"""A conversation with a model, turn by turn; its caches keep what was said."""

from collections.abc import Generator, Mapping
from typing import Any, Unpack

from moezoo.api.loaded_model import LoadedModel
from moezoo.api.prompts import Sampling
from moezoo.core.data.huggingface_tokenizer import with_template
from moezoo.core.data.tokenizers import Ids
from moezoo.core.generation.loop import Continuation
from moezoo.core.generation.session import Session, shared_length

ANSWER_TOKENS = 1024
"""Tokens of an answer, at most, where neither the caller nor the model says otherwise."""


class Conversation:
    """Messages of a user and the answers of a model, by the tokenizer's chat template.

    Attributes:
        messages: so far, as in transformers.
        session: the caches; `session.num_read` tokens of the last prompt were read, the others were there.

    >>> chat = Conversation(moezoo.load("models/tiny"), system="the mat", max_new_tokens=8)
    >>> first, second = "".join(chat.say("the cat")), "".join(chat.say("the owl saw them"))
    >>> [message["role"] for message in chat.messages]
    ['system', 'user', 'assistant', 'user', 'assistant']
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        system: str | None = None,
        template: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> None:
        """`template`: variables of the chat template. Raises TokenizerError: the tokenizer has none.

        Raises SpecError: an option out of range, or unsupported settings in generation_config.json.
        """
        self._model, self._template, self._tokenizer = model, dict(template or {}), with_template(model.tokenizer)
        settings: dict[str, Any] = dict(sampling)
        self._new_tokens, self._stop = settings.pop("max_new_tokens", None), settings.pop("stop", None) or ()
        self._options = model.generation.options(**settings)
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.session = Session(model.model)

    def say(self, text: str) -> Generator[str]:
        """Yield pieces of the answer to a user's message. An answer that the caller leaves stays as it is then.

        Raises DataError: the conversation is too long. Raises OutOfMemoryError: the caches need more memory than is
        free. Raises TokenizerError: as `LoadedModel.encode_chat`. The message is not part of the conversation then.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt, ends = self._encode(asked), self._model.end_tokens(chat=True)
        # In later prompts the answer may be another text (without its thinking), and so may what introduces it.
        keep = shared_length(self._encode(asked, generation_prompt=False), prompt)
        new_tokens = self._answer_tokens(len(prompt))
        self._model.check_generation(1, len(prompt), new_tokens)
        told: dict[str, Any] = {"max_new_tokens": new_tokens, "options": self._options, "end_tokens": ends}
        continuation, pieces = Continuation(self._tokenizer, prompt, ends, self._stop), [""]
        try:
            for token in self.session.stream(prompt, **told, keep=[keep]):
                pieces.append(continuation.add(token))
                yield pieces[-1]
                if continuation.ended:
                    break
            pieces.append(continuation.finish())
            yield pieces[-1]
        finally:
            if continuation.tokens:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _encode(self, messages: list[dict[str, Any]], *, generation_prompt: bool = True) -> Ids:
        return self._tokenizer.encode_chat(messages, self._template, generation_prompt=generation_prompt)

    def _answer_tokens(self, length: int) -> int:
        wanted = self._model.generation.new_tokens(self._new_tokens, length, ANSWER_TOKENS)
        most = self._model.model.spec.max_length
        return wanted if most is None else max(1, min(wanted, most - length))
