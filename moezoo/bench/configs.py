"""Benchmark models: S and M, others by the file or name of their config."""

from pathlib import Path

from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.shipped import config_file
from moezoo.core.errors import SpecError
from moezoo.core.files import PACKAGE

NAMES = {"S": "small", "M": "medium"}

_SMOKE = (
    *("model.vocab_size=64", "model.embed_dim=32", "model.layers[0].repeat=2"),
    *("model.layers[0].attention.head_dim=8", "model.layers[0].attention.num_heads=4"),
    *("model.layers[0].attention.num_kv_heads=2", "model.layers[0].moe.num_experts=4"),
    *("model.layers[0].moe.experts.hidden_dim=24", "training.batch_size=2", "training.sequence_length=16"),
)
_SWEEP = (
    *("model.embed_dim=256", "model.layers[0].repeat=2", "model.layers[0].moe.router.top_k=2"),
    "model.layers[0].moe.experts.hidden_dim=256",
)


def bench_config(name: str) -> Config:
    """Load S, M, or a config by file or name. Raises SpecError: no such config, or a vocabulary size of null."""
    path = config_path(name)
    config = load_config(path)
    if config.model.vocab_size is None:
        raise SpecError(
            f"model.vocab_size is null ({path}); expected a number, since the benchmark uses random tokens. "
            "Set it in the config."
        )
    return config


def config_path(name: str) -> Path:
    """Return the config file of S, M, a path or a name. Raises SpecError: no such file."""
    if name not in NAMES:
        path = config_file(name)
        if not path.is_file():
            raise SpecError(f"no such config; got {name!r}; expected S, M, or the path or name of a YAML config.")
        return path
    return PACKAGE / "configs" / "bench" / f"{NAMES[name]}.yaml"


def smoke_config() -> Config:
    """Return a tiny model for smoke tests."""
    return load_config(config_path("S"), _SMOKE)


def sweep_config(base: Config | None, num_experts: int) -> Config:
    """Return a model of the sweep: width 256, 2 layers, top-2 of `num_experts` experts of width 256.

    Heads, vocabulary, batch size and sequence length are those of S. With `base`, return it with `num_experts` experts.
    """
    if base is None:
        return load_config(config_path("S"), (*_SWEEP, f"model.layers[0].moe.num_experts={num_experts}"))
    (layer,) = base.model.layers
    assert layer.moe is not None
    moe = layer.moe.model_copy(update={"num_experts": num_experts})
    model = base.model.model_copy(update={"layers": (layer.model_copy(update={"moe": moe}),)})
    return base.model_copy(update={"model": model})
