"""The `data` section of a config: sources and tokenizer."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from moezoo.core.spec import Part, impossible


class TextSource(Part):
    """Plain UTF-8 text: a file, a folder (every *.txt below it), a glob, or any fsspec URL of one."""

    kind: Literal["text"] = "text"
    path: str
    weight: PositiveFloat = 1.0


class JSONLSource(Part):
    """One JSON object a line; the text is its `field`. A file, a folder (every *.jsonl), a glob, or a URL."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    field: str = "text"
    weight: PositiveFloat = 1.0


class TokenShardsSource(Part):
    """Token ids on disk: `.npy` (one dimension of integers), or `.bin` as modded-nanogpt writes it (256 int32, uint16).

    A file, a folder or a glob. Local shards are memory-mapped. The text's tokenizer is the config's.
    """

    kind: Literal["tokens"] = "tokens"
    path: str
    weight: PositiveFloat = 1.0


class DatasetSource(Part):
    """A dataset of `datasets/`, by name: built in, or brought by `moezoo data NAME`."""

    kind: Literal["dataset"] = "dataset"
    name: str
    weight: PositiveFloat = 1.0


class BatchesSource(Part):
    """Token ids in ready batches, one a step in the file's order: integers [steps, B, T] of a `.npy` or a `.npz` file.

    A row is a whole sequence: T tokens, T - 1 targets. `key` names the array of a `.npz` file that has several.
    The last `validation_batches` are held out; where that is 0, validation measures the first batch.
    """

    kind: Literal["batches"] = "batches"
    path: str
    key: str | None = None
    validation_batches: NonNegativeInt = 0


SourceSpec = Annotated[
    TextSource | JSONLSource | TokenShardsSource | DatasetSource | BatchesSource, Field(discriminator="kind")
]


class CharacterTokenizerSpec(Part):
    """One token a character; the vocabulary is the sorted set of characters in the data."""

    kind: Literal["character"] = "character"


class ByteTokenizerSpec(Part):
    """One token a byte of UTF-8; 256 tokens."""

    kind: Literal["byte"] = "byte"


class HuggingFaceTokenizerSpec(Part):
    """A tokenizer that transformers can load: a folder with its files, or a hub id."""

    kind: Literal["huggingface"] = "huggingface"
    path: str


class TokenIdsSpec(Part):
    """No tokenizer: token shards whose text is of no concern. Text cannot be prompted, nor bits per byte given."""

    kind: Literal["ids"] = "ids"
    vocab_size: PositiveInt


TokenizerSpec = Annotated[
    CharacterTokenizerSpec | ByteTokenizerSpec | HuggingFaceTokenizerSpec | TokenIdsSpec,
    Field(discriminator="kind"),
]


class DataConfig(Part):
    """Where tokens come from. Sources are blended by weight; the last `validation_fraction` of each is held out.

    Ready batches stand alone, and say themselves how many of them are held out.
    """

    sources: tuple[SourceSpec, ...]
    tokenizer: TokenizerSpec = CharacterTokenizerSpec()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _some_sources(self) -> "DataConfig":
        if not self.sources:
            raise impossible("sources", "is empty", "Give at least one source, e.g. {kind: dataset, name: fables}")
        if len(self.sources) > 1 and any(isinstance(source, BatchesSource) for source in self.sources):
            raise impossible(
                "sources", f"blends ready batches with {len(self.sources) - 1} more", "Use ready batches alone"
            )
        return self
