"""Who takes part, and in which process environment. Peers are never dependencies: they run where they are installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from moezoo.backends import NAMES, missing_packages
from moezoo.bench.case import Kind
from moezoo.core.errors import BackendError, nearest


@dataclass(frozen=True)
class Entry:
    """One contender.

    Fields:
        maker: `module:function` that makes it, in its own process.
        packages: what must be importable.
        asked: it is so slow to time that it runs only when it is named.
        kinds: the kinds of case that it takes part in.
        environment: variables of its process, beside those of this one; None: without it.
    """

    maker: str
    packages: tuple[str, ...] = ()
    asked: bool = False
    kinds: tuple[Kind, ...] = get_args(Kind)
    environment: Mapping[str, str | None] = field(default_factory=dict)


# Trap: where OPENBLAS_CORETYPE names an older processor, for the sake of older libraries, NumPy's products are slow.
LIMIT = Entry("moezoo.bench.limit:make", environment={"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None})
OWN = {name: Entry(f"moezoo.bench.own:make_{name}") for name in NAMES}
_TORCH, _TORCH_PACKAGES = "moezoo.bench.peers.transformers", ("torch", "transformers")
_MLX_LM, _MLX_LM_PACKAGES = "moezoo.bench.peers.mlx_lm", ("mlx_lm", "mlx")
PEERS = {
    "transformers": Entry(f"{_TORCH}:make_grouped", _TORCH_PACKAGES),
    "transformers-eager": Entry(f"{_TORCH}:make_eager", _TORCH_PACKAGES),
    "transformers-compiled": Entry(
        f"{_TORCH}:make_compiled", _TORCH_PACKAGES, asked=True, kinds=("train", "forward", "gradients")
    ),
    "mlx-lm": Entry(f"{_MLX_LM}:make", _MLX_LM_PACKAGES),
    "mlx-lm-as-installed": Entry(f"{_MLX_LM}:make_as_installed", _MLX_LM_PACKAGES, asked=True),
}


def chosen(backends: str | None, peers: str | None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Contenders by name, and for each that is left out, why.

    Args:
        backends: names of backends, comma-separated; None: those that are installed.
        peers: names, comma-separated, `none` or `all`; None: those that are installed and not slow to time.

    Raises BackendError: a name that is unknown, or a contender that was named and is not installed.
    """
    entries: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for name in NAMES if backends is None else _names(backends, NAMES, "backend"):
        missing = missing_packages(name)
        if missing and backends is not None:
            raise BackendError(_advice(name, missing))
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
        else:
            entries[name] = OWN[name]
    if peers == "none":
        return entries, left_out
    named = () if peers in (None, "all") else _names(str(peers), tuple(PEERS), "peer")
    for name, entry in PEERS.items():
        if named and name not in named:
            continue
        missing = _missing(entry.packages)
        if missing and named:
            raise BackendError(_advice(name, missing))
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
        elif entry.asked and peers is None:
            left_out[name] = "slow to time; it runs when --peers names it"
        else:
            entries[name] = entry
    return entries, left_out


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BackendError(f"no such {what}; got {name!r}{nearest(name, known)}; expected {', '.join(known)}.")
    if not names:
        raise BackendError(f"no {what} is named; got {text!r}; expected {', '.join(known)}.")
    return list(dict.fromkeys(names))


def _missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _advice(name: str, packages: Sequence[str]) -> str:
    return (
        f"contender {name} is not installed; missing {', '.join(packages)}. "
        f"Run `pip install {' '.join(package.replace('_', '-') for package in packages)}`, or leave it out."
    )
