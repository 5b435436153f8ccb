"""Benchmark contenders and their process environments. Peers are not dependencies: they run only if installed."""

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
        maker: `module:function` that creates it in its own process.
        packages: required packages.
        opt_in: it takes so long that it runs only if it is named.
        kinds: supported kinds of cases.
        environment: additional environment variables of its process; None removes a variable.
    """

    maker: str
    packages: tuple[str, ...] = ()
    opt_in: bool = False
    kinds: tuple[Kind, ...] = get_args(Kind)
    environment: Mapping[str, str | None] = field(default_factory=dict)


# Trap: if OPENBLAS_CORETYPE is set to an older processor, e.g. for older libraries, NumPy's products are slow.
LIMIT = Entry("moezoo.bench.limit:make", environment={"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None})
OWN = {name: Entry(f"moezoo.bench.own:make_{name}") for name in NAMES}
_TORCH, _TORCH_PACKAGES = "moezoo.bench.peers.transformers", ("torch", "transformers")
_MLX_LM, _MLX_LM_PACKAGES = "moezoo.bench.peers.mlx_lm", ("mlx_lm", "mlx")
PEERS = {
    "transformers": Entry(f"{_TORCH}:make_grouped", _TORCH_PACKAGES),
    "transformers-eager": Entry(f"{_TORCH}:make_eager", _TORCH_PACKAGES),
    "transformers-compiled": Entry(
        f"{_TORCH}:make_compiled", _TORCH_PACKAGES, opt_in=True, kinds=("train", "forward", "gradients")
    ),
    "mlx-lm": Entry(f"{_MLX_LM}:make", _MLX_LM_PACKAGES),
    "mlx-lm-as-installed": Entry(f"{_MLX_LM}:make_as_installed", _MLX_LM_PACKAGES, opt_in=True),
}


def select_contenders(backends: str | None, peers: str | None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the selected contenders by name, and the reason for each skipped one.

    Args:
        backends: comma-separated names of backends; None: all installed ones.
        peers: comma-separated names, `none` or `all`; None: the installed ones that are not slow.

    Raises BackendError: an unknown name, or a named contender that is not installed.
    """
    entries: dict[str, Entry] = {}
    skipped: dict[str, str] = {}
    for name in NAMES if backends is None else _names(backends, NAMES, "backend"):
        missing = missing_packages(name)
        if missing and backends is not None:
            raise BackendError(_advice(name, missing))
        if missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
        else:
            entries[name] = OWN[name]
    if peers == "none":
        return entries, skipped
    named = () if peers in (None, "all") else _names(str(peers), tuple(PEERS), "peer")
    for name, entry in PEERS.items():
        if named and name not in named:
            continue
        missing = _missing(entry.packages)
        if missing and named:
            raise BackendError(_advice(name, missing))
        if missing:
            skipped[name] = f"not installed: {', '.join(missing)}"
        elif entry.opt_in and peers is None:
            skipped[name] = "slow; runs only if named in --peers"
        else:
            entries[name] = entry
    return entries, skipped


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BackendError(
                f"no such {what}; got {name!r}{nearest(name, known)}; expected one of {', '.join(known)}."
            )
    if not names:
        raise BackendError(f"no {what} is named; got {text!r}; expected one or more of {', '.join(known)}.")
    return list(dict.fromkeys(names))


def _missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _advice(name: str, packages: Sequence[str]) -> str:
    return (
        f"contender {name} is not installed; missing {', '.join(packages)}. "
        f"Run `pip install {' '.join(package.replace('_', '-') for package in packages)}`, or do not name it."
    )
