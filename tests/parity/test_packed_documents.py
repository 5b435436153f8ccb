"""Packed sequences: a document is computed as if it were alone, in the reference and in both backends.

The reference shows that the loss and every gradient of packed documents are those of the documents alone, and the
backends that theirs are the reference's.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import Config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import DataError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.losses import loss_and_gradients
from moezoo.core.reference.transformer import forward
from moezoo.core.runs.init_from import load_resolved_config
from moezoo.core.spec import DroplessSpec, ExpertChoiceSpec, LayerSpec, ModelSpec
from moezoo.core.tokens import IGNORED, PADDING, check_documents
from tests.support.backends_available import require_backend
from tests.support.covering import COMBINATIONS, TINY
from tests.support.tolerances import (
    BFLOAT16_GRADIENT,
    BFLOAT16_LOSS,
    FLOAT32,
    FLOAT32_GRADIENT,
    FLOAT64,
    assert_all_close,
    assert_close,
)
from tests.support.twins import Twin

LENGTHS = [[9, 1, 13, 5, 6], [40], [3, 30]]
"""Of the documents of each sequence: longer and shorter than windows, chunks and convolutions; two end in padding."""
T = 40  # longer than a chunk of the gated delta rule on the backends
SMALL = [*COMBINATIONS, *TINY]
KINDS = ("delta_attention", "sparse_attention", "windows")
"""Combinations that have, together, a recurrence and convolutions, latent attention, an indexer, windows and chunks."""


def documents() -> np.ndarray:
    """Document ids [B, T]."""
    ids = np.full((len(LENGTHS), T), PADDING, np.int32)
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) * 3, lengths)  # ids need not be consecutive
    return ids


@cache
def sized(path: Path) -> Config:
    config = load_resolved_config(path)
    return config if config.model.vocab_size is not None else with_vocab_size(config, 31)


@cache
def weights_of(path: Path) -> dict[str, np.ndarray]:
    return initial_weights(sized(path).model, 0)


def parameters_of(path: Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in weights_of(path).items()}


@cache
def batch_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets [B, T] of packed sequences."""
    tokens, targets = np.random.default_rng(1).integers(0, sized(path).model.vocab, (2, len(LENGTHS), T))
    targets[documents() == PADDING] = IGNORED
    return tokens.astype(np.int32), targets.astype(np.int32)


def without_competition(spec: ModelSpec) -> ModelSpec:
    """The model without auxiliary losses, of which most are of a batch, and no sum over documents; and dropless."""

    def alone(layer: LayerSpec) -> LayerSpec:
        parts = {"moe": layer.moe, "head_router": layer.head_router}
        fields = {"moe": {"losses": (), "dispatch": DroplessSpec()}, "head_router": {"losses": ()}}
        return layer.model_copy(
            update={name: part.model_copy(update=fields[name]) for name, part in parts.items() if part is not None}
        )

    return spec.model_copy(update={"layers": tuple(map(alone, spec.layers))})


def experts_choose(spec: ModelSpec) -> bool:
    """True where experts choose among the tokens of all documents."""
    return any(isinstance(moe.router.choice, ExpertChoiceSpec) for _, moe in spec.moes)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in KINDS else pytest.mark.release)
        for path in SMALL
        if not experts_choose(sized(path).model)
    ],
)
def test_packed_documents_are_computed_as_if_each_were_alone(path):
    spec, parameters = without_competition(sized(path).model), parameters_of(path)
    tokens, targets = batch_of(path)
    ids = documents()
    terms, gradients = loss_and_gradients(spec, parameters, tokens, targets, document_BT=ids)
    loss, sums = 0.0, {name: np.zeros_like(value) for name, value in gradients.items()}
    for row, own in enumerate(ids):
        for document in np.unique(own[own != PADDING]):
            place = slice(*np.flatnonzero(own == document)[[0, -1]] + [0, 1])
            share = np.sum(own == document) / np.sum(ids != PADDING)
            alone, of_alone = loss_and_gradients(
                spec, parameters, tokens[row : row + 1, place], targets[row : row + 1, place]
            )
            loss += share * alone["loss"]
            sums = {name: sums[name] + share * of_alone[name] for name in sums}
    assert_close(terms["loss"], loss, FLOAT64, "loss")
    assert_all_close(gradients, sums, FLOAT64)


def marks_of(path: Path, backend: str) -> tuple:
    """JAX compiles a config for seconds: the gate has its step of packed documents in test_rematerialization.py."""
    return () if backend != "jax" and path.stem in KINDS else (pytest.mark.release,)


@cache
def forced_of(path: Path) -> list[np.ndarray]:
    """Experts of the reference, [P, K] per MoE layer, -1 where unused: it decides near ties, of which some have one."""
    result = forward(sized(path).model, parameters_of(path), batch_of(path)[0], document_BT=documents())
    return [np.where(routing.valid_PK, routing.expert_PK, -1).astype(np.int32) for routing in result.routings]


@pytest.mark.parametrize(
    ("path", "backend"),
    [
        pytest.param(path, backend, id=f"{'/'.join(path.parts[-2:])}-{backend}", marks=marks_of(path, backend))
        for path in SMALL
        for backend in ("jax", "mlx")
    ],
)
def test_packed_loss_and_gradients_are_those_of_the_reference(path, backend):
    require_backend(backend)
    spec, exact = sized(path).model, sized(path).model.precision.compute == "float32"
    forced = forced_of(path)
    expected, of_reference = loss_and_gradients(
        spec, parameters_of(path), *batch_of(path), document_BT=documents(), forced=forced
    )
    model = Twin(backend).backend().build(spec, weights_of(path))
    by_sequence = [expert_PK.reshape(len(LENGTHS), T, -1) for expert_PK in forced]
    losses, gradients = model.loss_and_gradients(*batch_of(path), documents=documents(), forced=by_sequence or None)
    assert_all_close(losses, expected, FLOAT32 if exact else BFLOAT16_LOSS)
    assert_all_close(gradients, of_reference, FLOAT32_GRADIENT if exact else BFLOAT16_GRADIENT)


@pytest.mark.parametrize(
    ("path", "backend"),
    [
        pytest.param(path, backend, id=f"{path.stem}-{backend}", marks=() if backend != "jax" else pytest.mark.release)
        for path in COMBINATIONS
        if path.stem in KINDS
        for backend in ("reference", "mlx", "jax")
    ],
)
def test_a_changed_token_in_one_document_moves_nothing_in_another(path, backend):
    """Bit for bit. Routing is that of the first pass: products with other numbers of rows round otherwise."""
    spec, (tokens, _), ids = without_competition(sized(path).model), batch_of(path), documents()
    changed, place = tokens.copy(), (0, 12)
    changed[place] = (tokens[place] + 1) % spec.vocab
    forced = forced_of(path)

    def logits_of(tokens: np.ndarray) -> np.ndarray:
        if backend == "reference":
            return forward(spec, parameters_of(path), tokens, document_BT=ids, forced=forced).logits_BTV
        require_backend(backend)
        model = Twin(backend).backend().build(spec, weights_of(path))
        by_sequence = [expert_PK.reshape(len(LENGTHS), T, -1) for expert_PK in forced]
        return model.forward(tokens, documents=ids, forced=by_sequence).logits

    before, after = logits_of(tokens), logits_of(changed)
    moved = np.any(before != after, axis=-1)
    same_document = np.zeros(ids.shape, bool)
    same_document[place[0]] = ids[place[0]] == ids[place]
    assert moved[place]
    assert not np.any(moved & ~same_document)


def test_documents_in_disorder_and_targets_in_padding_are_refused():
    tokens, ids = np.zeros((1, 4), np.int32), np.array([[0, 1, 1, PADDING]], np.int32)
    targets = np.array([[1, 1, 1, IGNORED]], np.int32)
    check_documents(tokens, targets, ids)
    with pytest.raises(DataError, match="fall along a sequence"):
        check_documents(tokens, None, ids[:, ::-1])
    with pytest.raises(DataError, match="padding has targets"):
        check_documents(tokens, np.ones((1, 4), np.int32), ids)
    with pytest.raises(DataError, match="Give each token a document"):
        check_documents(tokens, None, ids[:, :3])
