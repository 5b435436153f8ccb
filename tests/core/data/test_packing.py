import numpy as np

from moezoo.core.data.packing import Epochs, cut, first_fit, packed


def lengths(count, seed=0):
    return np.maximum(1, np.random.default_rng(seed).lognormal(2, 1, count)).astype(np.int64)


def slow_first_fit(size, room):
    free, found = [], []
    for needed in size:
        fits = [sequence for sequence, left in enumerate(free) if left >= needed]
        sequence = fits[0] if fits else len(free)
        free += [] if fits else [room]
        free[sequence] -= needed
        found.append(sequence)
    return found


def test_every_token_of_a_document_but_its_first_is_a_target_once():
    length = np.array([1, 2, 9, 10, 26])
    start = np.array([0, 3, 6, 20, 40])
    pieces = cut(start, length, 8)
    assert pieces.size.tolist() == [1, 8, 8, 1, 8, 8, 8, 1]
    targets = np.concatenate(
        [np.arange(own, own + size) + 1 for own, size in zip(pieces.start, pieces.size, strict=True)]
    )
    expected = np.concatenate([np.arange(first + 1, first + count) for first, count in zip(start, length, strict=True)])
    assert targets.tolist() == expected.tolist()


def test_each_piece_goes_into_the_first_sequence_with_room():
    for count in (1, 2, 3, 7, 200):
        size = np.random.default_rng(count).integers(1, 33, count)
        assert first_fit(size, 32).tolist() == slow_first_fit(size.tolist(), 32)


def test_an_epoch_has_every_piece_once_and_no_sequence_overflows():
    length = lengths(500)
    pieces = cut(np.cumsum(length) - length, length, 32)
    for epoch in (None, 0, 1):
        packing = packed(pieces, 32, 7, 0, epoch)
        assert np.sort(packing.piece).tolist() == list(range(len(pieces.size)))
        assert np.add.reduceat(pieces.size[packing.piece], packing.first[:-1]).max() <= 32


def test_epochs_are_a_function_of_the_seed_and_differ():
    length = lengths(50)
    pieces = cut(np.cumsum(length) - length, length, 32)
    epochs = Epochs(pieces, 32, 7, 0)
    numbers = range(3 * len(epochs.epoch(0)))
    places = [epochs.find(number) for number in numbers]
    resumed = Epochs(pieces, 32, 7, 0)  # from any number on
    assert [resumed.find(number) for number in reversed(numbers)] == places[::-1]
    for epoch in (0, 1):
        own = [within for which, within in places if which == epoch]
        assert own == list(range(len(epochs.epoch(epoch))))
    assert epochs.epoch(0).piece.tolist() == resumed.epoch(0).piece.tolist()
    assert epochs.epoch(0).piece.tolist() != epochs.epoch(1).piece.tolist()
    assert epochs.epoch(0).piece.tolist() != Epochs(pieces, 32, 8, 0).epoch(0).piece.tolist()
