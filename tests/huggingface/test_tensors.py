"""Rules of the tensor mapping: the parts of each tensor, and round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.core.huggingface.family import families
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, places

D, N, M, H, Z, O, E, F = 5, 6, 2, 4, 3, 2, 7, 11


def only(rule: Fused, shapes: dict[str, tuple[int, ...]]):
    (placed,) = places(rule, shapes, 1)
    return placed


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


def test_split_and_transpose() -> None:
    placed = only(Tensor("q.{layer}", "(n h) d", "l.{layer}.w", "d n h"), {"l.0.w": (D, N, H)})
    theirs = numbers(N * H, D)
    assert (placed.name, placed.shape, placed.ours) == ("q.0", (N * H, D), ("l.0.w",))
    np.testing.assert_array_equal(placed.holds(theirs, 0), theirs.T.reshape(D, N, H))


def test_one_tensor_per_expert() -> None:
    rule = Tensor("experts.{expert}.gate", "f d", "w_gate", "e d f")
    every = list(places(rule, {"w_gate": (E, D, F)}, 1))
    assert [placed.name for placed in every] == [f"experts.{expert}.gate" for expert in range(E)]
    assert (every[3].expert_count, every[3].expert_axis(0), every[3].parts[0][1]) == (E, 0, 3)
    np.testing.assert_array_equal(every[3].holds(numbers(F, D), 0), numbers(F, D).T)


def test_concatenated_parts() -> None:
    rule = Fused("kv_a", "x d", (Part("latent", "z", "d z"), Part("rope", "o", "d o")))
    placed, theirs = only(rule, {"latent": (D, Z), "rope": (D, O)}), numbers(Z + O, D)
    np.testing.assert_array_equal(placed.holds(theirs, 0), theirs[:Z].T)
    np.testing.assert_array_equal(placed.holds(theirs, 1), theirs[Z:].T)


def test_parts_within_each_head() -> None:
    rule = Fused("kv_b", "(n x) z", (Part("key", "h", "z n h"), Part("value", "v", "z n v")))
    placed, theirs = only(rule, {"key": (Z, N, H), "value": (Z, N, O)}), numbers(N * (H + O), Z)
    heads = theirs.reshape(N, H + O, Z)
    np.testing.assert_array_equal(placed.holds(theirs, 0), heads[:, :H].transpose(2, 0, 1))
    np.testing.assert_array_equal(placed.holds(theirs, 1), heads[:, H:].transpose(2, 0, 1))


def test_interleaved_parts() -> None:
    rule = Fused("gate_up", "e d (f x)", (Part("gate", "", "e d f"), Part("up", "", "e d f")))
    placed, theirs = only(rule, {"gate": (E, D, F), "up": (E, D, F)}), numbers(E, D, 2 * F)
    np.testing.assert_array_equal(placed.holds(theirs, 0), theirs[..., 0::2])
    np.testing.assert_array_equal(placed.holds(theirs, 1), theirs[..., 1::2])


def test_sizes_of_composed_axes_come_from_other_parameters() -> None:
    parts = (Part("beta", "g", "d (m g)"), Part("decay", "g", "d (m g)"))
    rule = Fused("ba", "(m x) d", parts, sizes=(("query", "d m h"),))
    placed = only(rule, {"beta": (D, N), "decay": (D, N), "query": (D, M, H)})
    theirs = numbers(2 * N, D)
    groups = theirs.reshape(M, 2, N // M, D)
    np.testing.assert_array_equal(placed.holds(theirs, 0), groups[:, 0].reshape(N, D).T)
    np.testing.assert_array_equal(placed.holds(theirs, 1), groups[:, 1].reshape(N, D).T)


def test_axes_of_size_one() -> None:
    rule = Fused("conv", "x 1 w", (Part("query", "m h", "w m h"), Part("value", "n z", "w n z")))
    placed, theirs = only(rule, {"query": (4, M, H), "value": (4, N, Z)}), numbers(M * H + N * Z, 1, 4)
    np.testing.assert_array_equal(placed.holds(theirs, 0), theirs[: M * H, 0].T.reshape(4, M, H))
    np.testing.assert_array_equal(placed.holds(theirs, 1), theirs[M * H :, 0].T.reshape(4, N, Z))


def test_a_rule_matches_nothing_in_layers_without_its_parameters() -> None:
    rule = Tensor("mlp.{layer}.gate", "e d", "layers.{layer}.moe.w_router", "d e")
    found = [placed.name for placed in places(rule, {"layers.1.moe.w_router": (D, E)}, 3)]
    assert found == ["mlp.1.gate"]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_put_inverts_holds(d: int, n: int, h: int, z: int, v: int) -> None:
    rule = Fused("kv_b", "(n x) z", (Part("key", "h", "z n h"), Part("value", "v", "z n v")))
    placed = only(rule, {"key": (z, n, h), "value": (z, n, v)})
    theirs = numbers(*placed.shape)
    back = np.full_like(theirs, -1)
    for place in range(2):
        placed.put(back, place, placed.holds(theirs, place).copy())
    np.testing.assert_array_equal(back, theirs)


@pytest.mark.parametrize("name", sorted({family.name for family in families().values()}))
def test_a_tensor_mapping_begins_with_the_embedding(name: str) -> None:
    """Its name determines the prefix of a multimodal wrapper."""
    assert families()[name].tensors[0].parts[0].ours == "embedding.weight"
