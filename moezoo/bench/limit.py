"""Hardware limit: a contender that runs only the matrix products of a model, or only reads its weights.

`train`, `forward`, `gradients`: for every matrix that a token uses, one float32 product by NumPy's OpenBLAS with all
rows at once, `[rows, inner] x [inner, columns]`: rows are the B T tokens, or the B T K token-expert assignments for an
expert's matrix. Forward and backward together are three products: the output and the gradients of input and weight.
Scores of grouped-query attention are two products, with B T N rows and the mean number of visible positions as columns
or inner width. There is no sorting, gathering, normalization, activation or optimizer, and the assignments of all
experts are one large product. The limit's time is the useful FLOPs of `core/cost` divided by the rate of these
products: parts without a product here (scores of other kinds of attention) are assumed to have the same rate.

`decode`: the bytes that must be read for one token of each of B sequences, divided by the bandwidth of copies (bytes
read plus bytes written) with one thread per core, between arrays larger than the caches. These are all matrices except
embedding tables; of the experts' matrices the expected share used by B tokens that choose uniformly and independently,
`1 - (1 - K/E)^B`; and the keys and values of the context. A weight in codes has their bits and 64 for the float32 scale
and bias of a group of 64.
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
from moezoo.core.cost.flops import flops_per_token, mean_visible, most_visible
from moezoo.core.cost.memory import kv_cache_bytes_per_token
from moezoo.core.cost.parameters import is_routed, used_parameters
from moezoo.core.parameters import ROLES, Parameter, Role, parameter_table
from moezoo.core.spec import GroupedQueryAttentionSpec, ModelSpec, TiedHeadSpec

_COPIED = 256 << 20  # bytes, several times the size of the caches
_FLOAT32_BYTES = 4  # of initial weights, whatever the compute dtype
_MOE_ROLES: tuple[Role, ...] = ("router", "routed experts", "shared experts")


@dataclass(frozen=True)
class Product:
    """A matrix product `[rows, inner] x [inner, columns]`."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """FLOPs, two per multiply-add."""
        return 2 * self.rows * self.inner * self.columns


class Limit:
    """The hardware limit as a contender; see the module docstring."""

    def facts(self) -> dict[str, str]:
        config = np.show_config(mode="dicts")
        blas = config["Build Dependencies"]["blas"] if config else {}
        return {"products": f"NumPy {np.__version__}, {blas.get('name', 'unknown BLAS')} {blas.get('version', '')}"}

    def prepare(self, case: Case) -> Work:
        if case.kind == "decode":
            return _copies(bytes_per_step(case))
        case_products = products(case)
        backward = case.kind in ("train", "gradients")
        flops = sum(product.flops for product in case_products) * (3 if backward else 1)
        run, scale = _products(case_products, backward), useful_flops(case) / flops
        return lambda repeats: run(repeats) * scale


def make() -> Limit:
    """Create the contender."""
    return Limit()


def first_moe_layer(spec: ModelSpec) -> ModelSpec:
    """Return the model with only its first MoE layer, so that parameters and costs are those of that layer."""
    layer = next(layer for layer in spec.all_layers if layer.moe is not None)
    return spec.model_copy(update={"layers": (layer.model_copy(update={"repeat": 1, "shortcut": False}),)})


def useful_flops(case: Case) -> int:
    """Return the FLOPs of one unit on active parameters, as counted by `core/cost`."""
    if case.kind == "decode":
        raise ValueError("decoding is limited by bytes")
    spec = case.spec if case.kind == "train" else first_moe_layer(case.spec)
    flops = flops_per_token(spec, case.config.training.sequence_length, training=case.kind != "forward")
    if case.kind == "train":
        return flops.total * case.tokens
    return (flops.router + flops.routed_experts + flops.shared_experts) * case.tokens


def products(case: Case) -> list[Product]:
    """Return the forward products of one unit; see the module docstring."""
    if case.kind == "train":
        length = case.config.training.sequence_length
        return [*matrix_products(case.spec, case.tokens), *score_products(case.spec, case.tokens, length)]
    return list(matrix_products(first_moe_layer(case.spec), case.tokens, roles=_MOE_ROLES))


def matrix_products(spec: ModelSpec, tokens: int, roles: Sequence[Role] = ROLES) -> Iterator[Product]:
    """Yield a product for each weight matrix with one of the roles."""
    for row, times in _used_matrices(spec):
        if row.role in roles:
            inner, columns = _sides(row)
            if is_routed(row) or times == 1:
                yield Product(round(tokens * times), inner, columns)
            elif row.axes[-1] == "embed":  # of the heads that a router chose
                yield Product(tokens, round(inner * times), columns)
            else:
                yield Product(tokens, inner, round(columns * times))


def score_products(spec: ModelSpec, tokens: int, length: int) -> Iterator[Product]:
    """Yield two products for each grouped-query attention: queries x keys, probabilities x values.

    With a router over heads they are of the chosen ones. Relative positions and indexers have one more.
    """
    for layer in spec.all_layers:
        attention = layer.attention
        if isinstance(attention, GroupedQueryAttentionSpec):
            most, rows = most_visible(attention), round(tokens * attention.num_heads * layer.head_share)
            visible = round(mean_visible(length, most, in_chunks=attention.chunk is not None))
            yield Product(rows, attention.head_dim, visible)
            yield Product(rows, visible, attention.value_dim)
            if (relative := attention.relative) is not None:
                near = relative.extent if most is None else min(relative.extent, most)
                yield Product(rows, relative.dim, round(mean_visible(length, near)))
            if (indexer := attention.indexer) is not None:
                every = indexer.block_size if indexer.pooled == "keys" else 1
                yield Product(tokens * indexer.num_heads, indexer.head_dim, round(mean_visible(length, None) / every))


def bytes_per_step(case: Case) -> int:
    """Return the bytes of weights and KV cache read for one decoding step, halfway through the generation."""
    weights = Fraction(0)
    for row, times in _used_matrices(case.spec):
        share = Fraction(1)  # of the matrix's experts
        if is_routed(row):
            share -= (1 - min(times / row.shape[0], Fraction(1))) ** case.batch
        weights += share * row.size * _weight_bytes(row, case.bits)
    cache = kv_cache_bytes_per_token(case.spec) * case.batch * (case.context + case.new_tokens // 2)
    return round(weights) + cache


def _weight_bytes(row: Parameter, bits: int) -> Fraction:
    width = 8 if row.role == "router" else bits
    return Fraction(width + 1, 8) if bits else Fraction(_FLOAT32_BYTES)  # 64 bits per 64 numbers


def _used_matrices(spec: ModelSpec) -> Iterator[tuple[Parameter, Fraction]]:
    """Yield the table's rows that are factors of matrix products, and the number of products per token."""
    layers = spec.all_layers
    tied = isinstance(spec.head, TiedHeadSpec)
    for row in parameter_table(spec):
        if not row.decay:
            continue
        if row.role == "embeddings" and row.name != ("embedding.weight" if tied else "head.w_head"):
            continue  # table lookup
        used = used_parameters(row, layers) / row.size
        yield row, used * row.shape[0] if is_routed(row) else used


def _sides(row: Parameter) -> tuple[int, int]:
    """Return input and output width of a matrix with heads merged; for routed experts, of one expert."""
    shape = row.shape[1:] if is_routed(row) else row.shape
    if row.axes[-1] == "embed":
        return prod(shape[:-1]), shape[-1]
    return shape[0], prod(shape[1:])


def _products(case_products: list[Product], backward: bool) -> Work:
    """Run products; equal ones share their operands, which are much larger than the caches in relevant cases."""
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
        for each in set(case_products)
    }

    def run(repeats: int) -> float:
        begin = perf_counter()
        for _ in range(repeats):
            for each in case_products:
                x, w, out_gradient, out, x_gradient, w_gradient = operands[each]
                np.matmul(x, w, out=out)
                if backward:
                    np.matmul(out_gradient, w.T, out=x_gradient)
                    np.matmul(x.T, out_gradient, out=w_gradient)
        return perf_counter() - begin

    return run


def _copies(size: int) -> Work:
    """Measure the time to copy `size` bytes per unit, half read and half written, with one thread per core."""
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
