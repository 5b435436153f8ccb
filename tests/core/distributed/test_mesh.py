"""Meshes and sharding rules as data: axis sizes, how parameters are sharded, and errors."""

from dataclasses import replace

import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.distributed.mesh import MeshConfig, in_words, sizes
from moezoo.core.distributed.sharding_rules import check_batch, gathered_partition, padded_exchange, partition
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import CapacitySpec, GatedFeedForwardSpec, MoESpec, RouterSpec
from tests.support.covering import TINY
from tests.support.source_tree import PACKAGE

ONE_DEVICE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.fixture(scope="module")
def rows():
    config = load_config(PACKAGE.parent / "configs" / "bench" / "small.yaml", ["model.vocab_size=256"])
    return {row.name: row for row in parameter_table(config.model)}


def test_mesh_of_one_device_fits_any_number_of_devices():
    assert sizes(MeshConfig(), 8) == ONE_DEVICE
    assert in_words(MeshConfig()) == "one device"


def test_auto_takes_the_remaining_devices():
    assert sizes(MeshConfig(data="auto", expert=4), 8) == {**ONE_DEVICE, "data": 2, "expert": 4}


@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 2, "expert": 2}, {"data": "auto", "expert": 3}])
def test_mesh_of_another_number_of_devices_is_refused(mesh):
    with pytest.raises(SpecError, match=r"mesh is .* devices; got 8 devices\. Use sizes whose product"):
        sizes(MeshConfig(**mesh), 8)


def test_parameters_are_sharded_by_the_rules(rows):
    mesh = MeshConfig(data=2, fsdp=2, expert=4, tensor=2)
    count = sizes(mesh, 32)
    gate = rows["layers.0.moe.experts.w_gate"]
    cut = partition(gate, mesh, count)
    assert cut == (("expert",), ("fsdp",), ("tensor",))
    assert gathered_partition(gate, cut) == (("expert",), (), ("tensor",))
    assert partition(rows["layers.0.attention.w_query"], mesh, count) == (("fsdp",), ("tensor",), ())
    assert partition(rows["layers.0.moe.router.w_router"], mesh, count) == ((), ())
    assert partition(rows["final_norm.scale"], mesh, count) == ((),)
    assert partition(rows["embedding.weight"], mesh, count) == ((), ("fsdp",))


def test_rules_can_be_overridden(rows):
    mesh = MeshConfig(data=2, rules={"expert": "data", "embed": None, "vocab": ["data"]})
    count = sizes(mesh, 2)
    assert partition(rows["layers.0.moe.experts.w_gate"], mesh, count) == (("data",), (), ())
    assert partition(rows["embedding.weight"], mesh, count) == (("data",), ())


def test_indivisible_dimension_is_named_with_its_rule(rows):
    mesh = MeshConfig(tensor=3)
    with pytest.raises(SpecError) as error:
        partition(rows["layers.0.attention.w_query"], mesh, sizes(mesh, 3))
    assert str(error.value) == (
        "layers.0.attention.w_query [256, 8, 32] has size 8 along head, which is not divisible into 3 shards "
        "(mesh.rules.head = tensor). Use a mesh that divides it, or set mesh.rules.head to null."
    )


def test_mesh_axis_used_twice_is_named_with_both_rules(rows):
    mesh = MeshConfig(fsdp=2, rules={"hidden": "fsdp"})
    with pytest.raises(SpecError) as error:
        partition(rows["layers.0.moe.experts.w_gate"], mesh, sizes(mesh, 2))
    assert str(error.value) == (
        "layers.0.moe.experts.w_gate [8, 256, 512] is sharded over fsdp of the mesh twice: by embed and by hidden. "
        "Set mesh.rules.hidden or mesh.rules.embed to null or to another axis."
    )


def test_latent_axis_is_sharded_only_where_no_other_axis_is():
    model = load_config("configs/tiny/latent_attention_query.yaml", ["model.vocab_size=64"]).model
    table = {row.name: row for row in parameter_table(model)}
    mesh = MeshConfig(fsdp=2)
    down, up = (table[f"layers.0.attention.{name}"] for name in ("w_query_down", "w_query"))
    assert (down.axes, up.axes) == (("embed", "latent"), ("latent", "head", "head_dim"))
    assert partition(down, mesh, sizes(mesh, 2)) == (("fsdp",), ())
    assert partition(up, mesh, sizes(mesh, 2)) == (("fsdp",), (), ())
    whole = MeshConfig(fsdp=2, rules={"latent": None})
    assert partition(up, whole, sizes(whole, 2)) == ((), (), ())


def test_tables_of_ngrams_stay_sharded_while_they_are_used():
    table = parameter_table(load_config("configs/tiny/ngram_embeddings.yaml", ["model.vocab_size=64"]).model)
    row = next(row for row in table if row.name == "layers.0.ngram_embeddings.weight")
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    stored = partition(row, mesh, sizes(mesh, 8))
    assert stored == gathered_partition(row, stored) == ((), (), ("fsdp", "expert"))
    with pytest.raises(SpecError, match=r"size 4 along ngram, which is not divisible into 8 shards.*mesh.rules.ngram"):
        partition(row, MeshConfig(expert=8), sizes(MeshConfig(expert=8), 8))


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_rules_shard_no_parameter_of_any_part_twice_over_an_axis(path):
    mesh = MeshConfig(data=2, fsdp=2, expert=2, tensor=2)
    for row in parameter_table(load_config(path, ["model.vocab_size=64"]).model):
        partition(replace(row, shape=tuple(4 for _ in row.shape)), mesh, sizes(mesh, 16))  # raises where it would


def test_indivisible_batch_is_refused():
    check_batch(8, {**ONE_DEVICE, "data": 2, "expert": 4})
    with pytest.raises(SpecError, match=r"has 6 sequences, which is not divisible by 8 \(data 2, expert 4"):
        check_batch(6, {**ONE_DEVICE, "data": 2, "expert": 4})


@pytest.mark.parametrize(
    ("devices", "dispatch", "inference", "rows", "slots"),
    [
        (2, {}, False, 3 * 16 * 2, None),  # p min(K, E / n)
        (8, {}, False, 3 * 16 * 1, None),
        (2, {"factor": 1.0, "group": "sequence"}, False, 4 * 3 * 4, 4),  # E / n experts, 3 sequences, C = K T / E
        (8, {"factor": 1.0, "group": "sequence"}, False, 1 * 3 * 4, 4),
        (8, {"factor": 0.9, "group": "sequence", "priority": "score"}, False, 1 * 3 * 4, 4),
        (8, {"factor": 1.0, "group": "sequence"}, True, 3 * 16 * 1, None),
        (8, {"factor": 4.0, "group": "sequence"}, False, 3 * 16 * 1, None),  # not smaller
        (8, {"factor": 1.0}, False, 3 * 16 * 1, None),  # per batch
    ],
)
def test_padded_exchange_fits_any_routing(devices, dispatch, inference, rows, slots):
    options = {"dispatch": CapacitySpec(**dispatch)} if dispatch else {}
    moe = MoESpec(num_experts=8, router=RouterSpec(top_k=2), experts=GatedFeedForwardSpec(hidden_dim=4), **options)
    assert padded_exchange(moe, 3, 16, devices, inference=inference) == (rows, slots)
