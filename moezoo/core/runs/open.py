"""Open a model from a path: a run folder, one of a run's checkpoints, a Hugging Face folder, or a hub id."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import list_checkpoints
from moezoo.core.config.data import DataConfig, DatasetSource, HuggingFaceTokenizerSpec, TokenIdsSpec, TokenizerSpec
from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.config.run_config import Config, InitFrom
from moezoo.core.config.schedules import ConstantSchedule
from moezoo.core.config.shipped import shipped_config, shipped_configs
from moezoo.core.config.training import TrainingConfig
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import tokenizer_of_model_folder
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.errors import RunError, nearest
from moezoo.core.files import located, sha256_of
from moezoo.core.generation.config import GenerationConfig, read_generation_config
from moezoo.core.huggingface.adapters.read import is_adapter, read_adapter
from moezoo.core.huggingface.checkpoint import (
    HuggingFaceCheckpoint,
    describe_checkpoint,
    is_checkpoint,
    open_checkpoint,
)
from moezoo.core.huggingface.export_as import describe_as_family
from moezoo.core.huggingface.export_tokenizer import is_own
from moezoo.core.huggingface.folder import ADAPTERS, USE_ADAPTER
from moezoo.core.huggingface.layout import Description, Layout
from moezoo.core.parameters.precision import STORED_DTYPES
from moezoo.core.runs.base import AdaptedWeights, Base, base_digest, check_base, load_base
from moezoo.core.runs.run_folder import Run, is_run, load_run, load_run_config, load_run_layout
from moezoo.core.spec import ModelSpec

_CONFIGS = (".yaml", ".yml")


@dataclass(frozen=True)
class OpenedModel:
    """A model read from a path, not yet built on a backend.

    Fields:
        path: the folder; for a hub id, its folder in the cache.
        config: the run's config; for a Hugging Face checkpoint, a config to fine-tune it with example data.
        tokenizer: `TokenIds`, which cannot encode text, if the folder has no tokenizer.
        weights: by canonical name, in the stored dtype; each is read when accessed.
        step: number of updates the run has done; 0 for a Hugging Face checkpoint.
        problems: one-line warnings for the user, about skipped damaged checkpoints for instance.
        checkpoint: the Hugging Face checkpoint; None for a run.
        layout: file layout of the Hugging Face checkpoint, or of the one that the run started from; else None.
        generation: generation settings of the Hugging Face checkpoint, or of the one that the run started from.
        base: the base of an adapter; None for a model that is whole.
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
    base: Base | None = None

    @property
    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of each parameter on a device, which keeps it in codes, or in a dtype of STORED_DTYPES."""
        weights: Any = self.weights  # a lazy mapping
        dtypes = weights.dtypes
        return {
            name: weights.stored_bytes(name)
            or math.prod(shape) * (dtypes[name].itemsize if dtypes[name].name in STORED_DTYPES else 4)
            for name, shape in shapes_of(self.weights).items()
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters on a device."""
        return sum(self.parameter_bytes.values())


def is_config(path: str | Path) -> bool:
    """Return whether a path is a YAML config: by its suffix, or because it is a file or the name of a shipped one."""
    return Path(path).suffix in _CONFIGS or Path(path).is_file() or shipped_config(path) is not None


def checkpoint_folder(path: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a Hugging Face checkpoint; download a hub id first, with progress on stderr.

    `weights`: download the weights too.

    Raises RunError: a folder without a checkpoint. Raises CheckpointError: the download fails.
    """
    from moezoo.core.huggingface.hub import resolve
    from moezoo.core.progress import bytes_on_stderr

    with bytes_on_stderr() as show:
        folder = resolve(path, show, weights=weights)
    if not is_checkpoint(folder):
        if (folder / ADAPTERS[0]).is_file():
            raise RunError(f"{path} is an adapter, without the model that it adapts. {USE_ADAPTER}")
        if Path(path).suffix in _CONFIGS or shipped_config(path) is not None:
            raise RunError(
                f"{path} is a config, not a model; expected a run folder or a Hugging Face folder. Train it with "
                f"`moezoo train {path}`, and use the folder of its run."
            )
        advice = "Use such a folder or a hub id (organization/name), or train a run with `moezoo train CONFIG`."
        if not folder.exists():
            close = nearest(str(path), shipped_configs())
            raise RunError(
                f"{located(path)} does not exist{close}; expected a run folder or a Hugging Face folder. {advice}"
            )
        raise RunError(
            f"{located(path)} is neither a run folder nor a Hugging Face checkpoint; expected config.yaml or "
            f"config.json in it. {advice}"
        )
    return folder


def open_model(path: str | Path, max_length: int | None = None, adapter: str | Path | None = None) -> OpenedModel:
    """Open a run folder (its newest intact checkpoint), one of its checkpoints, a Hugging Face folder, or a hub id.

    Of a run that holds an adapter alone, its base is opened too.

    Args:
        path: of the model.
        max_length: as in `moezoo.load`; ignored for a run, whose config contains it.
        adapter: a run of an adapter, or a folder of mlx-lm or PEFT, for the model at the path.

    Raises RunError, CheckpointError, SpecError or TokenizerError.
    """
    if adapter is not None:
        return _open_adapted(path, adapter, max_length)
    if is_run(path):
        base = load_base(Path(path))
        if base is not None:
            return _open_adapter_run(Path(path), base, open_base(base, path))
        config, tokenizer, saved, problems = load_run(path)
        layout = load_run_layout(path)
        opened = OpenedModel(Path(path), config, tokenizer, saved.weights, saved.step, problems, layout=layout)
        if layout is None:
            return opened
        generation = read_generation_config(layout.path, layout.description.fields.raw)
        if is_own(tokenizer, layout):  # the checkpoint's special tokens have other ids, or none, in this vocabulary
            generation = replace(generation, end_tokens=(), padding=None)
        return replace(opened, generation=generation)
    folder = checkpoint_folder(path)
    checkpoint = open_checkpoint(folder, max_length)
    tokenizer = tokenizer_of_model_folder(checkpoint.path, checkpoint.spec.num_logits)
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


def make_base(path: str | Path) -> Base:
    """Return the base at a path, by its absolute path or hub id, with the hash of its content."""
    folder = Path(path) if is_run(path) else checkpoint_folder(path)
    return Base(str(Path(path).resolve()) if Path(path).exists() else str(path), base_digest(folder))


def weights_digest(path: Path, base: Base | None) -> str:
    """Return a hash of the weights' content, as `base_digest`; of an adapter at the path, with its base's."""
    if base is None:
        return base_digest(path)
    files = [path / name for name in ADAPTERS if (path / name).is_file()]
    own = base_digest(path) if is_run(path) else " ".join(map(sha256_of, files))
    return hashlib.sha256(f"{base.digest} {own}".encode()).hexdigest()


def open_base(base: Base, adapter: str | Path) -> OpenedModel:
    """Open the base of an adapter. Raises RunError: it is missing or has changed; and what `open_model` raises."""
    path = Path(base.path)
    if path.is_absolute() and not path.exists():
        raise RunError(
            f"{adapter} is an adapter for {base.path}, which does not exist. Name its new folder, with "
            f"--adapter {adapter}."
        )
    opened = open_model(base.path)
    check_base(adapter, base, opened.path)
    return opened


def _open_adapter_run(run: Path, base: Base, opened: OpenedModel) -> OpenedModel:
    """Open a run that holds an adapter alone, on its opened base."""
    config, tokenizer, saved, problems = load_run(run)
    return replace(
        opened,
        path=run,
        config=config,
        tokenizer=tokenizer,
        weights=AdaptedWeights(config.model, opened.weights, saved.weights, f"{run} on {base.path}"),
        step=saved.step,
        problems=[*opened.problems, *problems],
        checkpoint=None,
        base=base,
    )


def _open_adapted(path: str | Path, adapter: str | Path, max_length: int | None) -> OpenedModel:
    """Open a model with an adapter that is beside it."""
    opened = open_model(path, max_length)
    if opened.base is not None:
        raise RunError(f"{path} is an adapter itself; expected the base of {adapter}. Use {opened.base.path}.")
    if is_run(adapter):
        base = load_base(Path(adapter))
        if base is None:
            raise RunError(f"{adapter} is a run without a base, not an adapter. Use it without --adapter.")
        check_base(adapter, base, opened.path)
        return _open_adapter_run(Path(adapter), replace(base, path=make_base(path).path), opened)
    if not is_adapter(adapter):
        raise RunError(
            f"{located(adapter)} is no adapter; expected a run that trained one, or a folder with {ADAPTERS[0]}. Check "
            "--adapter."
        )
    read = read_adapter(Path(adapter), description_of(opened))
    base, config = make_base(path), opened.config
    model = config.model.model_copy(update={"adapter": read.spec.adapter})
    return replace(
        opened,
        path=Path(adapter),
        config=config.model_copy(update={"model": model, "init_from": InitFrom(path=base.path)}),
        weights=AdaptedWeights(model, opened.weights, read.weights, f"{adapter} on {path}"),
        problems=[*opened.problems, *read.notes],
        base=base,
    )


def description_of(opened: OpenedModel) -> Description:
    """Return the description of an opened model's tensors in Hugging Face's layout, without its adapter.

    Raises SpecError: no family can represent the model.
    """
    if opened.layout is not None:
        return opened.layout.description
    model = opened.config.model.model_copy(update={"adapter": None})
    length = model.max_length or opened.config.training.sequence_length
    return describe_as_family(model, length, str(opened.path))


def is_superseded(opened: OpenedModel) -> bool:
    """Return whether a run has a newer checkpoint than the opened one, which its training may have pruned since."""
    saved = list_checkpoints(Run(opened.path).checkpoints_path) if is_run(opened.path) else []
    return bool(saved) and saved[-1].step > opened.step


def describe_model(path: str | Path, adapter: str | Path | None = None) -> tuple[ModelSpec, TokenizerSpec]:
    """Read the model spec and the tokenizer spec of a path from its config alone, without opening weights.

    With an adapter, both are opened.
    """
    if adapter is not None:
        config = open_model(path, adapter=adapter).config
        return config.model, config.data.tokenizer
    if is_run(path):
        config = load_run_config(path)
        return config.model, config.data.tokenizer
    folder = checkpoint_folder(path, weights=False)
    spec = describe_checkpoint(folder).spec
    return spec, _tokenizer_spec(folder, spec, tokenizer_of_model_folder(folder, spec.num_logits))


def _tokenizer_spec(folder: Path, spec: ModelSpec, tokenizer: Tokenizer) -> TokenizerSpec:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return HuggingFaceTokenizerSpec(path=str(folder))
    return TokenIdsSpec(vocab_size=spec.num_logits)


def fine_tuning_config(checkpoint: HuggingFaceCheckpoint, tokenizer: Tokenizer) -> Config:
    """Return a config to fine-tune a checkpoint at a small constant learning rate, with example data to replace."""
    longest = checkpoint.spec.max_length
    return Config(
        model=checkpoint.spec,
        data=DataConfig(
            sources=(DatasetSource(name="fables"),),
            tokenizer=_tokenizer_spec(checkpoint.path, checkpoint.spec, tokenizer),
        ),
        training=TrainingConfig(steps=100, batch_size=8, sequence_length=min(512, longest or 512)),
        optimizer=AdamWConfig(learning_rate=1e-5, schedule=ConstantSchedule()),
    )
