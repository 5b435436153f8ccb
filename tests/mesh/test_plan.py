"""Plans match XLA's programs for 2, 4 and 8 simulated devices: communication, and memory per device."""

import json
import subprocess
import sys
import time

import pytest

from moezoo.core.config.run_config import Config, load_config
from moezoo.core.parameters import parameter_table
from tests.mesh.simulated import jobs_of, results
from tests.support.backends_available import require_backend
from tests.support.source_tree import PACKAGE

SMALL = ("model.vocab_size=64", "training.batch_size=8", "training.sequence_length=16")
EIGHT = (*SMALL, "model.layers[0].moe.num_experts=8")
AGAIN = ("training.rematerialize=block", "training.gradient_accumulation=2", "training.batch_size=16")
EXPERTS = "training.rematerialize=experts"

# Trap: on Linux the peak of a process begins with what the one that started it held, and a worker of the tests
# may hold gigabytes: a process that holds nothing stands between.
MEASURED = """
import json, resource, subprocess, sys
ended = subprocess.run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([used.ru_utime + used.ru_stime, peak]), file=sys.stderr)
sys.exit(ended.returncode)
"""

MICRO = ("training.gradient_accumulation=2", "training.batch_size=16")
# The gate's: an accumulation, a recomputation, and axes for experts, states and tensors.
CASES = {
    4: [
        ("top_k", {"fsdp": 2, "expert": 2}, (*EIGHT, *AGAIN)),
        ("bfloat16", {"expert": 2, "tensor": 2}, EIGHT),
    ],
}
RELEASE = {
    2: [
        ("top_k", {"data": 2}, EIGHT),
        ("top_k", {"fsdp": 2}, EIGHT),
        ("top_k", {"expert": 2}, EIGHT),
        ("top_k", {"tensor": 2}, EIGHT),
    ],
    4: [
        ("top_k", {"expert": 4, "exchange": "allgather"}, EIGHT),
        ("tied", {"fsdp": 2, "tensor": 2}, SMALL),
        ("ngram_embeddings", {"expert": 2, "tensor": 2}, SMALL),  # devices along tensor sum no gradient of a table
    ],
    8: [
        ("top_k", {"fsdp": 4, "expert": 2, "exchange": "allgather"}, (*EIGHT, *AGAIN, EXPERTS)),
        ("capacity_groups", {"data": 2, "expert": 4}, EIGHT),  # every assignment has a slot: no row counts are sent
        ("top_k", {"data": 2, "expert": 4}, EIGHT),
        ("sequence_balance", {"data": 2, "expert": 4}, EIGHT),  # no score of a sequence is gathered
        ("top_k", {"fsdp": 2, "expert": 2, "tensor": 2}, EIGHT),
        ("top_k", {"data": 2, "expert": 4}, (*EIGHT, *AGAIN)),
        ("top_k", {"fsdp": 4, "expert": 2, "exchange": "allgather"}, (*EIGHT, *AGAIN)),
        ("top_k", {"data": 2, "expert": 4}, (*EIGHT, *AGAIN, EXPERTS)),
        ("latent_experts", {"fsdp": 2, "expert": 2, "tensor": 2}, EIGHT),
        ("top_k", {"data": 8, "rules": {"expert": "data"}}, EIGHT),
        ("grouped_top2", {"data": 2, "expert": 4}, SMALL),  # no score of a group is gathered
        ("latent_attention_query", {"data": 2, "fsdp": 2, "tensor": 2}, SMALL),
        ("layer_inputs", {"data": 2, "fsdp": 2, "tensor": 2}, SMALL),
        ("dense", {"data": 2, "fsdp": 2, "tensor": 2}, SMALL),
        ("ngram_embeddings", {"data": 2, "fsdp": 2, "expert": 2}, (*SMALL, "training.rematerialize=block")),
        ("hyper_connections", {"fsdp": 2, "expert": 2, "tensor": 2}, EIGHT),
        ("depth_scaled", {"fsdp": 2, "expert": 2, "tensor": 2}, EIGHT),
        ("scaled_residual", {"fsdp": 2, "expert": 2, "tensor": 2}, EIGHT),
        ("router_mlp", {"fsdp": 2, "expert": 2, "tensor": 2}, EIGHT),
    ],
}


def job(what: str, name: str, mesh: dict, overrides: tuple[str, ...]) -> str:
    """Return a job of planned.py."""
    return json.dumps([what, f"configs/tiny/{name}.yaml", mesh, list(overrides)])


def case_of(job: str) -> tuple[dict, Config]:
    """Return the mesh and the config of a job."""
    _, path, mesh, overrides = json.loads(job)
    return mesh, load_config(path, overrides)


def on(devices: int, what: str, *case) -> pytest.MarkDecorator:
    """Return a job with its number of devices."""
    return pytest.mark.parametrize(("devices", "job"), [(devices, job(what, *case))], ids=["job"])


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[tuple[int, str], dict]:
    """Results of all jobs of the selected tests: one process for each number of devices."""
    items = [item for item in request.session.items if hasattr(item, "callspec")]
    by_devices = {item.callspec.params["devices"]: [] for item in items if "devices" in item.callspec.params}
    for item in items:
        if "devices" in item.callspec.params:
            by_devices[item.callspec.params["devices"]].append(item)
    return {
        (devices, job): result
        for devices, own in by_devices.items()
        for job, result in results("planned.py", jobs_of(own, request.path), devices=devices).items()
    }


FORMULAS = [
    *((devices, job("formula", *case), ()) for devices, cases in CASES.items() for case in cases),
    *((devices, job("formula", *case), pytest.mark.release) for devices, cases in RELEASE.items() for case in cases),
]


@pytest.mark.parametrize(("devices", "job"), [pytest.param(*each[:2], marks=each[2]) for each in FORMULAS])
def test_plan_matches_the_compiled_step(found, devices: int, job: str) -> None:
    _, config = case_of(job)
    formula, program = found[devices, job]["formula"], found[devices, job]["program"]
    for kind in formula.keys() | program.keys():
        if not kind.startswith("all-reduce"):
            assert program.get(kind) == formula.get(kind), kind
            continue
        # What is left are numbers: of the gradients' norm one for each parameter, of losses and loads a few, and
        # some vectors of E for each mixture. The smallest matrix has more.
        training, layers = config.training, config.model.all_layers
        choices = sum(routed.num_choices for layer in layers if (routed := layer.routed) is not None)
        few = 4 * (len(parameter_table(config.model)) + training.gradient_accumulation * (16 + 4 * choices))
        (arrays, size), (known, known_size) = program.get(kind, (0, 0)), formula.get(kind, (0, 0))
        assert known <= arrays, kind
        assert 0 <= size - known_size <= few, (kind, size, known_size)


@pytest.mark.parametrize(("devices", "job"), [pytest.param(*each[:2], marks=each[2]) for each in FORMULAS])
def test_arguments_of_a_device_match_the_plan(found, devices: int, job: str) -> None:
    mesh, config = case_of(job)
    training = config.training
    apart = devices // mesh.get("tensor", 1)
    batch = 4 * training.batch_size * 2 * training.sequence_length // apart  # tokens and targets
    learning_rate = updates = 4
    memory = found[devices, job]["memory"]
    held = memory["parameters"] + memory["moments"] + memory["state"]
    assert found[devices, job]["arguments"] == held + batch + learning_rate + updates


@pytest.mark.release  # the gate's cases have this exchange beside a tensor axis
@on(8, "formula", "top_k", {"data": 2, "expert": 4}, EIGHT)
def test_no_matrix_of_an_expert_is_gathered(found, devices: int, job: str) -> None:
    program = found[devices, job]["program"]
    assert {kind.split()[0] for kind in program} == {"all-to-all", "all-reduce"}
    layers, of_experts, tokens, width, experts = 2, 4, 16, 32, 8
    rows = tokens * 2  # K = 2 = E / n
    sent = 4 * of_experts * rows * width
    assert program["all-to-all expert"] == [layers * 5, layers * (4 * sent + 4 * experts)]


DEEP = (*EIGHT, "model.layers[0].repeat=4", "training.rematerialize=block")


@pytest.mark.release  # three programs, one of them slow
@on(4, "programs", "top_k", {"fsdp": 2, "expert": 2}, DEEP)
def test_plan_derived_from_few_layers_matches_the_whole_model(found, devices: int, job: str) -> None:
    found = found[devices, job]
    assert found["derived"]["layers"] == [1, 2]
    assert found["whole"]["layers"] == found["slow"]["layers"] == [4]
    assert found["derived"]["arguments"] == found["whole"]["arguments"] == found["slow"]["arguments"]
    assert found["derived"]["collectives"] == found["whole"]["collectives"] == found["slow"]["collectives"]


@on(4, "chips", "top_k", {"data": 2, "expert": 2}, (*EIGHT, "model.layers[0].repeat=1"))
def test_plan_for_a_topology_has_the_same_arguments(found, devices: int, job: str) -> None:
    """The code path for TPUs, with simulated devices in their place."""
    found = found[devices, job]
    assert found["argument_bytes"] == found["simulated"]
    assert found["temporary_bytes"] > 0


@pytest.mark.release  # the gate's cases have accumulations, of recomputed blocks
@on(8, "formula", "top_k", {"fsdp": 4, "expert": 2}, (*EIGHT, *MICRO))
def test_blocks_are_all_gathered_once_per_micro_batch(found, devices: int, job: str) -> None:
    """Else a device would have all parameters at once. Embedding and head, which all of a step needs, may be."""
    found = found[devices, job]
    (arrays, size), (known, known_size) = (found[which]["all-gather fsdp"] for which in ("program", "formula"))
    assert (known - arrays, known_size - size) in ((0, 0), (2, 2 * 4 * 64 * 32))


@pytest.mark.parametrize(
    ("mesh", "compiled"),
    [("fsdp=4,expert=64", 256), ("data=4,fsdp=16,expert=64", 8)],
)
@pytest.mark.release
def test_671_billion_parameters_are_planned_within_a_minute_without_weights(mesh: str, compiled: int) -> None:
    require_backend("jax")
    command = [
        sys.executable,
        "-m",
        "moezoo",
        "plan",
        "configs/large/deepseek_v3_pretraining.yaml",
        "--mesh",
        mesh,
        "--json",
    ]
    command += ["--memory", "80GiB", "--set", "training.batch_size=16384", "--set", "training.gradient_accumulation=4"]
    begun = time.monotonic()
    measured = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert measured.returncode == 0, measured.stderr
    seconds, peak = json.loads(measured.stderr.splitlines()[-1])
    known = json.loads(measured.stdout)
    # The processor's seconds, for others may share the machine; the clock's as far as they do.
    assert seconds < 60
    assert time.monotonic() - begun < 180
    assert peak < 3 * 2**30  # one matrix of the experts of one layer has 15 GB
    assert known["memory_bytes"]["parameters"] * known["devices"] > 4 * 671e9
    assert known["compiled"]["devices"] == compiled
    assert known["extrapolated"] == (known["devices"] > 256)
    assert known["compiled"]["layers"] == [2, 3, 3]
    for own in known["compiled"]["collectives"]:
        if own["kind"] != "all-reduce":
            assert own["formula"] == own["program"]
        elif own["formula"]["arrays"]:
            assert own["program"]["bytes"] == pytest.approx(own["formula"]["bytes"], rel=1e-5)
