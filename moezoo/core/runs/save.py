"""Save a model as a run folder or as a Hugging Face checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moezoo.core.checkpoint.store import save_checkpoint
from moezoo.core.config.run_config import Config, dump_config
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import tokenizer_notes
from moezoo.core.data.tokenizer_files import tokenizer_files
from moezoo.core.data.tokenizers import TokenIds, Tokenizer
from moezoo.core.errors import RunError, SpecError
from moezoo.core.files import emptied_on_error, make_folder, write_atomically
from moezoo.core.huggingface.export import export_checkpoint
from moezoo.core.huggingface.export_as import export_as_family
from moezoo.core.huggingface.export_tokenizer import exported_tokenizer, is_own
from moezoo.core.huggingface.layout import Layout, write_sidecar
from moezoo.core.runs.base import Base, dump_base, load_base
from moezoo.core.runs.run_folder import BASE_FILE, STATIC, Run, load_run, load_run_layout
from moezoo.core.runs.run_manifest import seal_run


def export(
    weights: Mapping[str, NDArray[Any]],
    config: Config,
    tokenizer: Tokenizer,
    layout: Layout | None,
    out: Path,
    *,
    step: int = 0,
) -> list[str]:
    """Export weights as a Hugging Face checkpoint into a new folder, and return one-line notes for the user.

    `layout`: of the checkpoint that the weights came from; None: the first family that can represent the model. `step`:
    number of updates since; with 0 its config.json is written as it was, otherwise mlx-lm can read it too. The
    tokenizer is the run's, with its chat template and end tokens; a byte or character tokenizer as a tokenizer.json.

    Raises RunError: the folder exists and is not empty. Raises SpecError: no family can represent the model. Raises
    TokenizerError: a character that a tokenizer.json cannot have. After an error the folder is as it was.
    """
    if config.model.adapter is not None:
        raise SpecError(
            "the model has an adapter, which a Hugging Face checkpoint cannot have; expected one or the other. Write "
            "the adapter with moezoo convert --adapter, or a checkpoint with it merged: --merge."
        )
    with emptied_on_error(out):
        return _export(weights, config, tokenizer, layout, out, trained=step > 0)


def _export(
    weights: Mapping[str, NDArray[Any]],
    config: Config,
    tokenizer: Tokenizer,
    layout: Layout | None,
    out: Path,
    *,
    trained: bool,
) -> list[str]:
    if layout is not None and not is_own(tokenizer, layout):
        notes = export_checkpoint(weights, layout, out, trained=trained)
        if isinstance(tokenizer, TokenIds) and tokenizer_files(layout.path):
            notes.append("the original checkpoint's tokenizer was written, since the run used token ids only")
        return notes
    written = exported_tokenizer(tokenizer)
    if layout is not None:
        notes = export_checkpoint(weights, layout, out, written, trained=trained)
        notes += ["the run's own tokenizer and its end tokens were written in place of the original checkpoint's"]
    else:
        length = config.model.max_length or config.training.sequence_length
        notes = export_as_family(weights, config.model, out, max_length=length, tokenizer=written)
    if not written.files:
        return [*notes, "no tokenizer was written, since the run used token ids only"]
    return [*notes, *tokenizer_notes(HuggingFaceTokenizer(str(out)))]


def save_run(
    path: Path,
    config: Config,
    tokenizer: Tokenizer,
    weights: Mapping[str, NDArray[Any]],
    step: int,
    layout: Layout | None,
    *,
    optimizer: Mapping[str, NDArray[Any]] | None = None,
    tokens: int | None = None,
    base: Base | None = None,
) -> None:
    """Save a new run folder with a single checkpoint in unsharded files.

    `layout`: of the Hugging Face checkpoint that the weights came from, to export them later; None if there is none.
    `optimizer`: moments to resume training from; None: the run cannot be resumed. `tokens`: number trained on. `base`:
    what `weights` lacks is that of this base.

    Raises RunError: the folder exists and is not empty. After an error the folder is as it was.
    """
    run = Run(path)
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise RunError(f"{path} exists and is not empty; expected a new or empty folder. Choose another path.")
    with emptied_on_error(run.path):
        make_folder(run.path)
        tokenizer.save(run.path)
        if base is not None:
            write_atomically(run.path / BASE_FILE, dump_base(base))
        elif layout is not None:
            write_sidecar(layout, run.huggingface_path)
        text = dump_config(config)
        save_checkpoint(run.checkpoints_path, step, weights, optimizer or {}, text, None, tokens=tokens)
        seal_run(run.path, STATIC, text)


def consolidate(path: str | Path, out: Path) -> tuple[int, list[str]]:
    """Copy the newest checkpoint of a run into a new run folder, as one safetensors file of weights and one of moments.

    Use it for a run whose checkpoints are sharded: the copy needs nothing but safetensors to read, and training can
    resume from it. One tensor is in memory at a time.

    Returns the step, and one line per damaged checkpoint that was skipped.

    Raises what `load_run` raises, and RunError: `out` is not empty.
    """
    config, tokenizer, checkpoint, problems = load_run(path)
    layout = load_run_layout(path)
    step, moments = checkpoint.step, checkpoint.optimizer
    tokens, base = checkpoint.tokens, load_base(Path(path))
    save_run(out, config, tokenizer, checkpoint.weights, step, layout, optimizer=moments, tokens=tokens, base=base)
    return step, problems
