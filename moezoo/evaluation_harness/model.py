"""The class that lm-eval finds by the name `moezoo`. Only lm-eval imports it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

import moezoo
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.generation.likelihood import Pair
from moezoo.core.parameters.precision import compute_dtype
from moezoo.core.progress import Progress
from moezoo.evaluation_harness.subject import Subject

_MAX_NEW_TOKENS = 256  # as lm-eval's hf


@register_model("moezoo")
class MoezooLM(TemplateLM):
    """A run, a Hugging Face folder or a hub id on either backend, by the rules of lm-eval's `hf` model."""

    def __init__(
        self,
        pretrained: str,
        backend: str | None = None,
        adapter: str | None = None,
        compute: str | None = None,
        top_k: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        allow_overcommit: bool = False,
        device: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            pretrained: a run folder, a Hugging Face folder, or a hub id.
            backend: `jax` or `mlx`; None: as `moezoo.load`.
            adapter, compute, top_k, allow_overcommit: as in `moezoo.load`.
            max_length, max_batch_size, prefix_token_id, add_bos_token: as in `Subject`.
            batch_size: a number, or `auto`.
            enable_thinking: a variable of the chat template.
            think_end_token: text that ends the thinking of an answer; what comes after it is the answer.
            chat_template_args: other variables of the chat template.
            device: of lm-eval's other models, `cuda:0` unless told otherwise; not used, since a backend has its own.
        """
        super().__init__()
        self.loaded = moezoo.load(
            pretrained, backend, compute, adapter=adapter, top_k=top_k, allow_overcommit=allow_overcommit
        )
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.subject = Subject(
            self.loaded,
            max_length=max_length,
            batch_size=None if str(batch_size).startswith("auto") else int(batch_size),
            max_batch_size=max_batch_size or 64,
            prefix_token=prefix_token_id,
            add_bos_token=add_bos_token,
            template={**(chat_template_args or {}), **thinking},
        )
        self.batch_size, self.think_end_token = batch_size, think_end_token

    @property
    def max_length(self) -> int:
        """The number of tokens that the model sees at once."""
        return self.subject.max_length

    @property
    def max_gen_toks(self) -> int:
        """The number of tokens to generate where a task names none."""
        return _MAX_NEW_TOKENS

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.subject.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.subject.prefix_token

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, which lm-eval puts into the names of cached requests."""
        return f"moezoo_{self.loaded.tokenizer.content_hash[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        return self.subject.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template itself, which lm-eval writes into its results."""
        template = getattr(self.loaded.tokenizer, "chat_template", None)
        return None if not chat_template or template is None else str(template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, up to the answer or inside the last message."""
        return self.subject.chat_text(chat_history, continues=not add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        with _bar("loglikelihood", disable_tqdm) as shown:
            scores = self.subject.score(pairs, shown)
        for (texts, *_ids), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [(score.nats, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts."""
        with _bar("loglikelihood_rolling", disable_tqdm) as shown:
            found = self.subject.score_whole([request.args[0] for request in requests], shown)
        for request, nats in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return generated texts up to their stop strings."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for indices in alike.values():
            contexts = [requests[index].args[0] for index in indices]
            with _bar("generate_until", disable_tqdm) as shown:
                made = self._generated(contexts, requests[indices[0]].args[1], shown)
            for index, text in zip(indices, made, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generated(self, contexts: list[str], given: dict[str, Any], shown: Progress) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS))
        end = self.subject.end_of_text
        end_text = None if end is None else self.loaded.tokenizer.decode([end])
        stop = [text for text in handle_stop_sequences(settings.pop("until"), end_text) if text]
        most = settings.pop("max_gen_toks")
        del settings["do_sample"]  # lm-eval has set the temperature by it
        made = self.subject.generate(contexts, most, stop, {"temperature": 0.0, **settings}, shown)
        return [postprocess_generated_text(text, stop, self.think_end_token) for text in made]

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside the results."""
        spec = self.loaded.model.spec
        return {
            "model_num_parameters": parameter_counts(spec).total,
            "model_dtype": compute_dtype(spec),
            "moezoo_version": moezoo.__version__,
            "moezoo_backend": self.loaded.backend,
        }


@contextmanager
def _bar(what: str, disabled: bool) -> Iterator[Progress]:
    """Show progress by lm-eval's own kind of bar."""
    with tqdm(desc=what, disable=disabled) as bar:

        def show(_: str, done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
