"""Meshes as data: their sizes, which axis cuts which parameter, and what is refused."""

import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.distributed.mesh import MeshConfig, in_words, sizes
from moezoo.core.distributed.sharding_rules import at_work, check_batch, exchanged, partition
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import CapacitySpec, GatedFeedForwardSpec, MoESpec, RouterSpec
from tests.support.source_tree import PACKAGE

ALONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.fixture(scope="module")
def rows():
    config = load_config(PACKAGE.parent / "configs" / "bench" / "small.yaml", ["model.vocab_size=256"])
    return {row.name: row for row in parameter_table(config.model)}


def test_a_mesh_of_one_device_needs_no_more():
    assert sizes(MeshConfig(), 8) == ALONE
    assert in_words(MeshConfig()) == "one device"


def test_auto_is_what_is_left():
    assert sizes(MeshConfig(data="auto", expert=4), 8) == {**ALONE, "data": 2, "expert": 4}


@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 2, "expert": 2}, {"data": "auto", "expert": 3}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
    with pytest.raises(SpecError, match=r"mesh is .* devices; got 8 devices\. Use sizes whose product"):
        sizes(MeshConfig(**mesh), 8)


def test_rules_cut_what_they_name(rows):
    mesh = MeshConfig(data=2, fsdp=2, expert=4, tensor=2)
    count = sizes(mesh, 32)
    gate = rows["layers.0.moe.experts.w_gate"]
    cut = partition(gate, mesh, count)
    assert cut == (("expert",), ("fsdp",), ("tensor",))
    assert at_work(gate, cut) == (("expert",), (), ("tensor",))
    assert partition(rows["layers.0.attention.w_query"], mesh, count) == (("fsdp",), ("tensor",), ())
    assert partition(rows["layers.0.moe.router.w_router"], mesh, count) == ((), ())
    assert partition(rows["final_norm.scale"], mesh, count) == ((),)
    assert partition(rows["embedding.weight"], mesh, count) == ((), ("fsdp",))


def test_a_rule_may_be_replaced(rows):
    mesh = MeshConfig(data=2, rules={"expert": "data", "embed": None, "vocab": ["data"]})
    count = sizes(mesh, 2)
    assert partition(rows["layers.0.moe.experts.w_gate"], mesh, count) == (("data",), (), ())
    assert partition(rows["embedding.weight"], mesh, count) == (("data",), ())


def test_a_dimension_that_does_not_divide_is_named_with_its_rule(rows):
    mesh = MeshConfig(tensor=3)
    with pytest.raises(SpecError) as error:
        partition(rows["layers.0.attention.w_query"], mesh, sizes(mesh, 3))
    assert str(error.value) == (
        "layers.0.attention.w_query [256, 8, 32] has 8 along head, which mesh.rules.head = tensor would cut into 3 "
        "equal parts. Use a mesh that divides it, or set mesh.rules.head to null."
    )


def test_an_axis_used_twice_is_named_with_both_rules(rows):
    mesh = MeshConfig(fsdp=2, rules={"hidden": "fsdp"})
    with pytest.raises(SpecError) as error:
        partition(rows["layers.0.moe.experts.w_gate"], mesh, sizes(mesh, 2))
    assert str(error.value) == (
        "layers.0.moe.experts.w_gate [8, 256, 512] is cut twice along fsdp of the mesh: embed and hidden both have it. "
        "Set mesh.rules.hidden or mesh.rules.embed to null or to another axis."
    )


def test_what_comes_from_latents_is_cut_where_nothing_else_of_it_is():
    model = load_config("configs/tiny/latent_attention_query.yaml", ["model.vocab_size=64"]).model
    table = {row.name: row for row in parameter_table(model)}
    mesh = MeshConfig(fsdp=2)
    down, up = (table[f"layers.0.attention.{name}"] for name in ("w_query_down", "w_query"))
    assert (down.axes, up.axes) == (("embed", "latent"), ("latent", "head", "head_dim"))
    assert partition(down, mesh, sizes(mesh, 2)) == (("fsdp",), ())
    assert partition(up, mesh, sizes(mesh, 2)) == (("fsdp",), (), ())
    whole = MeshConfig(fsdp=2, rules={"latent": None})
    assert partition(up, whole, sizes(whole, 2)) == ((), (), ())


def test_a_batch_that_cannot_be_shared_is_refused():
    check_batch(8, {**ALONE, "data": 2, "expert": 4})
    with pytest.raises(SpecError, match="has 6 sequences, which data 2, expert 4 of the mesh would share in 8"):
        check_batch(6, {**ALONE, "data": 2, "expert": 4})


@pytest.mark.parametrize(
    ("devices", "dispatch", "inference", "rows", "places"),
    [
        (2, {}, False, 3 * 16 * 2, None),  # p min(K, E / n)
        (8, {}, False, 3 * 16 * 1, None),
        (2, {"factor": 1.0, "group": "sequence"}, False, 4 * 3 * 4, 4),  # E / n experts, 3 sequences, C = K T / E
        (8, {"factor": 1.0, "group": "sequence"}, False, 1 * 3 * 4, 4),
        (8, {"factor": 0.9, "group": "sequence", "priority": "score"}, False, 1 * 3 * 4, 4),
        (8, {"factor": 1.0, "group": "sequence"}, True, 3 * 16 * 1, None),
        (8, {"factor": 4.0, "group": "sequence"}, False, 3 * 16 * 1, None),  # not less
        (8, {"factor": 1.0}, False, 3 * 16 * 1, None),  # the batch's
    ],
)
def test_rows_for_a_device_are_as_many_as_could_be(devices, dispatch, inference, rows, places):
    given = {"dispatch": CapacitySpec(**dispatch)} if dispatch else {}
    moe = MoESpec(num_experts=8, router=RouterSpec(top_k=2), experts=GatedFeedForwardSpec(hidden_dim=4), **given)
    assert exchanged(moe, 3, 16, devices, inference=inference) == (rows, places)
