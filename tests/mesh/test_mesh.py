"""Meshes of 8 simulated devices match one device in losses, every gradient and three steps; and their collectives."""

import json
from collections.abc import Sequence

import pytest

from tests.mesh.simulated import jobs_of, results
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, FLOAT32_TRAINING

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"data": 4, "tensor": 2},
    {"data": 4, "expert": 2},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 4, "tensor": 2},
    {"expert": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 4, "exchange": "allgather"},
    {"expert": 4, "tensor": 2, "exchange": "allgather"},
    {"data": 8, "rules": {"expert": "data"}},
    {"fsdp": 2, "expert": 4, "rematerialize": "block"},
    {"data": 2, "expert": 4, "exchange": "allgather", "rematerialize": "experts"},
    {"fsdp": 2, "expert": 2, "tensor": 2, "rematerialize": "experts"},
    {"fsdp": 2, "expert": 4, "layers": "scanned"},
    {"data": 2, "fsdp": 2, "tensor": 2, "layers": "scanned", "rematerialize": "block"},
    {"fsdp": 2, "expert": 2, "tensor": 2, "layers": "scanned", "rematerialize": "experts"},
]
# Three axes, rematerialization and a scan; `data` unrolled is in PARTS, the exchange `allgather` in GROUPED.
IN_THE_GATE = [MESHES[19]]
KINDS = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 4, "layers": "scanned"}]
MIXED = [MESHES[10], MESHES[11]]
GROUPED = [
    {"data": 8},
    {"data": 4, "expert": 2},
    {"fsdp": 2, "expert": 4},
    {"expert": 8},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 4, "tensor": 2},  # two sequences on each device
    {"data": 2, "expert": 4, "exchange": "allgather"},
    {"data": 8, "rules": {"expert": "data"}},
]
release = pytest.mark.release


def job(what: str, name: str, *meshes: dict, replaced: Sequence[tuple[str, str]] = (), **changes) -> str:
    """A job of on_devices.py on a tiny config, or one of tests/data."""
    folder = "tests/data" if "/" in name else "configs/tiny"
    return json.dumps([what, f"{folder}/{name}.yaml", {"replaced": [*replaced], **changes}, *meshes])


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, dict]:
    """Results of all jobs of the selected tests."""
    return results("on_devices.py", jobs_of(request.session.items, request.path))


def check(found: dict) -> None:
    for mesh, apart in found.items():
        assert apart["losses"] <= FLOAT32.relative, (mesh, apart)
        assert apart["gradients"] <= FLOAT32_GRADIENT.relative, (mesh, apart)
        assert apart["scores"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["steps"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["parameters"] <= 5 * FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["state"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["loads"], mesh


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job("equal_mlx", "top_k", *IN_THE_GATE), id="gate"),
        pytest.param(job("equal", "top_k", *MESHES), id="all", marks=release),
    ],
)
def test_every_mesh_matches_one_device(found, job):
    assert len(found[job]) == len(json.loads(job)) - 3
    check(found[job])


@release
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(
            job("equal", "top_k", *KINDS, replaced=[("learning_rate:", f"kind: {kind}\n  learning_rate:")]), id=kind
        )
        for kind in ("muon", "adafactor")
    ],
)
def test_every_matrix_of_a_stack_is_updated_by_itself_on_a_mesh(found, job):
    check(found[job])


@release
@pytest.mark.parametrize(
    "job", [job("equal", "top_k", *MESHES[15:], replaced=[("data:\n", "adapter: {rank: 3}\ndata:\n")])]
)
def test_adapters_of_recomputed_and_scanned_layers_match_one_device(found, job):
    check(found[job])


# Every mesh with rematerialization or a scan, and two without; then attention of other kinds, and capacities.
@release
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job("packed", "top_k", *MESHES[9:11], *MESHES[13:]), id="top_k"),
        *(
            pytest.param(job("packed", name, MESHES[10], MESHES[14]), id=name)
            for name in ("gated_delta", "sparse_attention", "capacity_groups", "sequence_balance")
        ),
    ],
)
def test_packed_documents_match_one_device(found, job):
    check(found[job])


# In the gate on one mesh; before a release all on both, one by one.
PARTS = {
    "combinations/values": [MESHES[9]],  # experts by hash, and experts that choose from the whole batch
}
ONE_BY_ONE = (
    "shared_gated",  # shared experts with a gate
    "capacity",  # which tokens are dropped is decided over the whole batch
    "expert_choice",  # experts choose from the whole batch
    "zero_computation_dropless",
    "gating_residual",
    "latent_experts",
    "softmax_with_bias",  # the bias moves by the whole batch's load
    "global_balance",
    "importance_load",
    "weight_on_input",
    "clamped_swiglu",  # biases of experts
    "latent_attention",
    "gated_delta",
    "dropout",
    "noisy_top_k",
    "combinations/sinusoidal_positions",  # dropout, SparseMixer
    "combinations/learned_positions",  # noisy choices and their losses, biases of experts
    "adapter",  # on every kind of matrix
    "adapter_dropout",
)


THREE = MESHES[10]
RECOMPUTED = {**THREE, "layers": "scanned", "rematerialize": "block"}
# Adam's first steps have the size of the rate whatever a gradient's size: what is 0 but for roundings moves as far as
# anything else, to either side. SGD's are as near as the gradients are.
SMOOTH = ("learning_rate:", "kind: sgd\n  learning_rate:")


def later(name: str, *replaced: tuple[str, str], what: str = "equal_floored", **rules: None) -> str:
    return job(what, name, {**THREE, "rules": rules}, replaced=[SMOOTH, *replaced])


INDEXERS = ("num_heads: 3, head_dim", "num_heads: 4, head_dim")
# Streams, their mixing and what is kept of them, states, indexers, tables by hash, routers with a state: each with what
# makes it divisible by three axes of two.
LATER_PARTS = {
    **{
        name: later(name)
        for name in (
            "gated_streams",
            "hyper_connections",
            "separate_streams",
            "attention_residual",
            "depth_scaled",
            "scaled_residual",
            "lightning_attention",
            "convolutional_attention",
            "dynamic_convolution",
            "dynamic_mask",
            "ngram_embeddings",
            "shared_sink",
            "router_mlp",
            "pooled_balance",
        )
    },
    "compressed_attention": later("compressed_attention", INDEXERS),
    "block_indexer": later("block_indexer", INDEXERS),
    "head_router": later("head_router", ("num_heads: 10", "num_heads: 16")),
    "product_keys": later(
        "product_keys", ("num_experts: 49", "num_experts: 64"), ("silu, hidden_dim: 1}", "silu, hidden_dim: 2}")
    ),
    "channel_decay": later("channel_decay", latent=None),
    "mamba": later("mamba", latent=None),
    "mamba2": later("mamba2", kv_head=None),
    "accumulation": later("combinations/accumulation", INDEXERS),
    "zero_computation": later("combinations/zero_computation"),
    "delta_attention": job("equal_floored", "combinations/delta_attention", MESHES[11], replaced=[SMOOTH]),
}


@release
@pytest.mark.parametrize("job", LATER_PARTS.values(), ids=LATER_PARTS)
def test_streams_states_and_tables_match_one_device(found, job):
    check(found[job])


# All that keeps a state, with mixed streams; and all that chooses among keys, with gated streams and n-gram tables.
TOGETHER = ("meshes/states", "meshes/choices")


@release
@pytest.mark.parametrize(
    "job",
    [
        *(
            pytest.param(job("packed_floored", name, THREE, replaced=[SMOOTH]), id=f"packed {name}")
            for name in TOGETHER
        ),
        *(pytest.param(job("equal_floored", name, RECOMPUTED, replaced=[SMOOTH]), id=name) for name in TOGETHER),
    ],
)
def test_packed_documents_and_scanned_layers_of_later_parts_match_one_device(found, job):
    check(found[job])


@release
@pytest.mark.parametrize("job", [job("generated", name, THREE) for name in TOGETHER], ids=TOGETHER)
def test_mesh_generates_with_later_parts(found, job):
    """Prompts of unequal length, in pieces; decoded tokens; a prompt that begins as one before."""
    for mesh, own in found[job].items():
        assert own["apart"].keys() == {"prefill", "decode 40", "decode 41"}
        far = {name: apart for name, apart in own["apart"].items() if apart > FLOAT32_TRAINING.relative}
        assert not far, mesh
        assert own["tokens"], mesh


@pytest.mark.parametrize(
    "job",
    [
        *(pytest.param(job("equal_mlx", name, *meshes), id=name) for name, meshes in PARTS.items()),
        *(pytest.param(job("equal", name, *MIXED), id=f"{name}-both", marks=release) for name in ONE_BY_ONE),
    ],
)
def test_every_part_matches_one_device(found, job):
    check(found[job])


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job("equal_mlx", "capacity_groups", GROUPED[6]), id="gate"),
        pytest.param(job("equal", "capacity_groups", *GROUPED), id="all", marks=release),
    ],
)
def test_capacity_per_sequence_matches_one_device(found, job):
    """Experts on 4 devices; release tests have 1, 2 and 8 too."""
    assert len(found[job]) == len(json.loads(job)) - 3
    check(found[job])


CAPACITY = "{kind: capacity, factor: 0.8, priority: score, group: sequence}"
# An empty place gives what the biases are, and no combine weight takes it away.
BIASED = ("renormalize: none}", f"renormalize: none, apply_to: input}}\n        dispatch: {CAPACITY}")
WITH_ZEROS = ("dispatch: {kind: capacity, factor: 1.1}", f"dispatch: {CAPACITY}")


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job("equal", "clamped_swiglu", *MIXED[:1], replaced=[BIASED]), id="clamped_swiglu", marks=release),
        pytest.param(job("equal", "clamped_swiglu", *MIXED[1:], replaced=[BIASED]), id="allgather", marks=release),
        pytest.param(job("equal", "zero_computation", *MIXED, replaced=[WITH_ZEROS]), id="zero", marks=release),
    ],
)
def test_capacity_per_sequence_works_with_every_kind_of_expert(found, job):
    check(found[job])


def by_job(*jobs: str):
    return pytest.mark.parametrize("jobs", [jobs], ids=["jobs"])


BOUNDED = {"expert": 4, "tensor": 2}


# Of collectives that are in formulas the gate compares formula and program, of fewer steps: test_plan.py.
@release
@by_job(*(job("collectives", name, BOUNDED) for name in ("capacity_groups", "capacity")))
def test_capacity_per_sequence_bounds_the_all_to_all(found, jobs):
    """2 sequences of T = 16 on each of 4 devices, E = 8, K = 2, D = 32: C = ceil(0.6 * 2 * 16 / 8) = 3."""
    of_sequence, of_batch = (
        {shape: count for shape, count in found[job].items() if "all-to-all" in shape} for job in jobs
    )
    # Dispatch and combine in 2 layers, and their gradients. Slots are known without exchanging counts.
    assert of_sequence == {"all-to-all f32[2,6,32]": 8}
    assert of_batch == {"all-to-all f32[1,64,32]": 8, "all-to-all s32[1,2]": 2}


@release
@pytest.mark.parametrize("job", [job("collectives", "capacity_groups", {"data": 8})], ids=["job"])
def test_dropping_tokens_needs_only_all_reduces(found, job):
    assert {name.split()[0] for name in found[job]} == {"all-reduce"}


@release
@pytest.mark.parametrize("job", [job("collectives", "top_k", MESHES[5])], ids=["job"])
def test_tokens_are_exchanged_and_expert_weights_are_not(found, job):
    kinds = {name.split()[0] for name in found[job]}
    assert kinds == {"all-to-all", "all-reduce"}  # nothing is gathered, neither an expert's matrix nor a probability
    assert any(name.startswith("all-to-all f32") for name in found[job]), found[job]


@release
@by_job(*(job("collectives", "top_k", {**MESHES[5], **more}) for more in ({}, {"rematerialize": "experts"})))
def test_recomputed_experts_repeat_their_all_to_all(found, jobs):
    """Dispatch and combine, and their gradients; then dispatch once more, for the backward pass."""
    plain, again = (
        sum(count for name, count in found[job].items() if name.startswith("all-to-all f32")) for job in jobs
    )
    assert plain < again <= 1.5 * plain, (plain, again)


SCANNED = {"fsdp": 8, "layers": "scanned", "rematerialize": "experts"}


@pytest.mark.parametrize("job", [job("collectives", "top_k", SCANNED)], ids=["job"])
def test_scan_all_gathers_one_layer_at_a_time(found, job):
    gathers = {name for name in found[job] if "all-gather" in name}
    # Outside the loop the embedding and the head alone; inside no array of both layers, [2, 32, 4, 8] and the like.
    assert {name for name in gathers if not name.startswith("loop")} == {
        "all-gather f32[64,32]",
        "all-gather f32[32,64]",
    }
    shapes = {tuple(map(int, name.partition("[")[2][:-1].split(","))) for name in gathers if name.startswith("loop")}
    assert {(8, 32, 24), (8, 24, 32), (32, 4, 8), (32, 2, 8), (4, 8, 32)} <= shapes
    assert all(shape[0] == 1 or len(shape) == 3 for shape in shapes), shapes


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job("answers", "top_k", MESHES[5]), id="unrolled", marks=release),
        pytest.param(job("answers", "top_k", MESHES[19]), id="scanned", marks=release),
        pytest.param(job("answers", "capacity_groups", MESHES[5]), id="capacity_groups", marks=release),
    ],
)
def test_trained_model_generates_on_its_mesh(found, job):
    """Intermediates, gradients with forced experts, inference, a cache, generated tokens; 3 sequences too, unshared."""
    found = found[job]
    assert {"layers.1.moe.router.logits of 3", "layers.1.moe.experts.w_up of 3", "decode of 8"} <= found["apart"].keys()
    far = {name: apart for name, apart in found["apart"].items() if apart > FLOAT32_TRAINING.relative}
    assert not far
    assert found["tokens"]


@release
@pytest.mark.parametrize("job", [job("replayed", "top_k", MESHES[5], MESHES[17], MESHES[19])], ids=["job"])
def test_forced_routing_trains_and_scores_as_on_one_device(found, job):
    for mesh, apart in found[job].items():
        far = {name: distance for name, distance in apart.items() if distance > FLOAT32_TRAINING.relative}
        assert not far, mesh


@pytest.mark.parametrize("job", [job("of_score", "top_k", MESHES[5])], ids=["job"])
def test_indivisible_batch_is_scored_without_gathering_experts(found, job):
    """3 sequences on 8 devices: tokens are exchanged as in a step, and no expert is gathered."""
    assert {name.split()[0] for name in found[job]} == {"all-to-all", "all-reduce"}


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job("donated", "top_k", {"fsdp": 2, "expert": 4, **more}), id=name, marks=marks)
        for name, more, marks in (
            ("plain", {}, ()),
            ("scanned", {"layers": "scanned"}, release),
            ("experts", {"rematerialize": "experts"}, release),
        )
    ],
)
def test_step_donates_parameters_and_moments(found, job):
    """Also on a mesh, per shard; the other results are scalars."""
    found = found[job]
    assert found["kept"] == found["arrays"] > 30
    assert found["kept_bytes"] == found["bytes"]
    assert found["other_results"] < 0.02 * found["bytes"]


@release
@pytest.mark.parametrize("job", [job("collectives", "top_k", {"fsdp": 8})], ids=["job"])
def test_fsdp_all_gathers_each_parameter_twice(found, job):
    """In the forward pass and again in the backward pass; gathered parameters are not stored."""
    found = found[job]
    assert "all-to-all" not in {name.split()[0] for name in found}
    gathered = {
        name: count
        for name, count in found.items()
        if name.startswith("all-gather") and "[64," not in name and ",64]" not in name  # embedding and head: once
    }
    assert gathered, found
    assert all(count % 2 == 0 for count in gathered.values()), gathered
