"""Train tiny models on 8 simulated devices and on one, and print their differences. Run by the tests.

python on_devices.py JOB...     a line of JSON for each; a JOB is JSON too: [what, config, changes, mesh, ...]

    what        equal       differences of losses, gradients and steps, for each of several meshes
                equal_mlx   the same from MLX on one device, which has nothing to compile
                equal_floored  as equal_mlx; gradients that may be 0 have parity's floor, 1e-3 of the largest, and
                            differences are what is beyond ten times the effect of one rounding of the weights
                packed      the same as equal of packed documents
                packed_floored  the same as equal_floored of packed documents
                collectives of a step
                of_score    collectives of scoring 3 sequences
                donated     arrays that a step writes in place
                replayed    differences of a step, and of scores of 3 sequences, with forced routing
                answers     everything that a model can be asked for where it was trained
                generated   what follows prompts of unequal length that are read in pieces, beside MLX; tokens, and the
                            logits of a cache; and of a prompt that begins as one of which caches were kept
    changes     {"replaced": [[old, new], ...] in the config's text, "seed": of the initial weights}
    mesh        e.g. {"data": 8}
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from moezoo.backends import load_backend, missing_packages
from moezoo.core.config.run_config import parse_config
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.generation import prefill
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parity.report import ParityTolerances
from moezoo.core.reference.losses import loss_and_gradients
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.reference.transformer import forward
from moezoo.core.reuse import Reuse
from moezoo.core.tokens import IGNORED, NOT_REPLAYED, PADDING, UNUSED
from moezoo.jax_backend.backend import JaxBackend
from moezoo.jax_backend.runtime.step_batch import step_batch

VOCAB, STEPS = 64, 3


def config_of(path: Path, replaced: Iterable[tuple[str, str]] = (), seed: int = 0):
    """With 8 experts where they are not a multiple, so that any mesh of 8 devices may shard them."""
    text = path.read_text(encoding="utf-8")
    for old, new in replaced:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    text = re.sub(
        r"num_experts: ([0-9]+)", lambda found: found[0] if int(found[1]) % 8 == 0 else "num_experts: 8", text
    )
    config = parse_config(text, str(path))
    changes = {"model": config.model.model_copy(update={"vocab_size": VOCAB})}
    return config.model_copy(update=changes | {"training": config.training.model_copy(update={"seed": seed})})


def weights_of(config):
    return initial_weights(config.model, config.training.seed, active_adapters=True)


def mesh_and_options(given: dict):
    """What is of `mesh`, and what `start_training` is given."""
    options = {name: given[name] for name in ("rematerialize", "layers") if name in given}
    return MeshConfig(**{name: value for name, value in given.items() if name not in options}), options


def one_device(backend: str):
    """JAX, or MLX, which other tests hold equal to it; JAX too where MLX is not installed."""
    return JaxBackend(MeshConfig()) if backend == "jax" or missing_packages("mlx") else load_backend("mlx")


def trained(backend, config, options, windows, key, documents=None):
    """Losses and gradients of the first step, all steps, scores, and the model.

    Gradients are the first moments after one step, up to a factor: so they need no program of their own. What Adafactor
    keeps instead is compared as it is. SGD has a rate at which a step changes the loss as those of the others do.
    """
    rate = 0.3 if config.optimizer.kind == "sgd" else 1e-3
    model = backend.build(config.model, weights_of(config))
    model.start_training(config.optimizer, **options)
    keys, targets = np.stack([key, key + 1]), targets_of(windows, documents)
    steps = [model.train_step(windows, rate, keys, targets, documents).fetch()]
    moments = model.export_optimizer()
    kinds = ("first_moment.", "momentum.")
    gradients = {name: value for name, value in moments.items() if name.startswith(kinds)} or moments
    steps += [model.train_step(windows, rate, keys, targets, documents).fetch() for _ in range(1, STEPS)]
    scored = (windows[0, :, :-1], windows[0, :, 1:]) if documents is None else (windows[0, :, :-1], targets[0])
    ids = None if documents is None else documents[0]
    ways = {False, config.model.inference_differs}
    scores = [model.score(*scored, inference=way, documents=ids).token_losses for way in sorted(ways)]
    return steps[0].losses, gradients, steps, scores, model


def targets_of(windows, documents):
    """With different numbers in both micro-batches, and none on one device."""
    targets = windows[..., 1:].copy()
    targets[0, :, 3:], targets[:, 2] = IGNORED, IGNORED
    if documents is not None:
        targets[documents == PADDING] = IGNORED
    return targets


def moved_by_rounding(config, windows, documents, floor: float, draws: int = 4) -> dict[str, float]:
    """Ten times how far float32 roundings of all weights move each gradient in float64, as `apart` says it.

    Two sides in float32 cannot be nearer than a multiple of that: a sum of terms of both signs has the roundings of its
    terms, and a root of what is near 0 those of its argument many times. After parity's `rounding_sensitivity`.
    """
    length = windows.shape[-1] - 1
    tokens, targets = windows[..., :-1].reshape(-1, length), targets_of(windows, documents).reshape(-1, length)
    given = {"document_BT": None if documents is None else documents.reshape(-1, length)}
    exact = {name: value.astype(np.float64) for name, value in weights_of(config).items()}
    routings = forward(config.model, exact, tokens, **given).routings
    given["forced"] = [np.where(own.valid_PK, own.expert_PK, UNUSED) for own in routings]
    _, gradients = loss_and_gradients(config.model, exact, tokens, targets, **given)
    least = floor * max(np.abs(value).max() for value in gradients.values())
    generator, found = np.random.default_rng(0), dict.fromkeys(gradients, 0.0)
    for _ in range(draws):
        rounded = {
            name: value * (1 + generator.uniform(-1, 1, value.shape) * 2.0**-24) for name, value in exact.items()
        }
        _, moved = loss_and_gradients(config.model, rounded, tokens, targets, **given)
        found = {name: max(found[name], apart(value, moved[name], least)) for name, value in gradients.items()}
    return {name: 10 * value for name, value in found.items()}


def apart(one, other, floor: float = 1e-12) -> float:
    """The largest difference, as a share of the largest number, which is taken to be `floor` at least."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), floor))


def packed_floored(config, *meshes: dict) -> dict:
    return packed(config, *meshes, alone="mlx", floor=ParityTolerances().gradient_floor)


def packed(config, *meshes: dict, **how) -> dict:
    ids = np.full((2, 8, 16), PADDING, np.int32)
    for part, lengths in zip(np.ndindex(2, 8), 4 * [[16], [3, 9, 2], [1, 15], [7, 6]], strict=True):
        ids[part][: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return equal(config, *meshes, documents=ids, **how)


def equal_mlx(config, *meshes: dict) -> dict:
    return equal(config, *meshes, alone="mlx")


def equal_floored(config, *meshes: dict) -> dict:
    return equal(config, *meshes, alone="mlx", floor=ParityTolerances().gradient_floor)


def equal(config, *meshes: dict, documents=None, alone="jax", floor=0.0) -> dict:
    windows = np.random.default_rng(0).integers(0, VOCAB, (2, 8, 17)).astype(np.int32)
    key = np.array([1, 2], np.uint32)
    losses, gradients, steps, scores, model = trained(one_device(alone), config, {}, windows, key, documents)
    least = max(1e-12, floor * max(np.abs(value).max() for value in gradients.values()))
    allowed = moved_by_rounding(config, windows, documents, floor) if floor else {}
    found = {}
    for given in meshes:
        mesh, options = mesh_and_options(given)
        mine = trained(JaxBackend(mesh), config, options, windows, key, documents)
        assert sorted(mine[0]) == sorted(losses)
        assert sorted(mine[1]) == sorted(gradients)
        exported = mine[4].export_parameters()
        found[json.dumps(given)] = {
            "losses": max(apart(losses[name], mine[0][name]) for name in losses),
            "gradients": max(
                apart(gradients[name], mine[1][name], least) - allowed.get(name.partition(".")[2], 0.0)
                for name in gradients
            ),
            "steps": max(
                apart(step.losses[name], own.losses[name])
                for step, own in zip(steps, mine[2], strict=True)
                for name in step.losses
            ),
            "loads": all(
                all(map(np.array_equal, step.load, own.load)) and step.dropped == own.dropped
                for step, own in zip(steps, mine[2], strict=True)
            ),
            "scores": apart(scores, mine[3]),
            "state": max(
                [apart(steps[-1].state[name], mine[2][-1].state[name]) for name in steps[-1].state], default=0.0
            ),
            "parameters": max(
                apart(value, exported[name]) - allowed.get(name, 0.0)
                for name, value in model.export_parameters().items()
            ),
        }
    return found


def answered(backend, config, options) -> tuple[dict, list]:
    """All that a model says where it was trained, by name, for a batch that a mesh can share equally and one it cannot.

    And the tokens that follow prompts of unequal length.
    """
    model = backend.build(config.model, weights_of(config))
    model.start_training(config.optimizer, **options)
    windows = np.random.default_rng(0).integers(0, VOCAB, (1, 8, 17)).astype(np.int32)
    model.train_step(windows, 1e-3).fetch()
    found, generated = {}, []
    for batch in (8, 3):
        tokens, targets = windows[0, :batch, :-1], windows[0, :batch, 1:]
        named = uncached(model, tokens, targets)
        named["prefill"], cache = model.prefill(tokens, 24)
        named["decode"], _ = model.decode(targets[:, -1], cache)
        found |= {f"{name} of {batch}": value for name, value in named.items()}
        generation = model.start_generation([tokens[0, :5], *tokens[1:]], 6, SamplingOptions(temperature=0.8, seed=3))
        generated.append([generation.next().fetch().tolist() for _ in range(6)])
    return found, generated


def uncached(model, tokens, targets) -> dict:
    output = model.forward(tokens, targets, record=True)
    named = {"logits": output.logits, **output.losses, **output.intermediates}
    forced = [routing.expert for routing in output.routing]
    named |= model.loss_and_gradients(tokens, targets, forced=forced)[1]
    scores = model.score(tokens, targets, inference=True, routing=True)
    named |= {"score": scores.token_losses, "load": scores.load, "dropped": scores.dropped}
    return named | {f"selection.{own.layer}": own.selection for own in scores.routing}


def answers(config, given: dict) -> dict:
    mesh, options = mesh_and_options(given)
    mine, generated = answered(JaxBackend(mesh), config, options)
    alone, expected = answered(one_device("jax"), config, {})
    assert sorted(mine) == sorted(alone)
    return {"apart": {name: apart(alone[name], mine[name]) for name in alone}, "tokens": generated == expected}


def generated(config, *meshes: dict) -> dict:
    prefill.CHUNK = 16  # all pieces of a prompt have this width
    (alone, expected), *others = (
        continued(backend, config)
        for backend in (one_device("mlx"), *map(JaxBackend, map(MeshConfig.model_validate, meshes)))
    )
    return {
        json.dumps(mesh): {
            "apart": {name: apart(alone[name], mine[name]) for name in alone},
            "tokens": tokens == expected,
        }
        for mesh, (mine, tokens) in zip(meshes, others, strict=True)
    }


def continued(backend, config) -> tuple[dict, list]:
    """The logits of three pieces and of two tokens behind them; and the tokens of three generations."""
    model = backend.build(config.model, weights_of(config))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 42)).astype(np.int32)
    logits, cache = model.prefill(tokens[:, :40], 48)
    found = {"prefill": logits}
    for place in (40, 41):
        found[f"decode {place}"], cache = model.decode(tokens[:, place], cache)
    options = SamplingOptions(temperature=0.8, seed=3)
    prompts = [tokens[0, :5], tokens[1, :20], tokens[2, :40]]
    kept = model.start_generation([tokens[2, :20]], 4, options, Reuse(keep=(9,)))
    parts = [model.start_generation(prompts, 6, options), kept]
    spoken = [[part.next().fetch().tolist() for _ in range(4)] for part in parts]
    assert kept.reusable(9) == 9
    again = model.start_generation([tokens[2, :17]], 4, options, Reuse(kept, 9))
    return found, [*spoken, [again.next().fetch().tolist() for _ in range(4)]]


def replayed(config, *meshes: dict) -> dict:
    """A step of two micro-batches with experts that are drawn, every fourth token routed freely; and 3 scores."""
    generator = np.random.default_rng(0)
    windows = generator.integers(0, VOCAB, (2, 8, 17)).astype(np.int32)
    forced = []
    for _, moe in config.model.moes:
        drawn = generator.permuted(np.tile(np.arange(moe.num_choices), (2, 8, 16, 1)), axis=3)[..., : moe.num_slots]
        forced.append(np.where(np.arange(16)[:, None] % 4, drawn, NOT_REPLAYED).astype(np.int32))
    results = []
    for mesh, options in map(mesh_and_options, ({}, *meshes)):
        model = JaxBackend(mesh).build(config.model, weights_of(config))
        model.start_training(config.optimizer, **options)
        metrics = model.train_step(windows, 1e-3, forced=forced).fetch()
        gradients = {name: value for name, value in model.export_optimizer().items() if name.startswith("first_")}
        batch = (windows[0, :3, :-1], windows[0, :3, 1:])
        scores = model.score(*batch, forced=[own[0, :3] for own in forced], routing=True)
        experts = {f"expert.{own.layer}": own.expert for own in scores.routing}
        results.append({**metrics.losses, **gradients, "load": metrics.load, "score": scores.token_losses, **experts})
    alone, *others = results
    return {
        json.dumps(mesh): {name: apart(alone[name], mine[name]) for name in alone}
        for mesh, mine in zip(meshes, others, strict=True)
    }


def compiled_step(config, given: dict, micro_batches: int = 1):
    mesh, options = mesh_and_options(given)
    model = JaxBackend(mesh).build(config.model, weights_of(config))
    model.start_training(config.optimizer, **options)
    batch = jax.tree.map(model._placement.of_all_processes, step_batch(np.zeros((micro_batches, 8, 17), np.int32)))
    with model._placement.active(8):
        return model, model._step.lower(*model._step_inputs(batch, 1e-3, None)).compile()


def collectives(config, given: dict) -> dict:
    return collectives_in(compiled_step(config, given)[1].as_text())


def of_score(config, given: dict) -> dict:
    model = JaxBackend(MeshConfig(**given)).build(config.model, weights_of(config))
    compiled, seen = model._score, []

    def watched(*values, **named):
        seen.append(compiled.lower(*values, **named).compile().as_text())
        return compiled(*values, **named)

    model._score = watched
    model.score(np.zeros((3, 16), np.int32), np.zeros((3, 16), np.int32))
    return collectives_in(seen[0])


def collectives_in(text: str) -> dict:
    """Count the collectives of a program by payload shape; `loop` marks those inside a loop."""
    computations = dict(re.findall(r"^(?:ENTRY )?(%\S+) .*?\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    inside, seen = [name for body in computations.values() for name in re.findall(r"body=(%[\w.-]+)", body)], set()
    while inside:
        seen.add(name := inside.pop())
        called = re.findall(r"(?:body|condition|calls|to_apply)=(%[\w.-]+)", computations[name])
        inside += [each for each in called if each not in seen]
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    found: Counter[str] = Counter()
    for name, body in computations.items():
        for shapes, kind in re.findall(rf"= (.*?) ({kinds})\(", body):
            each = re.findall(r"[a-z]+[0-9]+\[[0-9,]*\]", shapes)
            for shape in set(each) if kind == "all-to-all" else each:
                found[f"{'loop ' if name in seen else ''}{kind} {shape}"] += 1
    return dict(found)


def donated(config, given: dict) -> dict:
    """Arrays of a step that keeps their places, all that should, and how many bytes it needs for others' results."""
    model, compiled = compiled_step(config, given, micro_batches=2)
    header = compiled.as_text().partition("\n")[0]
    plan = compiled.memory_analysis()
    given = jax.tree.leaves((model._parameters, model._moments))
    shards = [value.addressable_shards[0].data.nbytes for value in given]
    return {
        "kept": len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", header)),
        "arrays": len(given),
        "kept_bytes": plan.alias_size_in_bytes,
        "bytes": sum(shards),
        "other_results": plan.output_size_in_bytes - plan.alias_size_in_bytes,
    }


if __name__ == "__main__":
    every = (equal, equal_mlx, equal_floored, packed, packed_floored)
    every += (collectives, of_score, donated, replayed, answers, generated)
    whats = {function.__name__: function for function in every}
    for job in sys.argv[1:]:
        what, path, changes, *meshes = json.loads(job)
        print(json.dumps(whats[what](config_of(Path(path), **changes), *meshes)))
