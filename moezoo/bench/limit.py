"""What the machine allows: the contender that does nothing but the model's matrix products, or reads its weights.

`train`, `forward`, `gradients`: for every matrix that a token uses, one float32 product by NumPy's OpenBLAS with all
rows at once, `[rows, inner] x [inner, columns]`: rows are the B T tokens, or the B T K routed copies of an expert's
matrix. Forward and backward make three of it, the product itself and those for the gradients of input and weight.
Scores of grouped heads are two such products, with B T N rows and the mean number of visible positions as columns or
inner width. Nothing is sorted, gathered, normalized or activated, no expert is smaller than the whole, and no optimizer
runs. The rate of these products times the useful operations of `core/cost.py` is the limit's time: operations of parts
that have no such product here (scores of other kinds of attention) count at the same rate.

`decode`: the bytes that one token of each of B sequences must read, at the speed at which copies move bytes, read and
written ones together, by as many threads as there are cores and between arrays that no cache holds. They are every
matrix but tables that are looked up; of an expert's matrices the share of experts that B tokens touch on average,
`1 - (1 - K/E)^B`, if they choose evenly and independently; and the keys and values of the context.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from time import perf_counter

import numpy as np

from moezoo.bench.case import Case, Work
from moezoo.bench.machine import cores
from moezoo.core.cost.flops import flops_per_token
from moezoo.core.cost.memory import kv_cache_bytes_per_token
from moezoo.core.cost.parameters import active_experts
from moezoo.core.parameters import ROLES, Parameter, Role, parameter_table
from moezoo.core.spec import GroupedQueryAttentionSpec, ModelSpec, TiedHeadSpec

_COPIED = 256 << 20  # bytes, several times what caches hold
_FLOAT32_BYTES = 4  # of initial weights, whatever the compute dtype
_MIXTURE: tuple[Role, ...] = ("router", "routed experts", "shared experts")


@dataclass(frozen=True)
class Product:
    """`[rows, inner] x [inner, columns]`."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * self.rows * self.inner * self.columns


class Limit:
    """See the module."""

    def facts(self) -> dict[str, str]:
        config = np.show_config(mode="dicts")
        blas = config["Build Dependencies"]["blas"] if config else {}
        return {"products": f"NumPy {np.__version__}, {blas.get('name', 'unknown BLAS')} {blas.get('version', '')}"}

    def prepare(self, case: Case) -> Work:
        if case.kind == "decode":
            return _copies(bytes_per_step(case))
        made = products(case)
        backward = case.kind in ("train", "gradients")
        over_made = useful_flops(case) / (sum(product.flops for product in made) * (3 if backward else 1))
        run = _products(made, backward)
        return lambda repeats: run(repeats) * over_made


def make() -> Limit:
    """The contender."""
    return Limit()


def mixture_of(spec: ModelSpec) -> ModelSpec:
    """The model less all layers but the first that has a mixture, whose parts and costs are then that mixture's."""
    layer = spec.all_layers[spec.moe_layers[0]]
    return spec.model_copy(update={"layers": (layer.model_copy(update={"repeat": 1, "shortcut": False}),)})


def useful_flops(case: Case) -> int:
    """Operations of one unit on active parameters, as `core/cost.py` counts them."""
    if case.kind == "decode":
        raise ValueError("decoding is limited by bytes")
    spec = case.spec if case.kind == "train" else mixture_of(case.spec)
    flops = flops_per_token(spec, case.config.training.sequence_length, training=case.kind != "forward")
    if case.kind == "train":
        return flops.total * case.tokens
    return (flops.router + flops.routed_experts + flops.shared_experts) * case.tokens


def products(case: Case) -> list[Product]:
    """The forward products of one unit, as the module says."""
    if case.kind == "train":
        length = case.config.training.sequence_length
        return [*matrix_products(case.spec, case.tokens), *score_products(case.spec, case.tokens, length)]
    return list(matrix_products(mixture_of(case.spec), case.tokens, of=_MIXTURE))


def matrix_products(spec: ModelSpec, tokens: int, of: Sequence[Role] = ROLES) -> Iterator[Product]:
    """A product for each matrix that tokens are multiplied with, of some roles."""
    for row, times in _used_matrices(spec):
        if row.role in of:
            yield Product(round(tokens * times), *_sides(row))


def score_products(spec: ModelSpec, tokens: int, length: int) -> Iterator[Product]:
    """Two products for each layer of grouped heads: queries with keys, probabilities with values."""
    seen = (length + 2) // 2
    for layer in spec.all_layers:
        attention = layer.attention
        if isinstance(attention, GroupedQueryAttentionSpec):
            most = attention.window if attention.chunk is None else attention.chunk
            visible = seen if most is None else min(seen, most)
            yield Product(tokens * attention.num_heads, attention.head_dim, visible)
            yield Product(tokens * attention.num_heads, visible, attention.value_dim)


def bytes_per_step(case: Case) -> int:
    """Bytes of weights and cache that one more token of each sequence of a batch must read, when half of it is done."""
    weights = Fraction(0)
    for row, times in _used_matrices(case.spec):
        touched = Fraction(1)
        if _is_routed(row):
            touched -= (1 - min(times / row.shape[0], Fraction(1))) ** case.batch
        weights += touched * row.size
    cache = kv_cache_bytes_per_token(case.spec) * case.batch * (case.context + case.new_tokens // 2)
    return round(weights * _FLOAT32_BYTES) + cache


def _is_routed(row: Parameter) -> bool:
    return row.role == "routed experts" and ".experts." in row.name


def _used_matrices(spec: ModelSpec) -> Iterator[tuple[Parameter, Fraction]]:
    """Rows of the table that tokens are multiplied with, and how many times each token is."""
    layers = spec.all_layers
    tied = isinstance(spec.head, TiedHeadSpec)
    for row in parameter_table(spec):
        if not row.decay:
            continue
        if row.role == "embeddings" and row.name != ("embedding.weight" if tied else "head.w_head"):
            continue  # looked up
        times = Fraction(1)
        if _is_routed(row):
            moe = layers[int(row.name.split(".")[1])].moe
            assert moe is not None
            times = active_experts(moe)
        yield row, times


def _sides(row: Parameter) -> tuple[int, int]:
    """Inner and outer width of a matrix whose heads are joined, of one expert where it has several."""
    shape = row.shape[1:] if _is_routed(row) else row.shape
    if row.axes[-1] == "embed":
        return prod(shape[:-1]), shape[-1]
    return shape[0], prod(shape[1:])


def _products(made: list[Product], backward: bool) -> Work:
    """Do them; equal ones share their operands, which are far larger than caches where it matters."""
    generator = np.random.default_rng(2)

    def normal(rows: int, columns: int) -> np.ndarray:
        return generator.standard_normal((rows, columns), dtype=np.float32)

    operands = {
        each: (
            normal(each.rows, each.inner),
            normal(each.inner, each.columns),
            normal(each.rows, each.columns),
            np.empty((each.rows, each.columns), np.float32),
            np.empty((each.rows, each.inner), np.float32),
            np.empty((each.inner, each.columns), np.float32),
        )
        for each in set(made)
    }

    def run(repeats: int) -> float:
        begin = perf_counter()
        for _ in range(repeats):
            for each in made:
                x, w, out_gradient, out, x_gradient, w_gradient = operands[each]
                np.matmul(x, w, out=out)
                if backward:
                    np.matmul(out_gradient, w.T, out=x_gradient)
                    np.matmul(x.T, out_gradient, out=w_gradient)
        return perf_counter() - begin

    return run


def _copies(size: int) -> Work:
    """Time in which copies move `size` bytes a unit, half read and half written, with a part on each core."""
    threads = cores()
    source, target = np.ones((threads, _COPIED // threads), np.uint8), np.ones((threads, _COPIED // threads), np.uint8)
    moved = source.size + target.size
    pool = ThreadPoolExecutor(threads)

    def run(repeats: int) -> float:
        copies = max(1, round(repeats * size / moved))
        begin = perf_counter()
        for _ in range(copies):
            list(pool.map(np.copyto, target, source))
        return (perf_counter() - begin) * repeats * size / (copies * moved)

    return run
