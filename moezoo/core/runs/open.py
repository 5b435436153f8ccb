"""What a path stands for: a run folder, a Hugging Face checkpoint's folder, or the id of one on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.config.data import DataConfig, DatasetSource, HuggingFaceTokenizerSpec, TokenIdsSpec, TokenizerSpec
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.schedules import ConstantSchedule
from moezoo.core.config.training import OptimizerConfig, TrainingConfig
from moezoo.core.data.tokenizers import HuggingFaceTokenizer, Tokenizer, tokenizer_beside
from moezoo.core.errors import RunError
from moezoo.core.generation.config import GenerationConfig, read_generation_config
from moezoo.core.huggingface.checkpoint import (
    HuggingFaceCheckpoint,
    describe_checkpoint,
    is_checkpoint,
    open_checkpoint,
)
from moezoo.core.huggingface.layout import Layout, open_sidecar
from moezoo.core.runs.run_folder import Run, is_run, load_run
from moezoo.core.spec import ModelSpec


@dataclass(frozen=True)
class OpenedModel:
    """A model before any backend has it.

    Fields:
        path: the folder (of a hub id, the one in the cache).
        config: of the run; for a Hugging Face checkpoint one to fine-tune it with, whose data is only an example.
        tokenizer: a TokenIds, which knows no text, where the folder has none.
        weights: by canonical name, in the stored dtype; those of a Hugging Face checkpoint are read on access.
        step: how many updates the run has made.
        problems: damaged checkpoints that were passed over, and the like, a line each.
        checkpoint: the Hugging Face checkpoint, None for a run.
        layout: how the files are laid out of the checkpoint that it is, or that the run began from; else None.
        generation: what the folder says about generating, or the checkpoint that a run began from; else nothing.
    """

    path: Path
    config: Config
    tokenizer: Tokenizer
    weights: Mapping[str, npt.NDArray[Any]]
    step: int = 0
    problems: list[str] = field(default_factory=list)
    checkpoint: HuggingFaceCheckpoint | None = None
    layout: Layout | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)


def is_config(path: str | Path) -> bool:
    """Whether a path is a YAML config's: it ends like one, or is a file."""
    return Path(path).suffix in (".yaml", ".yml") or Path(path).is_file()


def checkpoint_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The folder of a Hugging Face checkpoint, fetched where `path` is a hub id; progress goes to stderr.

    Raises RunError for any other folder, CheckpointError for what cannot be fetched.
    """
    from moezoo.core.huggingface.hub import on_stderr, resolve

    tell = on_stderr()
    folder = resolve(path, tell, weights=weights)
    tell("")  # the line is done with
    if not is_checkpoint(folder):
        raise RunError(
            f"{path} is neither a run folder nor a Hugging Face checkpoint; expected config.yaml or config.json in it. "
            "Give such a folder or the id of one on the hub, or make a run with `moezoo train CONFIG`."
        )
    return folder


def open_model(path: str | Path, max_length: int | None = None) -> OpenedModel:
    """Open a run folder (its newest whole checkpoint), a Hugging Face folder, or a hub id.

    `max_length`: see `moezoo.load`; a run's config says it itself.

    Raises RunError, CheckpointError, SpecError or TokenizerError.
    """
    if is_run(path):
        config, tokenizer, saved, problems = load_run(path)
        layout = open_sidecar(Run(Path(path)).huggingface_path)
        opened = OpenedModel(Path(path), config, tokenizer, saved.weights, saved.step, problems, layout=layout)
        if layout is None:
            return opened
        return replace(opened, generation=read_generation_config(layout.path, layout.description.fields.raw))
    folder = checkpoint_folder(path)
    checkpoint = open_checkpoint(folder, max_length)
    tokenizer = tokenizer_beside(checkpoint.path, checkpoint.spec.vocab)
    return OpenedModel(
        path=folder,
        config=fine_tuning_config(checkpoint, tokenizer),
        tokenizer=tokenizer,
        weights=checkpoint.weights,
        problems=list(checkpoint.description.notes),
        checkpoint=checkpoint,
        layout=checkpoint.layout,
        generation=read_generation_config(folder, checkpoint.description.fields.raw),
    )


def describe_model(path: str | Path) -> tuple[ModelSpec, TokenizerSpec]:
    """The model and the tokenizer of what `open_model` opens, from its config alone."""
    if is_run(path):
        config = load_config(Run(Path(path)).config_path)
        return config.model, config.data.tokenizer
    folder = checkpoint_folder(path, weights=False)
    spec = describe_checkpoint(folder).spec
    return spec, _tokenizer_spec(folder, spec, tokenizer_beside(folder, spec.vocab))


def _tokenizer_spec(folder: Path, spec: ModelSpec, tokenizer: Tokenizer) -> TokenizerSpec:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return HuggingFaceTokenizerSpec(path=str(folder))
    return TokenIdsSpec(vocab_size=spec.vocab)


def fine_tuning_config(checkpoint: HuggingFaceCheckpoint, tokenizer: Tokenizer) -> Config:
    """A config that trains the checkpoint on, at a small constant rate; its data is an example to replace."""
    longest = checkpoint.spec.max_length
    return Config(
        model=checkpoint.spec,
        data=DataConfig(
            sources=(DatasetSource(name="fables"),),
            tokenizer=_tokenizer_spec(checkpoint.path, checkpoint.spec, tokenizer),
        ),
        training=TrainingConfig(steps=100, batch_size=8, sequence_length=min(512, longest or 512)),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule=ConstantSchedule()),
    )
