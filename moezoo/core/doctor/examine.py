"""The examination of a path: which checks apply to it, and what they find. Nothing is built on a backend here."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from moezoo.core.checkpoint.store import Checkpoint, list_checkpoints, load_checkpoint, load_latest_checkpoint
from moezoo.core.doctor.curves import balance_findings, curve_findings
from moezoo.core.doctor.environment import memory_findings
from moezoo.core.doctor.finding import Diagnosis, Finding
from moezoo.core.doctor.history import read_history
from moezoo.core.doctor.routers import bias_findings, load_findings, router_findings
from moezoo.core.doctor.tensors import unused_findings, weight_findings
from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.checkpoint import LazyWeights, open_checkpoint
from moezoo.core.progress import Progress
from moezoo.core.runs.open import checkpoint_folder
from moezoo.core.runs.run_folder import Run, is_run, is_step, load_run_config, run_of

CONFIG, METRICS, FILES, PARAMETERS, GRADIENTS = "config", "metrics", "files", "parameters", "gradients"
_QUICK = "left out by --quick"


def examine(path: str | Path, *, quick: bool = False, on_progress: Progress | None = None) -> Diagnosis:
    """Return what is wrong with a run, a saved step of one, or a Hugging Face checkpoint.

    Args:
        path: run folder, folder of one of its checkpoints, Hugging Face folder, or hub id.
        quick: read configs, metrics and headers only, no tensors.
        on_progress: called with what is read and the number of parameters done.

    Raises what opening the path raises: it is no such folder, or its config is damaged.
    """
    return _run(Path(path), quick, on_progress) if is_run(path) else _checkpoint(path, quick, on_progress)


def _run(path: Path, quick: bool, on_progress: Progress | None) -> Diagnosis:
    run = Run(run_of(path))
    saved, problems = (None, []) if quick else _saved(path)
    config = load_run_config(path)
    found = Diagnosis(str(path), "checkpoint" if is_step(path) else "run")
    history = read_history(run.metrics_path, config.model)
    found.add(CONFIG, [*router_findings(config.model), *bias_findings(config, history)])
    lost = [_damaged(problem, "The steps that it had are missing from every picture.") for problem in history.problems]
    if len(history):
        checks = (curve_findings(history), balance_findings(config, history), load_findings(config, history))
        found.add(METRICS, [*lost, *(finding for check in checks for finding in check)])
    else:
        found.add(METRICS, lost)
        found.skipped["load and losses"] = f"{run.metrics_path} has no training records"
    if quick:
        found.skipped |= dict.fromkeys((FILES, PARAMETERS, GRADIENTS), _QUICK)
        return found
    found.add(FILES, [_damaged(problem, "The run continues from an older one.") for problem in problems])
    if saved is None:
        found.skipped[PARAMETERS] = found.skipped[GRADIENTS] = "the run has no checkpoint"
        return found
    found.step = saved.step
    found.add(PARAMETERS, weight_findings(config.model, saved.weights, on_progress))
    if saved.step == 0:
        found.skipped[GRADIENTS] = "the run has done no step"
        return found
    earlier = cache(lambda: _earlier(run, saved))  # most optimizers keep a state of every parameter, so it is not read
    unused = unused_findings(config, saved.weights, saved.optimizer, earlier, on_progress)
    idle = {_layer(finding) for finding in found.findings if finding.check in ("dead_expert", "collapsed_layer")}
    found.add(GRADIENTS, [finding for finding in unused if _layer(finding) not in idle])
    return found


def _layer(finding: Finding) -> str:
    """Return the layer that a finding is about, so that one fault is not said twice."""
    return finding.where.split(",")[0]


def _saved(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the verified checkpoint of a path, None if there is none, and a line for each damaged one."""
    run = Run(run_of(path))
    if is_step(path):
        return load_checkpoint(path), []
    if not list_checkpoints(run.checkpoints_path):
        return None, []
    try:
        saved, _, problems = load_latest_checkpoint(run.checkpoints_path)
    except CheckpointError as error:
        return None, [str(error)]
    return saved, problems


def _earlier(run: Run, saved: Checkpoint) -> Mapping[str, Any] | None:
    """Return the weights of the run's oldest checkpoint before the one that is examined; None if there is none."""
    for info in list_checkpoints(run.checkpoints_path):
        if info.step < saved.step:
            try:
                return load_checkpoint(info.path).weights
            except CheckpointError:
                continue
    return None


def _checkpoint(path: str | Path, quick: bool, on_progress: Progress | None) -> Diagnosis:
    checkpoint = open_checkpoint(checkpoint_folder(path))
    spec, weights = checkpoint.spec, checkpoint.weights
    found = Diagnosis(str(path), "huggingface")
    found.add(CONFIG, list(router_findings(spec)))
    found.add("memory", memory_findings(_stored_bytes(weights)))
    if quick:
        found.skipped[PARAMETERS] = _QUICK
    else:
        found.add(PARAMETERS, weight_findings(spec, weights, on_progress))
    found.skipped[METRICS] = found.skipped[GRADIENTS] = "a Hugging Face checkpoint has neither metrics nor moments"
    return found


def _stored_bytes(weights: LazyWeights) -> int:
    sizes = {name: math.prod(shape) * weights.dtypes[name].itemsize for name, shape in weights.shapes.items()}
    return sum(weights.stored_bytes(name) or size for name, size in sizes.items())


def _damaged(problem: str, why: str) -> Finding:
    return Finding(
        "warning",
        "damaged_file",
        problem.rstrip("."),
        "the run's folder",
        why,
        "Restore the file from a copy, if there is one.",
    )
