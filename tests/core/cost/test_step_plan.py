"""Plans by formula: hand-computed on a small model, and errors. tests/mesh compares them with XLA."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.cost.communication import Collective
from moezoo.core.cost.make_plan import Planner, make_plan
from moezoo.core.cost.memory import training_memory
from moezoo.core.cost.step_plan import device_plan, memory_per_device, smaller, with_same_sequences
from moezoo.core.distributed.mesh import MESH_AXES, MeshConfig
from moezoo.core.errors import SpecError
from moezoo.core.reports.text import memory_bytes

CONFIG = "configs/tiny/top_k.yaml"
SET = (
    "model.vocab_size=64",
    "training.batch_size=8",
    "training.sequence_length=16",
    "model.layers[0].moe.num_experts=8",
)
LARGE = "configs/large/deepseek_v3_pretraining.yaml"


def config_on(*overrides: str, **mesh: object):
    config = load_config(CONFIG, [*SET, *overrides]).model_copy(update={"mesh": MeshConfig(**mesh)})
    return config, {axis: getattr(config.mesh, axis) for axis in MESH_AXES}


def payloads(*overrides: str, **mesh: object) -> dict[str, tuple[int, int]]:
    found = device_plan(*config_on(*overrides, **mesh)).collectives
    return {f"{own.purpose}, {own.kind}, {' '.join(own.axes)}": (own.count, own.payload) for own in found}


def run(*words: str):
    return CliRunner().invoke(main, ["plan", *words])


# D = 32, E = 8, K = 2, F = 24, V = 64, L = 2, N = 4, M = 2, H = 8; 128 tokens a step
ATTENTION = 32 * 8 * (4 + 2 + 2 + 4)
EXPERTS = 3 * 8 * 32 * 24
REPLICATED = 2 * 64 * 32 + 2 * (ATTENTION + 2 * 32 + 32 * 8) + 32  # two embeddings, norms, routers


def test_one_device_sends_nothing() -> None:
    plan = device_plan(*config_on())
    assert plan.collectives == ()
    assert plan.sent == 0


def test_data_parallelism_sends_gradients_only() -> None:
    found = payloads(data=4)
    assert {name.split(",")[0] for name in found} == {"gradients", "losses and expert loads"}
    arrays, size = found["gradients, all-reduce, data"]
    assert arrays == 23
    assert size == 4 * (REPLICATED + 2 * EXPERTS)


def test_expert_parallelism_dispatches_tokens() -> None:
    found = payloads(data=2, expert=4)
    rows = 16 * 2  # p = 16 tokens a device, min(K, E / n) = 2
    assert found["expert dispatch and combine, all-to-all, expert"] == (2 * 4, 2 * 4 * 4 * (4 * rows * 32))
    assert found["rows per expert, all-to-all, expert"] == (2, 2 * 4 * 8)
    assert found["gradients, all-reduce, data"] == (2 * 3, 4 * 2 * EXPERTS // 4)
    assert found["gradients, all-reduce, data expert"][1] == 4 * REPLICATED
    assert not any("all-gather" in name for name in found)


def test_ragged_exchange_sends_only_used_rows() -> None:
    found = payloads(data=2, expert=4, exchange="ragged")
    assert found["expert dispatch and combine, ragged-all-to-all, expert"] == (2 * 4, 2 * 4 * 4 * (16 * 2 * 32))


def test_fsdp_gathers_blocks_twice_and_embeddings_once() -> None:
    arrays, size = payloads(fsdp=8)["parameters, all-gather, fsdp"]
    assert arrays == 2 * 2 * (4 + 3) + 2
    assert size == 4 * (2 * 2 * (ATTENTION + EXPERTS) + 2 * 64 * 32)


def test_tensor_parallelism_reduces_partial_sums() -> None:
    found = payloads(tensor=2)
    row = 4 * 128 * 32  # p D numbers
    assert found["partial sums of blocks, forward, all-reduce, tensor"] == (2, 2 * row)
    assert found["partial sums of blocks, backward, all-reduce, tensor"] == (2 * 3, 2 * 3 * row)
    assert found["partial sums of experts, forward, all-reduce, tensor"] == (2, 2 * row)
    assert found["partial sums of experts, backward, all-reduce, tensor"] == (2 * 3, 2 * (2 * row + 4 * 128 * 2))


def test_micro_batch_sends_as_much_as_a_step_of_its_size() -> None:
    once = payloads(fsdp=2, expert=4)
    twice = payloads("training.batch_size=16", "training.gradient_accumulation=2", fsdp=2, expert=4)
    assert twice == {name: (2 * arrays, 2 * size) for name, (arrays, size) in once.items()}


def test_memory_of_one_device_equals_training_memory() -> None:
    for mode, parts in itertools.product(("none", "experts", "block"), (1, 2)):
        config, lengths = config_on(f"training.rematerialize={mode}", f"training.gradient_accumulation={parts}")
        memory, expected = asdict(memory_per_device(config, lengths)), asdict(training_memory(config))
        assert memory["gathered"] == memory["exchange"] == memory["state"] == 0
        assert {kind: memory[kind] for kind in expected} == expected


def test_mesh_divides_memory() -> None:
    alone = memory_per_device(*config_on())
    data, fsdp, tensor = (memory_per_device(*config_on(**mesh)) for mesh in ({"data": 8}, {"fsdp": 8}, {"tensor": 2}))
    assert data.moments == alone.moments
    assert data.activations == alone.activations // 8
    small = 4 * (REPLICATED - 2 * 64 * 32 - 2 * ATTENTION)
    assert fsdp.parameters == (alone.parameters - small) // 8 + small
    assert fsdp.gathered == 2 * 4 * (EXPERTS + 2 * 64 * 32) * 7 // 8
    assert tensor.activations < alone.activations
    assert tensor.logits == alone.logits


def test_padded_exchange_has_buffers_for_all_possible_rows() -> None:
    """Two rows per token (top_k = 2) from each of 4 devices; without expert parallelism, two rows per token."""
    local, padded = (memory_per_device(*config_on(**mesh)).activations for mesh in ({"data": 4}, {"expert": 4}))
    row = 4 * (4 * 24 + 2 * 32)
    layers, tokens = 2, 32
    assert padded - local == layers * tokens * row * (4 * 2 - 2)


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-to-all", 750), ("all-gather", 750), ("all-reduce", 1500), ("reduce-scatter", 750)]
)
def test_device_sends_all_but_its_own_shard(kind, sent) -> None:
    assert Collective(kind, ("data",), 4, 1, 1000).sent == sent


def test_smaller_mesh_has_the_same_axes_and_sequences() -> None:
    lengths = {"data": 1, "fsdp": 9, "expert": 64, "tensor": 5}
    small = smaller(lengths)
    assert small == {"data": 1, "fsdp": 3, "expert": 2, "tensor": 5}
    config, _ = config_on("training.batch_size=1152")
    other = with_same_sequences(config, lengths, small)
    assert other.training.batch_size == 1152 // (9 * 64) * 6
    assert other.mesh == MeshConfig(fsdp=3, expert=2, tensor=5)


def test_impossible_plans_are_errors_before_compilation() -> None:
    for words, problem in (
        (
            ("--mesh", "expert=3", "--set", "training.batch_size=24"),
            "has size 8 along expert, which is not divisible into 3",
        ),
        (("--mesh", "data=16"), "has 8 sequences, which is not divisible by 16 (data 16 of the mesh)"),
        (("--mesh", "data=auto"), "Add --devices N."),
        (("--mesh", "data=2", "--memory", "much"), "--memory is 'much'; expected a number and a unit"),
        (("--mesh", "data=2", "--topology", "v5e:16x16"), "needs libtpu, which compiles for TPUs without a TPU"),
    ):
        result = run(CONFIG, *(word for each in SET for word in ("--set", each)), *words)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert problem in line


def test_memory_size_needs_a_unit() -> None:
    assert memory_bytes("80GiB") == 80 * 2**30
    assert memory_bytes("1.5 GB") == 1_500_000_000
    with pytest.raises(SpecError, match=r"--memory is '80'; expected a number and a unit, one of KiB, MiB"):
        memory_bytes("80")


def test_plan_for_thousands_of_devices_by_formula() -> None:
    words = (
        "--mesh",
        "data=2,fsdp=32,expert=64",
        "--formula",
        "--memory",
        "80GiB",
        "--set",
        "training.batch_size=16384",
    )
    words += ("--set", "training.gradient_accumulation=4")
    result = run(LARGE, *words, "--json")
    assert result.exit_code == 0, result.output
    known = json.loads(result.stdout)
    assert known["devices"] == 4096
    assert known["extrapolated"]
    assert known["compiled"] is None
    assert known["sent_bytes"] == sum(own["sent_bytes"] for own in known["collectives"])
    assert known["memory_bytes"]["total"] == sum(
        size for name, size in known["memory_bytes"].items() if name != "total"
    )
    assert known["fits"] == (known["memory_bytes"]["total"] <= 80 * 2**30)
    page = run(LARGE, *words)
    assert page.exit_code == 0, page.output
    assert "on data 2, fsdp 32, expert 64: 4,096 devices" in page.stdout
    assert "per device and step: 4 micro-batches of 1 sequence of 4,096 tokens" in page.stdout
    assert ("fits in" if known["fits"] else "does not fit in") + " 80.0 GiB" in page.stdout
    assert "all by formula; nothing was compiled" in page.stdout


def test_large_config_has_the_published_number_of_parameters() -> None:
    """671 B, 37 B active: arXiv 2412.19437, section 4.2."""
    result = CliRunner().invoke(main, ["describe", LARGE, "--json"])
    counts = json.loads(result.stdout)["parameters"]
    assert counts["total"] == pytest.approx(671e9, rel=1e-3)
    assert counts["active"] == pytest.approx(37e9, rel=0.02)
    assert Path(LARGE).exists()


def test_a_step_that_no_compiler_can_describe_is_refused_before_it_compiles() -> None:
    config, _ = config_on("model.embed_dim=4611686018427387904")
    with pytest.raises(SpecError, match=r"a step needs \d+ bytes on each device, more than XLA can describe"):
        make_plan(config, 1, None, planner=cast(Planner, object()))  # nothing of the planner is used
    assert make_plan(config, 1, None).device.memory.total > 1 << 64
