"""The `data` section of a config: sources and tokenizer."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from moezoo.core.spec import Part, impossible


class TextSource(Part):
    """Plain UTF-8 text: a file, a folder (every *.txt in it, recursively), a glob, or an fsspec URL of any of these."""

    kind: Literal["text"] = "text"
    path: str
    weight: PositiveFloat | None = None


class JSONLSource(Part):
    """JSON lines: one object per line, the text in `field`. A file, a folder (*.jsonl, *.ndjson), a glob, or a URL."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    field: str = "text"
    weight: PositiveFloat | None = None


class TokenShardsSource(Part):
    """Pre-tokenized shards: `.npy` (one-dimensional integers), or modded-nanogpt's `.bin` (256 int32, uint16 ids).

    A file, a folder or a glob. Shards are read window by window. `data.tokenizer` must be the one that made the ids.
    """

    kind: Literal["tokens"] = "tokens"
    path: str
    weight: PositiveFloat | None = None


class DatasetSource(Part):
    """A dataset of `datasets/` by name: built in, or downloaded with `moezoo data NAME`."""

    kind: Literal["dataset"] = "dataset"
    name: str
    weight: PositiveFloat | None = None


class ChatSource(Part):
    """Conversations: JSON lines with `messages` (and `tools`), `prompt` and `completion`, or `text`.

    They are rendered with the tokenizer's own chat template. `loss` says which tokens are trained on: those of all of
    the assistant's turns, of the `last` of them, or `all`. A `text` is trained on as a whole. A file, a folder, a glob,
    or a URL, as of kind jsonl.
    """

    kind: Literal["chat"] = "chat"
    path: str
    loss: Literal["assistant", "last", "all"] = "assistant"
    weight: PositiveFloat | None = None


class BatchesSource(Part):
    """Prebatched token ids, one batch per step in file order: integers [steps, B, T] in a `.npy` or `.npz` file.

    A row is a whole sequence: T tokens, T - 1 targets. `key` selects the array of a `.npz` file with several arrays.
    The last `validation_batches` are held out; if that is 0, the validation loss is computed on the first batch.
    """

    kind: Literal["batches"] = "batches"
    path: str
    key: str | None = None
    validation_batches: NonNegativeInt = 0


SourceSpec = Annotated[
    TextSource | JSONLSource | ChatSource | TokenShardsSource | DatasetSource | BatchesSource,
    Field(discriminator="kind"),
]


class CharacterTokenizerSpec(Part):
    """Character-level tokenizer; the vocabulary is the sorted set of characters in the data."""

    kind: Literal["character"] = "character"


class ByteTokenizerSpec(Part):
    """Byte-level tokenizer: one token per UTF-8 byte, 256 tokens."""

    kind: Literal["byte"] = "byte"


class HuggingFaceTokenizerSpec(Part):
    """A tokenizer that transformers can load, from a folder or by hub id."""

    kind: Literal["huggingface"] = "huggingface"
    path: str


class TokenIdsSpec(Part):
    """No tokenizer, only token ids. Text prompts and bits per byte are not available."""

    kind: Literal["ids"] = "ids"
    vocab_size: PositiveInt


TokenizerSpec = Annotated[
    CharacterTokenizerSpec | ByteTokenizerSpec | HuggingFaceTokenizerSpec | TokenIdsSpec,
    Field(discriminator="kind"),
]


class DataConfig(Part):
    """Data sources and tokenizer. The last `validation_fraction` of each source is held out.

    With sources of its own in `validation`, the validation is on all of these, and nothing of `sources` is held out.

    `documents: windows` cuts sequences from each source's tokens, one document after the other. `separate` packs whole
    documents into sequences, and none sees another; a document that is longer is cut. It needs texts or conversations.

    Sources are mixed by `weight`, each one's share of the sequences; without weights by size, so that all have equally
    many epochs. Either all have a weight or none.
    A source of kind `batches` must be the only source; its `validation_batches` replaces `validation_fraction`.
    """

    sources: tuple[SourceSpec, ...]
    validation: tuple[SourceSpec, ...] | None = None
    tokenizer: TokenizerSpec = CharacterTokenizerSpec()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    documents: Literal["windows", "separate"] = "windows"

    @model_validator(mode="after")
    def _some_sources(self) -> "DataConfig":
        if not self.sources:
            raise impossible("sources", "is empty", "Add at least one source, e.g. {kind: dataset, name: fables}")
        if len(self.sources) > 1 and any(isinstance(source, BatchesSource) for source in self.sources):
            raise impossible(
                "sources",
                f"mixes a source of kind batches with {len(self.sources) - 1} more",
                "Use a source of kind batches alone",
            )
        weights = [getattr(source, "weight", None) for source in self.sources]
        if None in weights and weights != [None] * len(weights):
            raise impossible(
                f"sources[{weights.index(None)}].weight",
                f"is missing, but sources[{next(k for k, weight in enumerate(weights) if weight)}] has one",
                "Give every source a weight, or none to mix them by size",
            )
        return self

    @model_validator(mode="after")
    def _sources_to_validate_on(self) -> "DataConfig":
        if self.validation is None:
            return self
        if not self.validation:
            raise impossible("validation", "is empty", "Add at least one source, or null for validation_fraction")
        if any(isinstance(source, BatchesSource) for source in (*self.sources, *self.validation)):
            raise impossible(
                "validation", "is set beside a source of kind batches", "Use that source's validation_batches"
            )
        for k, source in enumerate(self.validation):
            if getattr(source, "weight", None) is not None:
                raise impossible(
                    f"validation[{k}].weight", "is set", "Remove it: the sources to validate on follow each other"
                )
        return self

    @model_validator(mode="after")
    def _documents_have_borders(self) -> "DataConfig":
        for key, sources in (("sources", self.sources), ("validation", self.validation or ())):
            for number, source in enumerate(sources):
                if self.documents == "separate" and isinstance(source, BatchesSource | TokenShardsSource):
                    raise impossible(
                        "documents",
                        f"is separate, but {key}[{number}] is of kind {source.kind}, which has no borders of documents",
                        "Use sources of kind text, jsonl or chat, or documents: windows",
                    )
        return self

    @field_validator("sources")
    @classmethod
    def _one_source_has_no_share(cls, sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        """A weight means nothing for the only source; runs of earlier versions have 1.0 there."""
        if len(sources) != 1 or isinstance(sources[0], BatchesSource):
            return sources
        return (sources[0].model_copy(update={"weight": None}),)
