import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from moezoo.core.reference.experts import experts, grouped_product
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.spec import ClampedSwiGLUSpec, ExpertsSpec, GatedFeedForwardSpec, PlainFeedForwardSpec
from tests.support.backends_available import require_backend
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import D, E, F, Twin, assert_layer_matches, assert_reference_gradient, normal

PATHS = {"jax": ("blocks", "openblas", "ragged_dot", "tokamax"), "mlx": ("slices", "gather_mm of rows")}
# Rows of each of the 7 experts. A block has 16 rows up to R = 298, then 32, then 64 from R = 598.
SIZES = {
    "uneven, some empty": [0, 17, 1, 0, 9, 3, 0],
    "fewer rows than one block": [1, 0, 0, 2, 0, 0, 0],
    "all rows to the first expert": [50, 0, 0, 0, 0, 0, 0],
    "all rows to the last expert": [0, 0, 0, 0, 0, 0, 50],
    "whole blocks": [16, 32, 0, 16, 16, 48, 16],
    "one more than a block each": [17, 17, 17, 17, 17, 17, 17],
    "blocks of 64 rows": [0, 300, 65, 63, 1, 0, 171],
    "one row": [0, 0, 0, 1, 0, 0, 0],
}


UNEVEN = SIZES["uneven, some empty"]
SWIGLU = GatedFeedForwardSpec(hidden_dim=F)
SPECS = {
    "swiglu": SWIGLU,
    "swiglu, bounded": GatedFeedForwardSpec(hidden_dim=F, limit=0.5),
    "geglu, bias": GatedFeedForwardSpec(kind="geglu", hidden_dim=F, bias=True),
    "clamped_swiglu": ClampedSwiGLUSpec(hidden_dim=F, limit=1.5),
    "relu_squared": PlainFeedForwardSpec(kind="relu_squared", hidden_dim=F),
    "gelu, bias": PlainFeedForwardSpec(kind="gelu", hidden_dim=F, bias=True),
    "silu, one wide": PlainFeedForwardSpec(kind="silu", hidden_dim=1),
}


on_every_path = pytest.mark.parametrize(
    ("twin", "path"), [(name, path) for name, paths in PATHS.items() for path in paths], indirect=True
)


@pytest.fixture
def path(request, twin, monkeypatch) -> str:
    """A way of computing a grouped product, whatever this platform would take."""
    monkeypatch.setattr(kernels_of(twin), "grouped_path", lambda: request.param)
    if request.param == "openblas":
        if twin.module("kernels.openblas").load() is None:
            pytest.skip("SciPy brings no OpenBLAS here")
        monkeypatch.setattr(kernels_of(twin), "SMALLEST_PRODUCT", 0)
    if request.param == "tokamax":
        monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(ragged_dot=kernel_in_place_of_tokamax))
    return request.param


def kernel_in_place_of_tokamax(x, w, size, implementation):
    """The product that tokamax promises, with all that it does not: its kernels need a GPU.

    Rows of no group are NaN, and so are their gradients and those of the matrices of empty groups.
    """
    import jax
    import jax.numpy as jnp

    assert implementation == ("mosaic", "triton")

    def spoiled(x_gradient, w_gradient):
        used = (jnp.arange(x.shape[0]) < size.sum())[:, None]
        return jnp.where(used, x_gradient, jnp.nan), jnp.where(size[:, None, None] > 0, w_gradient, jnp.nan)

    @jax.custom_vjp
    def kernel(x, w):
        used = (jnp.arange(x.shape[0]) < size.sum())[:, None]
        return jnp.where(used, jax.lax.ragged_dot(x, w, size), jnp.nan)

    def forward(x, w):
        return kernel(x, w), (x, w)

    def backward(saved, gradient):
        return spoiled(*jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, size), *saved)[1](gradient))

    kernel.defvjp(forward, backward)
    return kernel(x, w)


def values_of(spec: ExpertsSpec = SWIGLU, num_experts: int = E) -> dict[str, np.ndarray]:
    values = {
        "w_gate": 0.3 * normal(1, num_experts, D, spec.hidden_dim),
        "w_up": 0.3 * normal(2, num_experts, D, spec.hidden_dim),
        "w_down": 0.3 * normal(3, num_experts, spec.hidden_dim, D),
        "b_gate": 0.3 * normal(4, num_experts, spec.hidden_dim),
        "b_up": 0.3 * normal(5, num_experts, spec.hidden_dim),
        "b_down": 0.3 * normal(6, num_experts, D),
    }
    plain = isinstance(spec, PlainFeedForwardSpec)
    return {
        name: value
        for name, value in values.items()
        if (spec.bias or name.startswith("w_")) and not (plain and name.endswith("gate"))
    }


def layer_of(twin: Twin, values: dict[str, np.ndarray], spec: ExpertsSpec = SWIGLU):
    return twin.module("experts").Experts(spec, twin.weights(values))


def assert_experts_match(twin: Twin, spec: ExpertsSpec, sizes: list[int], unused: int = 0, **options) -> None:
    """Rows beyond the sum of sizes may give anything finite: they are weighted with zero, as `combine` does."""
    size_E, num_rows = twin.array(sizes), sum(sizes) + unused
    used_R1 = (np.arange(num_rows) < sum(sizes)).astype(float)[:, None]
    weight_R1 = twin.array(used_R1, options.get("dtype"))
    assert_layer_matches(
        twin,
        layer_of(twin, values_of(spec), spec),
        lambda layer, x: weight_R1 * layer(x, size_E),
        lambda values, x: used_R1 * experts(spec, values, x, np.array(sizes)),
        values_of(spec),
        normal(0, num_rows, D),
        **options,
    )


def kernels_of(twin: Twin) -> ModuleType:
    """The grouped products of a backend."""
    return twin.module("kernels.grouped_product")


def on_cpu(twin: Twin) -> bool:
    return "cpu" in twin.backend().facts()["device"]


def assert_grouped_product_matches(twin: Twin, sizes: list[int], **tolerances) -> None:
    products, size_E, num_rows = kernels_of(twin), twin.array(sizes), sum(sizes)

    def on_device(_, x_RD, w_EDF):
        return products.grouped_product(x_RD, w_EDF, products.group_rows(size_E, num_rows))

    def reference(_, x_RD, w_EDF):
        return grouped_product(x_RD, w_EDF, np.array(sizes))

    assert_layer_matches(
        twin, None, on_device, reference, {}, normal(0, num_rows, D), normal(1, len(sizes), D, F), **tolerances
    )


@pytest.mark.parametrize(
    ("platform", "installed", "expected"),
    [
        *[("cpu", True, "openblas"), ("cpu", False, "blocks")],
        *[("tpu", True, "ragged_dot"), ("gpu", True, "tokamax"), ("gpu", False, "blocks")],
    ],
)
def test_jax_chooses_its_path_by_platform_and_by_what_is_installed(monkeypatch, platform, installed, expected):
    require_backend("jax")
    module = kernels_of(Twin("jax"))
    monkeypatch.setattr(module.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(module.openblas, "load", lambda: "OpenBLAS" if installed else None)
    assert module._grouped_path.__wrapped__(module.platform()) == expected


@on_every_path
@pytest.mark.parametrize("kind", SIZES)
def test_grouped_product_and_its_gradients_match_the_reference_on_every_path(twin, path, kind):
    assert_grouped_product_matches(twin, SIZES[kind])


@on_every_path
def test_grouped_product_of_one_expert_is_a_plain_product(twin, path):
    assert_grouped_product_matches(twin, [37])


@on_every_path
@pytest.mark.parametrize("kind", ["uneven, some empty", "fewer rows than one block"])
def test_grouped_product_of_bfloat16_is_near_float32(twin, path, kind):
    if path == "gather_mm of rows" and on_cpu(twin):
        with pytest.raises(RuntimeError, match="only supports float32"):  # MLX's own limit, hence the other path
            assert_grouped_product_matches(twin, SIZES[kind], dtype="bfloat16")
        return
    assert_grouped_product_matches(
        twin,
        SIZES[kind],
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


@on_every_path
@pytest.mark.parametrize("kind", ["uneven, some empty", "fewer rows than one block"])
def test_bfloat16_matrices_give_what_their_numbers_in_float32_give(twin, path, kind):
    products, size_E, num_rows = kernels_of(twin), twin.array(SIZES[kind]), sum(SIZES[kind])
    x_RD, w_EDF = twin.array(normal(0, num_rows, D)), twin.array(normal(1, E, D, F), "bfloat16")
    groups = products.group_rows(size_E, num_rows)
    found = products.grouped_product(x_RD, w_EDF, groups)
    expected = products.grouped_product(x_RD, twin.array(twin.numpy(w_EDF)), groups)
    assert_close(twin.numpy(found), twin.numpy(expected), FLOAT32)


@on_every_path
def test_rows_of_other_experts_do_not_leak_in(twin, path):
    """Expert 2's rows are huge; its neighbours' results and weight gradients stay small, wherever a block ends."""
    products, sizes = kernels_of(twin), [5, 3, 20, 4]
    x_RD = normal(0, 32, D)
    x_RD[8:28] *= 1e20
    size_E, w_EDF = twin.array(sizes), twin.array(normal(1, 4, D, F))
    out, _, (_, w_gradient) = twin.value_and_gradients(
        lambda _, x, w: products.grouped_product(x, w, products.group_rows(size_E, 32)),
        np.ones((32, F)),
        None,
        twin.array(x_RD),
        w_EDF,
    )
    others = np.r_[0:8, 28:32]
    assert np.max(np.abs(twin.numpy(out)[others])) < 1e3
    assert np.max(np.abs(w_gradient[[0, 1, 3]])) < 1e3
    assert np.max(np.abs(w_gradient[2])) > 1e19


@on_every_path
@pytest.mark.parametrize("few", [False, True], ids=["many", "few"])
def test_rows_of_other_experts_do_not_leak_through_the_whole_feed_forward(twin, path, monkeypatch, few):
    """As above. Between the products expert 2's rows give infinities, which must not meet its neighbours' zeros."""
    monkeypatch.setattr(kernels_of(twin), "few_rows", lambda *sizes: few)
    values = {name: value[:4] for name, value in values_of().items()}
    x_RD = normal(0, 32, D)
    x_RD[8:28] *= 1e20
    size_E, others = twin.array([5, 3, 20, 4]), np.r_[0:8, 28:32]
    layer = layer_of(twin, values)
    out, gradients, _ = twin.value_and_gradients(
        lambda layer, x: layer(x, size_E)[twin.array(others)], np.ones((12, D)), layer, twin.array(x_RD)
    )
    assert np.max(np.abs(twin.numpy(out))) < 1e5
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient[[0, 1, 3]])), name
        assert np.max(np.abs(gradient[[0, 1, 3]])) > 0, name


@on_every_path
@pytest.mark.parametrize("kind", ["uneven, some empty", "fewer rows than one block", "whole blocks"])
def test_value_and_gradients_of_experts_match_the_reference(twin, path, kind):
    assert_experts_match(twin, SWIGLU, SIZES[kind])


@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec != SWIGLU], ids=[*SPECS][1:])
def test_experts_of_every_kind_match_the_reference(twin, spec):
    assert_experts_match(twin, spec, UNEVEN)


@pytest.mark.parametrize(
    ("sizes", "unused"),
    [(UNEVEN, 40), ([0, 16, 0, 16, 0, 0, 15], 1), ([0] * E, 3)],
    ids=["more than used", "the last of a whole block", "all"],
)
@on_every_path
def test_unused_rows_change_nothing(twin, path, sizes, unused):
    assert_experts_match(twin, SPECS["geglu, bias"], sizes, unused)


@pytest.mark.parametrize("few", [False, True], ids=["many", "few"])
@pytest.mark.parametrize("kind", ["uneven, some empty", "one row", "one more than a block each", "blocks of 64 rows"])
@pytest.mark.parametrize("spec", ["swiglu", "geglu, bias", "gelu, bias"])
def test_blocks_of_few_and_of_many_rows_match_the_reference(twin, monkeypatch, few, kind, spec):
    module, taken = kernels_of(twin), []
    monkeypatch.setattr(module, "grouped_path", lambda: PATHS[twin.name][0])
    if twin.name == "mlx":
        monkeypatch.setattr(module, "FEW_ROWS", 100)  # rows an expert beyond which slices come before either
    monkeypatch.setattr(module, "few_rows", lambda *sizes: bool(taken.append(sizes)) or few)
    assert_experts_match(twin, SPECS[spec], SIZES[kind], 2)
    assert taken


@on_every_path
def test_rows_stay_finite_beside_unused_ones_of_any_size(twin, path):
    x_RD = normal(0, 40, D)
    x_RD[30:] = 1e30
    out = twin.numpy(layer_of(twin, values_of())(twin.array(x_RD), twin.array(UNEVEN)))
    assert_close(out[:30], experts(SWIGLU, values_of(), x_RD[:30], np.array(UNEVEN)), FLOAT32)


@pytest.mark.parametrize("kind", ["swiglu", "geglu, bias"])
def test_bfloat16_experts_are_near_float32(twin, kind):
    assert_experts_match(
        twin, SPECS[kind], UNEVEN, 2, dtype="bfloat16", tolerance=BFLOAT16, gradient_tolerance=BFLOAT16_GRADIENT
    )


def test_gradient_of_a_bias_is_summed_in_float32(twin):
    """1024 rows of one expert: a sum in bfloat16 would stop growing at 256."""
    spec, num_rows = SPECS["gelu, bias"], 1024
    size_E = twin.array([num_rows])
    _, named, _ = twin.value_and_gradients(
        lambda layer, x: layer(x, size_E),
        np.ones((num_rows, D)),
        layer_of(twin, values_of(spec, 1), spec),
        twin.array(normal(0, num_rows, D), "bfloat16"),
    )
    np.testing.assert_array_equal(named["b_down"], np.full((1, D), num_rows))


@on_every_path
def test_an_expert_without_rows_gets_no_gradient(twin, path):
    size_E = twin.array([0, 17, 1, 0, 9, 3, 0])
    _, named, _ = twin.value_and_gradients(
        lambda layer, x: layer(x, size_E),
        np.ones((30, D)),
        layer_of(twin, values_of()),
        twin.array(normal(0, 30, D)),
    )
    for name, gradient in named.items():
        np.testing.assert_array_equal(gradient[[0, 3, 6]], 0, err_msg=name)
        assert np.all(np.max(np.abs(gradient[[1, 2, 4, 5]]), axis=(1, 2)) > 0), name


def test_one_expert_is_a_dense_feed_forward(twin):
    values, x = values_of(num_experts=1), normal(0, 40, D)
    dense = {name: value[0] for name, value in values.items()}
    size_E = twin.array([40])
    assert_layer_matches(
        twin,
        layer_of(twin, values),
        lambda layer, x: layer(x, size_E),
        lambda values, x: feed_forward(SWIGLU, {name: value[0] for name, value in values.items()}, x),
        values,
        x,
    )
    assert_close(experts(SWIGLU, values, x, np.array([40])), feed_forward(SWIGLU, dense, x), FLOAT64)


@pytest.fixture
def openblas() -> ModuleType:
    require_backend("jax")
    module = Twin("jax").module("kernels.openblas")
    if module.load() is None:
        pytest.skip("SciPy brings no OpenBLAS here")
    return module


@pytest.mark.parametrize("threads", [1, 2, 3, 40])
def test_openblas_divides_its_rows_among_any_number_of_threads(openblas, monkeypatch, threads):
    monkeypatch.setattr(openblas.os, "sched_getaffinity", lambda _: range(threads))
    sizes, twin = np.array([0, 300, 65, 63, 1, 0, 171]), Twin("jax")
    x_RD, gradient_RF, w_EDF = normal(0, 602, D), normal(1, 602, F), normal(2, E, D, F)
    x_RD[600:] = gradient_RF[600:] = np.nan  # unused rows
    size_E, x, gradient, w = (twin.array(value) for value in (sizes, x_RD, gradient_RF, w_EDF))
    product = twin.numpy(openblas.grouped_rows(size_E, x, w))
    assert_close(product[:600], grouped_product(x_RD[:600], w_EDF, sizes), FLOAT32)
    product = twin.numpy(openblas.grouped_rows_transposed(size_E, (gradient, w), (gradient, w)))
    assert_close(product[:600], 2 * grouped_product(gradient_RF[:600], w_EDF.transpose(0, 2, 1), sizes), FLOAT32)
    assert not product[600:].any()
    ends = np.cumsum(sizes)
    expected = [x_RD[a:b].T @ gradient_RF[a:b] for a, b in zip(ends - sizes, ends, strict=True)]
    assert_close(twin.numpy(openblas.grouped_gradients(size_E, x, gradient)), np.stack(expected), FLOAT32)


@pytest.mark.parametrize(
    ("num_rows", "dtype", "expected"),
    [(2048, "float32", True), (1024, "float32", False), (28, "float32", False), (2048, "bfloat16", False)],
)
def test_openblas_gets_large_products_in_float32(openblas, num_rows, dtype, expected):
    import jax

    module = Twin("jax").module("kernels.expert_blocks")
    x_RD, *matrices = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((num_rows, 64), (E, 64, 32), (E, 32, 64)))
    kernel = module.expert_kernel(x_RD, dict(zip(("w_up", "w_down"), matrices, strict=True)))
    assert (kernel is module.grouped_experts) == expected


def test_an_error_on_the_way_to_openblas_reaches_the_caller(openblas, monkeypatch):
    monkeypatch.setattr(openblas, "_equal_shares", lambda *_: [(0,)])
    twin = Twin("jax")
    with pytest.raises(RuntimeError, match=r"TypeError: .* missing 1 required positional"):
        twin.numpy(openblas.grouped_rows(twin.array([4]), twin.array(normal(0, 4, D)), twin.array(normal(1, 1, D, F))))


@pytest.mark.parametrize("num_experts", [1, 7, 128])
@pytest.mark.parametrize("num_rows", [1, 30, 300, 4096, 100_000])
def test_block_is_a_power_of_two_about_half_the_mean_group(twin, num_rows, num_experts):
    block = kernels_of(twin).block_rows(num_rows, num_experts)
    assert block in (16, 32, 64, 128, 256)
    mean = num_rows / num_experts
    assert block == 16 or block <= 0.75 * mean
    assert block == 256 or 2 * block > 0.75 * mean


def test_reference_grouped_product_is_written_out():
    sizes = SIZES["uneven, some empty"]
    x_RD, w_EDF = normal(0, 30, D), normal(1, E, D, F)
    expert_R = np.repeat(np.arange(E), sizes)
    expected = np.stack([x_RD[r] @ w_EDF[expert_R[r]] for r in range(30)])
    assert_close(grouped_product(x_RD, w_EDF, np.array(sizes)), expected, FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    """Three experts, one without a row; the last of five rows is unused."""
    spec, sizes = SPECS["geglu, bias"], np.array([0, 3, 1])
    d, f = slice(4), slice(5)
    cut = {"w_gate": (d, f), "w_up": (d, f), "w_down": (f, d), "b_gate": (f,), "b_up": (f,), "b_down": (d,)}
    values = {name: value[(slice(3), *cut[name])] for name, value in values_of(spec).items()}
    assert_reference_gradient(
        lambda x, *own: experts(spec, dict(zip(values, own, strict=True)), x, sizes),
        normal(0, 5, 4),
        *values.values(),
    )
