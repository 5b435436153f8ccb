"""The implementation of the Python API `import moezoo`: a loaded model, and its evaluation on a file."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

from moezoo.api.prompts import Sampling, Text, TokenRows, as_texts, checked_rows
from moezoo.core.backend import Model, Output, checked_tokens
from moezoo.core.config.run_config import Config
from moezoo.core.cost.fits import check_generation, check_scoring, scoring_size
from moezoo.core.data.chat_template import Message as ChatMessage
from moezoo.core.data.huggingface_tokenizer import with_template
from moezoo.core.data.tokenizers import Ids, Tokenizer, with_first_tokens
from moezoo.core.distributed.mesh import ONE_DEVICE, Devices
from moezoo.core.errors import DataError, SpecError
from moezoo.core.generation.config import GenerationConfig
from moezoo.core.generation.loop import Continuation, OnTokens, generate, stream_ids, text_pieces, until_stop
from moezoo.core.huggingface.layout import Layout
from moezoo.core.interventions.masks import Mode, named_masks
from moezoo.core.progress import Message, Progress
from moezoo.core.reports.model_card import write_model_card
from moezoo.core.reports.model_words import model_in_brief
from moezoo.core.runs.adapters import AdapterSwitch
from moezoo.core.runs.base import Base, saved_names
from moezoo.core.runs.open import weights_digest
from moezoo.core.runs.save import export, save_run
from moezoo.core.tokens import IGNORED, Integers
from moezoo.core.traces.continuations import RecordOptions
from moezoo.core.traces.record import recorded_trace
from moezoo.core.traces.replay import forced_for
from moezoo.core.traces.summary import describe_recording
from moezoo.core.traces.trace import RoutingTrace
from moezoo.core.traces.trace_data import TracedData, traced_files

_ANSWER_TOKENS = 256


class LoadedModel:
    """A model on a backend with its tokenizer and config.

    Attributes:
        model: the model as the backend built it.
        config: of its run, or to fine-tune a Hugging Face checkpoint.
        tokenizer: encodes and decodes text.
        step: number of updates it was trained for; 0 for a Hugging Face checkpoint.
        problems: one-line warnings about the files, for the user.
        layout: file layout of the Hugging Face checkpoint that it is or started from; None if there is none.
        generation: default generation settings.
        base: of an adapter that the model was loaded with, or whose run it is; else None.
        published: the weights are a Hugging Face checkpoint's, not a run's.
        devices: that the model is on.
        path: the folder of its weights; of an adapter, that one's.
        backend: name of its backend.
        allow_overcommit: try what needs more memory than is free.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        tokenizer: Tokenizer,
        step: int,
        problems: list[str],
        layout: Layout | None = None,
        generation: GenerationConfig | None = None,
        *,
        published: bool = False,
        devices: Devices = ONE_DEVICE,
        allow_overcommit: bool = False,
        base: Base | None = None,
        path: Path = Path(),
        backend: str = "",
    ):
        self.model, self.base, self.path, self.backend = model, base, path, backend
        self._adapters = AdapterSwitch(model, base)
        self.config, self.tokenizer, self.layout = config, tokenizer, layout
        self.step, self.published, self.problems = step, published, problems
        self.devices, self.allow_overcommit = devices, allow_overcommit
        self.generation = (generation or GenerationConfig()).ending_with(tokenizer.end_of_text)

    def __repr__(self) -> str:
        trained = "" if self.published else f", step {self.step}"
        return f"<{type(self).__name__} {self.path}{trained}: {model_in_brief(self.model.spec)}; {self.backend}>"

    def forward(
        self,
        tokens: Integers,
        targets: Integers | None = None,
        *,
        replay: RoutingTrace | Integers | None = None,
        without: str | Sequence[str] = (),
        mode: Mode = "silence",
    ) -> Output:
        """Compute logits and routing, and losses if there are targets.

        Args:
            tokens: int32 [B, T], 0 <= token < V.
            targets: int32 [B, T], the next token of each; -1 masks a target.
            replay: experts to force: int [B, T, L, K], or a trace whose first rows are these tokens. A token whose
                experts are all -1, or that is not in the trace, is routed freely.
            without, mode: experts such as `layers[3].experts[5,7]` to silence, or to reroute around.

        Returns:
            `.logits` float32 [B, T, V]; `.routing`, one per MoE layer with `.layer`, `.expert` int32 [B, T, K]
            (descending weight, ties to the lower id) and `.weight` float32 [B, T, K]; `.losses` by name.

        Raises DataError: tokens that the model cannot take. Raises SpecError: experts that cannot be left out.
        """
        checked = self._checked(tokens, "tokens")
        targets = None if targets is None else self._checked(targets, "targets", IGNORED)
        forced = None if replay is None else forced_for(replay, self.model.spec, checked)
        masks = named_masks(self.model.spec, without, mode, len(checked)) if without else None
        return self.model.forward(checked, targets, forced=forced, masks=masks)

    @property
    def first_token(self) -> int | None:
        """The token before every document and prompt (`<s>`); None if the tokenizer has none, or several."""
        first = self.tokenizer.first_tokens
        return first[0] if len(first) == 1 else None

    def encode_prompt(self, text: str, *, chat: bool = False) -> Ids:
        """Encode a prompt to token ids, int32 [T], after the tokenizer's first tokens, as the documents in training.

        `chat`: format the text as a user message with the tokenizer's chat template, ready for the assistant's answer.

        Raises TokenizerError: the tokenizer cannot encode text, or has no chat template.
        """
        if chat:
            return self.encode_chat([{"role": "user", "content": text}])
        return with_first_tokens(self.tokenizer.encode(text), self.tokenizer)

    def encode_chat(self, messages: Sequence[ChatMessage], **variables: Any) -> Ids:
        """Encode a conversation for its answer. `variables`: what the chat template sees (`enable_thinking=False`)."""
        return with_template(self.tokenizer).encode_chat(messages, variables)

    @overload
    def generate(
        self, prompt: Text, *, stream: Literal[False] = False, chat: bool = False, **sampling: Unpack[Sampling]
    ) -> Text: ...

    @overload
    def generate(
        self, prompt: Text, *, stream: Literal[True], chat: bool = False, **sampling: Unpack[Sampling]
    ) -> Iterator[Text]: ...

    @overload
    def generate(
        self,
        prompt: TokenRows,
        *,
        stream: Literal[False] = False,
        chat: bool = False,
        on_tokens: OnTokens | None = None,
        **sampling: Unpack[Sampling],
    ) -> Integers: ...

    @overload
    def generate(
        self, prompt: TokenRows, *, stream: Literal[True], chat: bool = False, **sampling: Unpack[Sampling]
    ) -> Iterator[Integers]: ...

    def generate(
        self,
        prompt: str | list[str] | TokenRows,
        *,
        stream: bool = False,
        chat: bool = False,
        on_tokens: OnTokens | None = None,
        **sampling: Unpack[Sampling],
    ) -> Any:
        """Generate a continuation: text of text, token ids of token ids.

        >>> model = moezoo.load("runs/owls")
        >>> text = model.generate("3 owls saw", max_new_tokens=8)
        >>> first, second = model.generate(["3 owls", "4 owls"], max_new_tokens=8)
        >>> ids = model.generate(np.array([[0, 1, 2]]), max_new_tokens=8)
        >>> ids.shape
        (1, 8)
        >>> "".join(model.generate("3 owls saw", max_new_tokens=8, stream=True)) == text
        True

        Args:
            prompt: a text, a list of B texts, int32 [B, T], or B rows of token ids of any lengths.
            stream: return an iterator over what is generated, as soon as it is.
            chat: texts are a user's messages, for the tokenizer's chat template; ids are conversations
                (`encode_prompt(text, chat=True)`). See `chat` for several turns.
            on_tokens: called with each new column of ids, int32 [B]; it may return which sequences end here, bool [B].
            sampling: as in `Sampling`; what is None or not given is as in `self.generation` (generation_config.json of
                a Hugging Face folder), or else 32 new tokens and greedy decoding.

        Returns:
            the text after the prompt without its end token; a list of B texts; or ids int32 [B, new]. Of a stream, an
            iterator over pieces of text; lists of a piece for each of B texts; or columns of ids, int32 [B].

        Generation ends early when every sequence has produced one of `end_tokens(chat)`, or a text of `stop`.

        Raises DataError: as `forward`. Raises SpecError: an option out of range, or unsupported settings in
        generation_config.json. Raises OutOfMemoryError: the caches need more memory than is free. Raises
        TokenizerError: as `encode_prompt`.
        """
        texts = [prompt] if isinstance(prompt, str) else as_texts(prompt)
        if texts is None:
            ids = checked_rows(self.model.spec, cast(TokenRows, prompt))
            request = self._request(ids, chat, sampling)
            if stop := sampling.get("stop"):
                on_tokens = until_stop(self._continuations(ids, chat, stop), on_tokens)
            return (stream_ids if stream else generate)(**request, on_tokens=on_tokens)
        rows = [self.encode_prompt(text, chat=chat) for text in texts]
        pieces = self._pieces(rows, chat, sampling)
        if isinstance(prompt, str):
            own = (piece for (piece,) in pieces)
            return own if stream else "".join(own)
        return pieces if stream else ["".join(row) for row in zip(*pieces, strict=True)]

    @overload
    def chat(
        self, messages: str | Sequence[ChatMessage], *, stream: Literal[False] = False, **sampling: Unpack[Sampling]
    ) -> str: ...

    @overload
    def chat(
        self, messages: str | Sequence[ChatMessage], *, stream: Literal[True], **sampling: Unpack[Sampling]
    ) -> Iterator[str]: ...

    def chat(
        self, messages: str | Sequence[ChatMessage], *, stream: bool = False, **sampling: Unpack[Sampling]
    ) -> str | Iterator[str]:
        """Answer a conversation by the tokenizer's chat template.

        >>> answer = moezoo.load("models/tiny").chat("the owl saw them", max_new_tokens=8)

        Args:
            messages: `[{"role": "user", "content": "Hello"}, ...]`, or the text of one user message.
            stream: return an iterator over pieces of the answer.
            sampling: as in `generate`, but up to 256 new tokens where neither it nor the model says otherwise.

        Returns:
            the answer, without the end of its turn.

        Raises what `generate` raises; TokenizerError: no chat template, or one that cannot be applied.
        """
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        row = self.encode_chat(said)
        if sampling.get("max_new_tokens") is None:
            sampling["max_new_tokens"] = self.generation.new_tokens(None, len(row), _ANSWER_TOKENS)
        pieces = (piece for (piece,) in self._pieces([row], True, sampling))
        return pieces if stream else "".join(pieces)

    def _request(self, rows: Sequence[Integers], chat: bool, sampling: Sampling) -> dict[str, Any]:
        """Return the arguments of `generation.loop.generate`, after checking that the caches fit."""
        longest, options = max((len(row) for row in rows), default=0), dict[str, Any](sampling)
        new_tokens = self.generation.new_tokens(options.pop("max_new_tokens", None), longest, 32)
        options.pop("stop", None)
        self.check_generation(len(rows), longest, new_tokens)
        return {
            "model": self.model,
            "prompts": rows,
            "max_new_tokens": new_tokens,
            "options": self.generation.options(**options),
            "end_tokens": self.end_tokens(chat),
            "padding": self.generation.padding,
        }

    def _pieces(self, rows: Sequence[Integers], chat: bool, sampling: Sampling) -> Iterator[list[str]]:
        """Return an iterator over pieces of the generated texts, one for each row of ids."""
        request = self._request(rows, chat, sampling)
        return text_pieces(stream_ids(**request), self._continuations(rows, chat, sampling.get("stop") or ()))

    def _continuations(self, rows: Sequence[Integers], chat: bool, stop: Sequence[str]) -> list[Continuation]:
        return [Continuation(self.tokenizer, row, self.end_tokens(chat), stop) for row in rows]

    def trace(
        self,
        data: str | Path | Mapping[str, str | Path] | Sequence[TracedData],
        out: str | Path | None = None,
        *,
        max_tokens: int | None = None,
        generate: int = 0,
        sequence_length: int | None = None,
        batch_size: int | None = None,
        inference: bool = False,
        on_progress: Progress | None = None,
        on_message: Message = warnings.warn,
    ) -> RoutingTrace:
        """Record which experts each token goes to, with the windows and losses of an evaluation.

        >>> trace = moezoo.load("runs/owls").trace("text.txt", max_tokens=60)
        >>> trace.column("expert").shape
        (60, 2, 2)

        Args:
            data: a file of text or token ids, or files by the name of their domain.
            out: file to write the trace to, in memory that does not grow with the text; None: keep it in memory.
            max_tokens: number of tokens of each file, at most.
            generate: continue each document greedily by up to so many tokens, and record these too. Documents (a line
                of JSON lines, a text) are then separate.
            sequence_length, batch_size: as in `evaluate_file`.
            inference: route as in generation; else as in training, without noise.
            on_progress: progress callback, in tokens.
            on_message: called with a line about each damaged entry of the token cache.

        Raises DataError: as `evaluate_file`. Raises SpecError: the model has no MoE layer.
        """
        spec, documents = self.model.spec, "separate" if generate else self.config.data.documents
        if isinstance(data, str | Path | Mapping):
            data = traced_files(data, self.tokenizer, spec.num_logits, documents, on_message=on_message)
        if not data:
            raise DataError("a trace needs data; got none; expected at least one file. Name one.")
        found = list(data) if max_tokens is None else [each.limited(max_tokens) for each in data]
        num_tokens = max(each.split.num_tokens for each in found)
        length, batch = scoring_size(self.config, spec.num_logits, num_tokens, sequence_length, batch_size)
        self.check_scoring(num_tokens, batch, length)
        if generate:
            self.check_generation(batch, length, generate)
        info = describe_recording(
            spec,
            [name for each in found for name in each.domains],
            sequence_length=length,
            inference=inference,
            model=str(self.path),
            weights=weights_digest(self.path, self.base),
            backend=self.backend,
        )
        first = self.first_token if self.published else None
        options = RecordOptions(length, batch, first, generate, self.end_tokens())
        return recorded_trace(self.model, found, self.tokenizer, out, info, options, on_progress)

    def check_scoring(self, num_tokens: int, batch_size: int, length: int) -> None:
        """Check that the logits of a batch of windows over `num_tokens` tokens fit. Raises OutOfMemoryError."""
        size = min(batch_size, -(-num_tokens // length))
        check_scoring(self.model.spec, size, length, self.devices, allow_overcommit=self.allow_overcommit)

    def end_tokens(self, chat: bool = False) -> tuple[int, ...]:
        """Return the tokens that end a text: `generation.end_tokens`, and in a chat the tokenizer's end of turn too.

        A model's generation_config.json may lack the `eos_token` of its tokenizer_config.json (`<|im_end|>`), with
        which its chat template ends a turn.
        """
        own, ends = self.tokenizer.end_of_text, self.generation.end_tokens
        return (*ends, own) if chat and own is not None and own not in ends else ends

    def check_generation(self, batch_size: int, length: int, new_tokens: int) -> list[str]:
        """Check that the caches of B prompts of up to `length` tokens fit; return warnings. Raises OutOfMemoryError."""
        return check_generation(
            self.model.spec,
            batch_size,
            length,
            new_tokens,
            self.devices,
            may_end=bool(self.end_tokens(chat=True)),
            allow_overcommit=self.allow_overcommit,
        )

    def save(self, path: str | Path, format: Literal["moezoo", "huggingface"] = "moezoo") -> list[str]:
        """Save the model into a new folder, and return one-line notes for the user.

        Args:
            path: a new or empty folder.
            format: `moezoo` saves weights, config and tokenizer, which `moezoo.load` reads on either backend.
                `huggingface` saves the files of the checkpoint that the model was loaded from, or that its run started
                from, with the current weights (unchanged ones are bit-exact); for a model designed here, the files of a
                family that represents it. The model of a run that was trained gets a model card, README.md.

        Raises RunError: the folder exists and is not empty. Raises SpecError: an unknown format, or no family can
        represent the model.
        """
        match format:
            case "moezoo":
                weights = self.model.export_parameters(saved_names(self.config))
                save_run(Path(path), self.config, self.tokenizer, weights, self.step, self.layout, base=self.base)
                return []
            case "huggingface":
                weights = self.model.export_parameters()
                notes = export(weights, self.config, self.tokenizer, self.layout, Path(path), step=self.step)
                write_model_card(self.path, Path(path), step=self.step)
                return notes
            case _:
                raise SpecError(f"unknown format; got {format!r}; expected 'moezoo' or 'huggingface'. Use one of them.")

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Read another adapter for the same base, to switch to it with `set_adapter(name)`.

        The model has to have an adapter, which leaves room for those of its rank or a smaller one, on its roles and
        layers or fewer.

        Raises what `moezoo.load` raises; and SpecError: the adapter does not fit into that of the model.
        """
        self._adapters.load(path, name)

    def set_adapter(self, name: str | None) -> None:
        """Switch to the adapter of that name; "default" is the one that the model was loaded with, None is the base.

        Raises SpecError: no adapter of that name was loaded.
        """
        self._adapters.set(name)

    def _checked(self, tokens: Integers, name: str, lowest: int = 0) -> Integers:
        return checked_tokens(self.model.spec, tokens, name, lowest)
