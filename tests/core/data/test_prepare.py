import json
import os
import resource
import sys
import time

import numpy as np
import pytest

from moezoo.core.config.data import DataConfig
from moezoo.core.data import sample_order, source_files, token_cache, token_store
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.prepare import prepare_data, whole_file
from moezoo.core.data.tokenizers import ByteTokenizer, CharacterTokenizer, with_first_tokens
from moezoo.core.errors import DataError, TokenizerError

T = 5
TEXT = "the cat sat\non the mat é and 犬 saw 🙂\n\nthen the dog ran. " * 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEZOO_CACHE", str(folder))
    return folder


@pytest.fixture
def text_file(tmp_path):
    return write(tmp_path / "text.txt", TEXT)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def text(path, **more):
    return {"kind": "text", "path": str(path), **more}


def shards(path, **more):
    return {"kind": "tokens", "path": str(path), **more}


def jsonl(path, **more):
    return {"kind": "jsonl", "path": str(path), **more}


def config(*sources, tokenizer=None, validation_fraction=0.1):
    return DataConfig.model_validate(
        {
            "sources": sources,
            "tokenizer": tokenizer or {"kind": "character"},
            "validation_fraction": validation_fraction,
        }
    )


IDS = {"kind": "ids", "vocab_size": 5000}
BYTE = {"kind": "byte"}


def all_tokens(prepared, source=0):
    """Return all ids of one source: training split, then validation split."""
    parts = []
    for split in (prepared.train, prepared.validation):
        part = split.sources[source]
        parts.append(part.tokens.read(np.array([part.first]), part.num_tokens)[0])
    return np.concatenate(parts)


def all_text(prepared, source=0):
    return prepared.tokenizer.decode(all_tokens(prepared, source))


def write_bin(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())
    return path


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batch_is_a_pure_function_of_step_and_seed(text_file):
    first = prepare_data(config(text(text_file)), T).train
    for step in range(7):
        first.batch(step, 3, T, seed=11)
    batch = first.batch(7, 3, T, seed=11)
    again = prepare_data(config(text(text_file)), T).train.batch(7, 3, T, seed=11)
    assert batch.dtype == np.int32
    assert batch.shape == (3, T + 1)
    assert (batch == again).all()
    assert (batch != first.batch(7, 3, T, seed=12)).any()
    assert (batch != first.batch(8, 3, T, seed=11)).any()


def test_samples_do_not_depend_on_how_they_are_batched(text_file):
    split = prepare_data(config(text(text_file)), T).train
    by_four = np.concatenate([split.batch(step, 4, T, 1) for step in range(3)])
    by_six = np.concatenate([split.batch(step, 6, T, 1) for step in range(2)])
    assert (by_four == by_six).all()


def test_processes_read_only_their_own_rows_of_a_batch(text_file, monkeypatch):
    split = prepare_data(config(text(text_file)), T).train
    whole, read = split.batch(5, 8, T, 1), []
    tokens = type(split.sources[0].tokens)
    reading = tokens.read
    monkeypatch.setattr(
        tokens, "read", lambda self, starts, length: read.extend(starts) or reading(self, starts, length)
    )
    for rows in (np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])):
        read.clear()
        np.testing.assert_array_equal(split.batch(5, 8, T, 1, rows), whole[rows])
        assert len(read) == 4


def test_rows_are_windows_of_the_training_split(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), T)
    batch = prepared.train.batch(3, 64, T, 0)
    assert (np.diff(batch, axis=1) == 1).all()
    assert batch.max() < 900
    assert prepared.train.num_tokens == 900
    assert prepared.validation.num_tokens == 100


def test_positions_say_where_the_inputs_of_a_batch_and_of_windows_are(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    np.save(tmp_path / "b.npy", np.arange(1000, 2010))
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), shards(tmp_path / "b.npy"), tokenizer=IDS), T)
    rows = np.array([3, 40])
    source, place = prepared.train.positions(3, 64, T, 0, rows)
    np.testing.assert_array_equal(prepared.train.batch(3, 64, T, 0, rows)[:, :-1], 1000 * source[:, None] + place)
    windows = prepared.validation.windows(T)
    source, place = windows.positions(0, 40)
    first = np.where(source == 0, 900, 1909)[:, None]
    inputs = windows[:40][:, :-1]
    np.testing.assert_array_equal(np.where(place < 0, inputs, first + place), inputs)
    np.testing.assert_array_equal(place < 0, windows.are_repeated(0, 40))


def test_epoch_has_every_training_token_and_boundaries_change_per_epoch(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2003))
    split = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), T).train
    assert split.num_tokens == 1803
    n = sample_order.windows_per_epoch(1803, T)
    epochs = [split.batch(epoch, n, T, 5) for epoch in range(6)]
    for batch in epochs:
        assert set(batch.ravel().tolist()) == set(range(1803))
    assert len({tuple(np.sort(batch[:, 0])) for batch in epochs}) > 1


def test_sources_are_mixed_by_weight(tmp_path):
    for k in range(3):
        np.save(tmp_path / f"{k}.npy", np.full(400, k, np.uint16))
    sources = [shards(tmp_path / f"{k}.npy", weight=weight) for k, weight in enumerate([1.0, 3.0, 0.5])]
    prepared = prepare_data(config(*sources, tokenizer=IDS), T)
    counts = np.bincount(prepared.train.batch(2, 4500, T, 9)[:, 0], minlength=3)
    assert np.abs(counts - [1000, 3000, 500]).max() <= 3


def test_sources_without_weights_are_mixed_by_size(tmp_path):
    """9,899 and 1,003,851 tokens were mixed half and half: 13 epochs of the small one, of which nothing was said."""
    for k, size in enumerate((1000, 3000)):
        np.save(tmp_path / f"{k}.npy", np.full(size, k, np.uint16))
    paths = [tmp_path / f"{k}.npy" for k in range(2)]
    prepared = prepare_data(config(*map(shards, paths), tokenizer=IDS), T)
    assert np.abs(np.bincount(prepared.train.batch(2, 4000, T, 9)[:, 0]) - [1000, 3000]).max() <= 2
    assert [source.describe(7200) for source in prepared.summary] == [
        f"{paths[0]}: 900 training and 100 validation tokens, 25 % of the batches, 2.00 epochs",
        f"{paths[1]}: 2,700 training and 300 validation tokens, 75 % of the batches, 2.00 epochs",
    ]
    weighted = prepare_data(config(*(shards(path, weight=1.0) for path in paths), tokenizer=IDS), T)
    assert [source.describe(360) for source in weighted.summary] == [
        f"{paths[0]}: 900 training and 100 validation tokens, 50 % of the batches, 0.20 epochs",
        f"{paths[1]}: 2,700 training and 300 validation tokens, 50 % of the batches, 0.0667 epochs",
    ]


def test_the_only_source_has_no_weight():
    """Runs of earlier versions were saved with 1.0, and resume with configs that have none."""
    assert config(text("a.txt", weight=1.0)) == config(text("a.txt"))


def test_each_mixed_source_has_its_own_epochs(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    np.save(tmp_path / "b.npy", np.arange(1000, 5000))
    prepared = prepare_data(
        config(shards(tmp_path / "a.npy", weight=1.0), shards(tmp_path / "b.npy", weight=2.0), tokenizer=IDS), T
    )
    n = sample_order.windows_per_epoch(900, T)
    batch = prepared.train.batch(0, 3 * n - 2, T, 4)
    first = batch[batch[:, 0] < 1000, 0]
    assert len(first) in (n - 1, n)
    assert len(np.unique(first)) == len(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 3, T, 0), "step is out of range; got -1"),
        ((0, 0, T, 0), "batch_size is out of range; got 0"),
        ((0, 3, 0, 0), "sequence_length is out of range"),
        ((0, 3, T, -1), "seed is out of range"),
        ((1.0, 3, T, 0), "step is out of range; got 1.0"),
        ((0, 3, 5000, 0), r"training split is shorter than one sequence; got \d+ tokens"),
    ],
)
def test_invalid_arguments_of_batch_raise(text_file, arguments, message):
    split = prepare_data(config(text(text_file)), T).train
    with pytest.raises(DataError, match=message):
        split.batch(*arguments)


def test_batches_of_a_large_corpus_are_fast(tmp_path):
    shard = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint16, (200_000_000,))  # sparse, 400 MB
    del shard
    split = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), 128).train
    split.batch(0, 32, 128, 0)
    best = min(timed(lambda: [split.batch(step, 32, 128, 0) for step in range(100)]) for _ in range(5))
    assert best < 100 / 500  # 500 per second on a busy machine; about 4000 on an idle one


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- validation windows ----------------------------------------------------------------------------------------------


def test_validation_windows_have_each_target_once(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    np.save(tmp_path / "b.npy", np.arange(1000, 2010))
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), shards(tmp_path / "b.npy"), tokenizer=IDS), T)
    windows = prepared.validation.windows(T)
    assert windows.shape == (40, T + 1)
    assert prepared.validation.num_windows(T) == 40
    whole = np.asarray(windows)
    assert whole.dtype == np.int32
    assert (np.diff(whole, axis=1) == 1).all()
    targets = whole[:, 1:][~windows.are_repeated(0, 40)]
    assert targets.tolist() == [*range(901, 1000), *range(1910, 2010)]
    assert windows.are_repeated(19, 20).tolist() == [[True, False, False, False, False]]
    assert not windows.are_repeated(20, 41).any()
    assert windows[7:14].tolist() == whole[7:14].tolist()
    assert windows[3].tolist() == whole[3].tolist()
    assert windows[-1].tolist() == whole[-1].tolist()
    assert len(list(windows)) == 40
    with pytest.raises(IndexError):
        windows[40]


def test_fewer_validation_windows_are_evenly_spaced(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4000))
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS, validation_fraction=0.5), T)
    firsts = prepared.validation.windows(T, 10)[:][:, 0]
    assert len(firsts) == 10
    assert firsts[0] == 2000
    assert set(np.diff(firsts)) <= {195, 200}
    assert len(prepared.validation.windows(T, 10**6)) == 400
    with pytest.raises(DataError, match="count is out of range; got 0"):
        prepared.validation.windows(T, 0)


# --- text larger than memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("tokenizer", [{"kind": "character"}, BYTE])
def test_text_does_not_depend_on_the_chunk_size(text_file, monkeypatch, chunk, tokenizer):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 100)
    prepared = prepare_data(config(text(text_file), tokenizer=tokenizer), T)
    assert all_text(prepared) == TEXT
    if tokenizer["kind"] == "character":
        assert prepared.tokenizer.characters == "".join(sorted(set(TEXT)))


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("hub")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(str(folder))
    return folder


def test_long_line_is_encoded_in_pieces_of_bounded_size(tmp_path, hub_folder, monkeypatch):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", 100)
    encode, lengths = HuggingFaceTokenizer.encode, []

    def recorded(self, text, *, where="prompt"):
        lengths.append(len(text))
        return encode(self, text, where=where)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", recorded)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": TEXT * 5}) + "\n")
    prepared = prepare_data(config(jsonl(path), tokenizer={"kind": "huggingface", "path": str(hub_folder)}), T)
    assert max(lengths) <= 100 + 3 * 256
    assert all_tokens(prepared).tolist() == encode(prepared.tokenizer, TEXT * 5).tolist()


def test_files_of_a_folder_are_sorted_and_separated(tmp_path):
    write(tmp_path / "texts" / "b.txt", "second " * 20)
    write(tmp_path / "texts" / "a" / "z.txt", "first " * 20)
    write(tmp_path / "texts" / "notes.md", "not text")
    for path in (tmp_path / "texts", tmp_path / "texts" / "**" / "*.txt"):
        prepared = prepare_data(config(text(path)), T)
        assert all_text(prepared) == "first " * 20 + "\n\n" + "second " * 20


def test_documents_are_separated_by_end_of_text_if_the_tokenizer_has_it(tmp_path, hub_folder):
    lines = [{"text": "the cat"}, {"text": ""}, {"text": "the dog ran"}, {"text": "sat on the mat " * 5}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    prepared = prepare_data(config(jsonl(path), tokenizer={"kind": "huggingface", "path": str(hub_folder)}), 2)
    assert all_text(prepared) == "<|endoftext|>".join(line["text"] for line in lines if line["text"])
    plain = prepare_data(config(jsonl(path)), 2)
    assert all_text(plain) == "\n\n".join(line["text"] for line in lines if line["text"])


@pytest.fixture(scope="module")
def bos_folder(tmp_path_factory, hub_folder):
    """The tokenizer with a first token `<s>` in its post-processor."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_file(str(hub_folder / "tokenizer.json"))
    inner.add_special_tokens(["<s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    folder = tmp_path_factory.mktemp("bos")
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<|endoftext|>", "<s>the cat sat on the mat<|endoftext|><s>already begun<|endoftext|><s>犬"),
        (None, "<s>the cat sat on the mat<s>already begun<s>犬"),
        ("<s>", "<s>the cat sat on the mat<s>already begun<s>犬"),
    ],
)
def test_every_document_begins_with_the_first_token_once(tmp_path, bos_folder, monkeypatch, chunk, end, expected):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", chunk)
    path = write(
        tmp_path / "a.jsonl",
        "\n".join(json.dumps({"text": text}) for text in ("the cat sat on the mat", "<s>already begun", "犬")),
    )
    tokenizer = HuggingFaceTokenizer(str(bos_folder))
    if end is not None:
        tokenizer.end_of_text = int(tokenizer.encode(end)[0])
    prepared = prepare_data(config(jsonl(path), validation_fraction=0.3), 2, tokenizer=tokenizer)
    assert all_text(prepared) == expected
    [evaluated] = whole_file(str(path), tokenizer, 500).sources
    assert tokenizer.decode(evaluated.tokens.read(np.array([0]), evaluated.num_tokens)[0]) == expected
    with_prompt = with_first_tokens(tokenizer.encode("the cat"), tokenizer)
    assert all_tokens(prepared)[:2].tolist() == with_prompt[:2].tolist()


@pytest.mark.parametrize("chunk", [1, 10, 1 << 20])
def test_jsonl_lines_span_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", chunk)
    lines = [{"body": f"犬 {k} \u2028 é"} for k in range(20)]
    content = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=k % 2 == 0) for k, line in enumerate(lines))
    path = write(tmp_path / "a.jsonl", content)
    prepared = prepare_data(config(jsonl(path, field="body"), tokenizer=BYTE), T)
    assert all_text(prepared) == "\n\n".join(line["body"] for line in lines)


def test_text_is_read_from_a_url(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.txt", TEXT.encode())
    memory.pipe("/corpus/b.txt", b"more")
    memory.pipe("/corpus/ids.npy", b"")
    try:
        for path in ("memory://corpus/a.txt", "memory://corpus", "memory://corpus/*.txt"):
            expected = TEXT if path.endswith("a.txt") else TEXT + "\n\nmore"
            assert all_text(prepare_data(config(text(path)), T)) == expected
        np.save(tmp_path / "ids.npy", np.arange(100))
        memory.pipe("/corpus/ids.npy", (tmp_path / "ids.npy").read_bytes())
        prepared = prepare_data(config(shards("memory://corpus/ids.npy"), tokenizer=IDS), T)
        assert all_tokens(prepared).tolist() == list(range(100))
    finally:
        memory.rm("/corpus", recursive=True)


def test_text_is_read_from_a_named_dataset(text_file, monkeypatch):
    from moezoo.core.data import datasets as recipes

    monkeypatch.setattr(recipes, "dataset_path", lambda name: text_file if name == "mine" else None)
    prepared = prepare_data(config({"kind": "dataset", "name": "mine"}), T)
    assert all_text(prepared) == TEXT
    assert prepared.summary[0].source == "mine"


# --- cache -----------------------------------------------------------------------------------------------------------


def refuse(*_, **__):
    raise AssertionError("tokenized again")


def test_text_is_tokenized_once_and_again_if_it_changes(text_file, monkeypatch, cache):
    first = all_tokens(prepare_data(config(text(text_file)), T))
    with monkeypatch.context() as patch:
        patch.setattr(CharacterTokenizer, "encode", refuse)
        patch.setattr(token_store.Texts, "pieces", refuse)
        assert (all_tokens(prepare_data(config(text(text_file)), T)) == first).all()
    write(text_file, TEXT.replace("cat", "cow"))
    os.utime(text_file, ns=(1, 1))
    assert "cow" in all_text(prepare_data(config(text(text_file)), T))
    assert not list(cache.glob(".*"))


def test_tokenizers_do_not_share_cache_entries(text_file):
    data = config(text(text_file))
    assert all_text(prepare_data(data, T, tokenizer=ByteTokenizer())) == TEXT
    assert all_text(prepare_data(data, T)) == TEXT


def prepared_with_messages(data, **options):
    """Prepare data, and return it with the lines for the user."""
    messages = []
    return prepare_data(data, T, on_message=messages.append, **options), messages


def test_a_flipped_bit_anywhere_in_the_cache_is_named_and_the_entry_made_again(text_file, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "SHARD_TOKENS", 1000)
    data = config(text(text_file))
    prepare_data(data, T)
    files = [file for file in cache.rglob("*") if file.is_file()]
    assert {file.name[-10:] for file in files} >= {"index.json", "00000.npy"}
    assert len(files) == 4  # characters, two shards and their index
    content = {file: file.read_bytes() for file in files}
    for file in files:
        step = max(1, len(content[file]) // 5)
        for at in (*range(0, len(content[file]), step), len(content[file]) - 1):
            damaged = bytearray(content[file])
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            prepared, messages = prepared_with_messages(data)
            [message] = messages
            assert "the token cache is damaged and is made again: " in message
            assert file.name in message
            assert all_text(prepared) == TEXT
            assert {file: file.read_bytes() for file in files} == content
    assert prepared_with_messages(data)[1] == []


def cut(file):
    file.write_bytes(file.read_bytes()[:-50])


def zero(file):
    file.write_bytes(file.read_bytes()[:128] + bytes(file.stat().st_size - 128))


def replace_by_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [cut, zero, os.unlink, replace_by_pipe])
@pytest.mark.parametrize("name", ["00000.npy", "index.json"])
def test_a_damaged_cache_entry_is_made_again(text_file, cache, damage, name):
    prepare_data(config(text(text_file), tokenizer=BYTE), T)
    [entry] = cache.iterdir()
    damage(entry / name)
    prepared, [message] = prepared_with_messages(config(text(text_file), tokenizer=BYTE))
    assert name in message
    assert str(entry) in message
    assert all_text(prepared) == TEXT


def test_an_entry_under_the_name_of_another_is_made_again(tmp_path, cache):
    texts = [write(tmp_path / name, content) for name, content in (("a.txt", TEXT), ("b.txt", TEXT.upper()))]
    for path in texts:
        prepare_data(config(text(path), tokenizer=BYTE), T)
    first, second = cache.iterdir()
    for name in ("index.json", "00000.npy"):
        first_content, second_content = (first / name).read_bytes(), (second / name).read_bytes()
        (first / name).write_bytes(second_content)
        (second / name).write_bytes(first_content)
    for path in texts:
        prepared, [message] = prepared_with_messages(config(text(path), tokenizer=BYTE))
        assert "it has another key" in message
        assert all_text(prepared) == path.read_text()


def test_a_damaged_copy_of_a_remote_file_is_downloaded_again(tmp_path, cache):
    import fsspec

    memory = fsspec.filesystem("memory")
    np.save(tmp_path / "ids.npy", np.arange(100))
    content = (tmp_path / "ids.npy").read_bytes()
    memory.pipe("/corpus/ids.npy", content)
    data = config(shards("memory://corpus/ids.npy"), tokenizer=IDS)
    try:
        prepare_data(data, T)
        files = sorted(cache.iterdir())
        assert [file.suffix for file in files] == [".npy", ".json"]
        for file in files:
            damaged = bytearray(file.read_bytes())
            damaged[-10] ^= 1
            file.write_bytes(damaged)
            prepared, [message] = prepared_with_messages(data)
            assert file.name in message
            assert all_tokens(prepared).tolist() == list(range(100))
            assert prepared_with_messages(data)[1] == []
        files[1].unlink()  # as a process that is killed between the two files leaves it
        assert prepared_with_messages(data)[1] == []
    finally:
        memory.rm("/corpus", recursive=True)


def test_an_incomplete_download_is_refused(monkeypatch, cache):
    file = source_files.SourceFile("bucket/ids.npy", 100, "memory", filesystem=object())
    monkeypatch.setattr(source_files.SourceFile, "chunks", lambda self: iter([b"ab", b"c"]))
    with pytest.raises(DataError, match=r"the download is incomplete; got 3 bytes; expected 100; bucket/ids.npy"):
        token_cache.local_copy(file, None, pytest.fail)
    assert list(cache.iterdir()) == []


def test_ids_of_the_cache_are_checked_when_they_are_read(text_file, cache):
    prepared = prepare_data(config(text(text_file)), T)
    [shard] = cache.glob("*/00000.npy")
    status = shard.stat()
    damaged = bytearray(shard.read_bytes())
    damaged[129::2] = b"\xff" * len(damaged[129::2])  # the high byte of each id
    shard.write_bytes(damaged)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as damage of the disk does
    with pytest.raises(DataError, match="token id outside the vocabulary; got 65"):
        prepared.train.batch(0, 3, T, 0)


def test_everything_that_decides_the_tokens_is_in_the_key(tmp_path, hub_folder, bos_folder, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "the cat", "body": "a dog"}) for _ in range(9)))
    seen = []

    def prepared(folder=hub_folder, **source):
        tokenizer = HuggingFaceTokenizer(str(folder))
        sources = config(jsonl(path, **source), validation_fraction=0.5)
        data, messages = prepared_with_messages(sources, tokenizer=tokenizer)
        assert messages == []
        seen.append(all_text(data))
        return len(list(cache.iterdir()))

    def with_option(folder, **options):
        copy = tmp_path / "-".join(options)
        copy.mkdir()
        (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(config | options))
        return copy

    assert prepared() == prepared() == 1
    assert prepared(field="body") == 2
    assert prepared(bos_folder) == 3
    assert prepared(with_option(bos_folder, eos_token="<|endoftext|>")) == 4  # the same tokenizer.json
    assert prepared(with_option(hub_folder, bos_token="<|endoftext|>", add_bos_token=True)) == 5
    assert len(set(seen)) == 5
    monkeypatch.setattr(token_store, "version", lambda package: "0.0.1")
    assert prepared() == 6
    status = path.stat()  # other text of equal size and modification time, as an archive can have it
    write(path, path.read_text().replace("cat", "cow"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepared() == 7
    assert "cow" in seen[-1]


def test_failed_tokenization_leaves_no_files(tmp_path, cache):
    path = write(tmp_path / "a.txt", TEXT.encode() + b"\xff")
    with pytest.raises(DataError):
        prepare_data(config(text(path), tokenizer=BYTE), T)
    assert list(cache.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed_after_a_day(text_file, cache):
    for name, age_s in (("old", 2 * 86400), ("new", 60)):
        folder = cache / f".{name}.partial"
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age_s,) * 2)
    prepare_data(config(text(text_file)), T)
    assert [folder.name for folder in cache.glob(".*.partial")] == [".new.partial"]


def test_unwritable_cache_error_has_advice(text_file, tmp_path, monkeypatch):
    write(tmp_path / "file", "in the way")
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"token cache cannot be written.*Set MOEZOO_CACHE"):
        prepare_data(config(text(text_file)), T)


def test_default_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_cache.cache_folder() == tmp_path / "moezoo" / "tokens"


def test_progress_is_reported_up_to_the_total(text_file, monkeypatch):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", 100)
    seen = []
    prepare_data(config(text(text_file)), T, on_progress=lambda *row: seen.append(row))
    size = text_file.stat().st_size
    name = f"data.sources[0] ({text_file})"
    assert {row[0] for row in seen} == {f"reading {name}", f"tokenizing {name}"}
    assert seen[-1] == (f"tokenizing {name}", size, size)
    assert seen[0][1] == 100


# --- token shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i4", "u4", "i8", "u8"])
def test_npy_shards_of_every_integer_type(tmp_path, dtype):
    np.save(tmp_path / "a.npy", (np.arange(500) % 200).astype(dtype))
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), T)
    assert all_tokens(prepared).tolist() == (np.arange(500) % 200).tolist()
    assert prepared.train.batch(0, 2, T, 0).dtype == np.int32


def test_bin_and_npy_shards_are_concatenated(tmp_path):
    write_bin(tmp_path / "a.bin", np.arange(100))
    np.save(tmp_path / "b.npy", np.arange(100, 103))
    write_bin(tmp_path / "c.bin", np.arange(103, 300))
    prepared = prepare_data(config(shards(tmp_path), tokenizer=IDS), T)
    assert all_tokens(prepared).tolist() == list(range(300))
    batch = prepared.train.batch(0, 200, T, 0)  # windows cross one and two shard boundaries
    assert (np.diff(batch, axis=1) == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_bin(p / "a.bin", [1] * 50, magic=1), r"unknown header; got 1 and 1 .*expected the magic"),
        (lambda p: write_bin(p / "a.bin", [1] * 50, version=2), "unknown header; got 20240520 and 2"),
        (lambda p: write_bin(p / "a.bin", [1] * 50, count=60), "header has a count of 60 tokens, but the file has 50"),
        (lambda p: (p / "a.bin").write_bytes(b"x"), "unknown header; got nothing in 1 bytes"),
        (lambda p: (p / "a.npy").write_bytes(b"no"), "damaged or not a .npy file"),
        (lambda p: np.save(p / "a.npy", np.ones(9)), "its elements are '<f8', not integers"),
        (
            lambda p: np.save(p / "a.npy", np.ones((3, 3), int)),
            r"not a one-dimensional array of ids; got int64 \[3, 3\]",
        ),
        (lambda p: np.save(p / "a.npy", np.array(["a"], object)), "damaged or not a .npy file"),
        (lambda p: write_bin(p / "a.bin", []), "token shard is empty"),
        (lambda p: np.save(p / "a.npy", np.array([1, 5000] * 50)), "got 5000; expected 0 to 4999; .*a.npy"),
        (lambda p: np.save(p / "a.npy", np.array([1, -3] * 50)), "got -3; expected 0 to 4999"),
    ],
)
def test_invalid_shards_raise(tmp_path, make, message):
    folder = tmp_path / "shards"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError, match=message):
        prepare_data(config(shards(folder), tokenizer=IDS), T)


@pytest.mark.parametrize("bad", [5000, 2**32 + 1, -1])
def test_ids_outside_the_vocabulary_raise_when_they_are_read(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(token_store, "_FIRST_LOOK", 4)
    ids = np.zeros(100, np.int64)
    ids[40] = ids[95] = bad
    np.save(tmp_path / "a.npy", ids)
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), T)
    with pytest.raises(DataError, match=f"token id outside the vocabulary; got {bad}"):
        prepared.train.batch(0, 40, T, 0)
    with pytest.raises(DataError, match=f"token id outside the vocabulary; got {bad}"):
        prepared.validation.windows(T)[:]


def test_truncated_npy_raises(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match=r"damaged or not a .npy file"):
        prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), T)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def touch(path):
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\0")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"were changed while they were in use; got \d+ bytes; expected the file of \d+ bytes"),
        (touch, "were changed while they were in use; got another modification time"),
        (os.unlink, "cannot be read; got no such file or directory"),
    ],
)
def test_shard_that_changes_while_it_is_in_use_raises(tmp_path, name, change, message):
    """A mapped file that is truncated would end the process with SIGBUS."""
    path = tmp_path / name
    np.save(path, np.zeros(500_000, np.uint16)) if name == "a.npy" else write_bin(path, np.zeros(500_000))
    prepared = prepare_data(config(shards(path), tokenizer=IDS), T)
    prepared.train.batch(0, 100, T, 0)
    change(path)
    for read in (lambda: prepared.train.batch(1, 100, T, 0), lambda: prepared.validation.windows(T, 10)[:]):
        with pytest.raises(DataError, match=rf"token ids {message}.*{name}.*Restore the file"):
            read()


def test_shard_that_is_truncated_during_a_read_raises(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(1000))
    prepared = prepare_data(config(shards(tmp_path / "a.npy"), tokenizer=IDS), T)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, size, at) if at < 4000 else b"")
    with pytest.raises(DataError, match=r"got its end at byte \d+; expected the file of 8128 bytes"):
        prepared.train.batch(0, 200, T, 0)


def test_number_of_shards_is_not_limited_by_open_files(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for k in range(200):
        np.save(folder / f"{k:03}.npy", np.arange(10 * k, 10 * k + 10, dtype=np.uint16))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        prepared = prepare_data(config(shards(folder), tokenizer=IDS), T)
        assert all_tokens(prepared).tolist() == list(range(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_missing_file_error_names_path_and_key(tmp_path):
    with pytest.raises(
        DataError, match=r"no such file; got .*nowhere; expected .*data.sources\[0\].path \(tiny.yaml\)"
    ):
        prepare_data(config(text(tmp_path / "nowhere")), T, where="tiny.yaml")


def test_empty_folder_or_glob_error_names_it(tmp_path):
    with pytest.raises(DataError, match=r"no \*.txt in the folder; got"):
        prepare_data(config(text(tmp_path)), T)
    with pytest.raises(DataError, match=r"no \*.npy or \*.bin in the folder; got"):
        prepare_data(config(shards(tmp_path), tokenizer=IDS), T)
    with pytest.raises(DataError, match="no file matches the glob; got"):
        prepare_data(config(text(tmp_path / "*.txt")), T)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_invalid_utf8_error_has_the_byte_offset(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", chunk)
    for content, offset in ((b"abc\xc3\xa9\xe9 la", 5), (b"caf\xe9", 3), (b"abc\xf0\x9f\x99", 3)):
        path = write(tmp_path / "a.txt", content)
        with pytest.raises(DataError, match=f"not UTF-8; got byte 0x[0-9a-f]+ at byte offset {offset} .*a.txt"):
            prepare_data(config(text(path)), T)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8; got byte 0xff at byte offset 24"):
        prepare_data(config(jsonl(path)), T)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"no field 'text'; got the keys \['body'\].*line 3"),
        ("[1]", "is no JSON object; got list.*line 3"),
        ('{"text": 5}', "field 'text' is not a text; got int.*line 3"),
        ('{"text": "x"', "line is not JSON; got .*line 3"),
        ('{"text": "\\ud83d"}', "half of a surrogate pair.*line 3"),
        ("[" * 100_000, "line is not JSON.*line 3"),
    ],
)
def test_invalid_jsonl_error_has_the_line_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        prepare_data(config(jsonl(path)), T)


def test_text_shorter_than_a_sequence_error_has_both_lengths(tmp_path):
    path = write(tmp_path / "a.txt", "abcdefghijklmnopqrst")
    with pytest.raises(DataError, match=r"training split .*got 18 tokens; expected at least .* = 21; .*a.txt"):
        prepare_data(config(text(path)), 20)
    with pytest.raises(DataError, match=r"validation split .*got 2 tokens; expected at least .* = 6; .*a.txt"):
        prepare_data(config(text(path)), 5)
    prepare_data(config(text(path), validation_fraction=0.3), 5)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson"])
def test_json_lines_are_never_read_as_plain_text(tmp_path, name):
    path = write(tmp_path / name, '{"text": "the cat"}\n')
    assert whole_file(str(path), ByteTokenizer(), 256).num_tokens == len("the cat")
    with pytest.raises(DataError, match=r"data.sources\[0\].path \(config\). Use a source \{kind: jsonl"):
        prepare_data(config(text(path)), 1)


def test_suffix_of_token_shards_may_be_in_capitals(tmp_path):
    write_bin(tmp_path / "a.BIN", range(50))
    assert whole_file(str(tmp_path / "a.BIN"), ByteTokenizer(), 256).num_tokens == 50
    prepared = prepare_data(config(shards(tmp_path), tokenizer=IDS), 2)
    assert prepared.train.num_tokens == 45


def test_whole_file_shorter_than_a_sequence_error_has_no_advice_about_splits(tmp_path):
    for content, length in (("", 1), ("the cat", 100_000)):
        split = whole_file(str(write(tmp_path / "a.txt", content)), ByteTokenizer(), 256)
        with pytest.raises(
            DataError, match=rf"the data is shorter .*got {len(content)} tokens; .* = {length + 1};"
        ) as e:
            split.windows(length)
        assert str(e.value).endswith("Use a file with more text, or a shorter sequence length.")


@pytest.mark.parametrize("kind", ["text", "jsonl", "tokens", "batches"])
@pytest.mark.parametrize("path", ["{}", "{}/*.txt", "memory://{}", "bogus://{}"])
def test_a_long_path_is_shortened_in_errors(kind, path):
    for long in ("long/" * 600, "long" * 750):
        source = {"kind": kind, "path": path.format(long)}
        with pytest.raises(DataError, match=r"got [^;]*longlong|got [^;]*long/long") as e:
            prepare_data(config(source, tokenizer=IDS), T)
        with pytest.raises(DataError) as of_whole_file:
            whole_file(source["path"], ByteTokenizer(), 256)
        assert len(str(e.value)) < 900
        assert len(str(of_whole_file.value)) < 900


def test_empty_text_raises(tmp_path):
    path = write(tmp_path / "a.txt", "")
    with pytest.raises(DataError, match="the sources have no text"):
        prepare_data(config(text(path)), T)
    with pytest.raises(DataError, match="got 0 tokens"):
        prepare_data(config(text(path), tokenizer=BYTE), T)


def test_characters_outside_the_vocabulary_raise(text_file):
    with pytest.raises(TokenizerError, match=r"data.sources\[0\] .* has characters outside"):
        prepare_data(config(text(text_file)), T, tokenizer=CharacterTokenizer("abc"))


def test_token_shards_and_text_need_matching_tokenizers(tmp_path, text_file):
    np.save(tmp_path / "a.npy", np.arange(100))
    with pytest.raises(DataError, match="has token ids, not text"):
        prepare_data(config(shards(tmp_path / "a.npy")), T)
    with pytest.raises(TokenizerError, match="is text, but this tokenizer has ids only"):
        prepare_data(config(text(text_file), tokenizer=IDS), T)


def test_unreadable_url_errors_have_the_cause(monkeypatch):
    import fsspec

    with pytest.raises(DataError, match="bogus:// is not a protocol supported by fsspec"):
        prepare_data(config(text("bogus://bucket/a.txt")), T)
    with pytest.raises(DataError, match=r"no files found; got memory://nowhere/a.txt"):
        prepare_data(config(text("memory://nowhere/a.txt")), T)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match="s3:// needs a package that is not installed"):
        prepare_data(config(text("s3://bucket/a.txt")), T)

    def broken(*_):
        raise TimeoutError("no route to host")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "find", broken)
    with pytest.raises(DataError, match=r"cannot be read; got memory://a \(.*TimeoutError: no route to host"):
        prepare_data(config(text("memory://a")), T)


def test_file_without_read_permission_error_names_it(text_file, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(source_files.SourceFile, "open", denied)
    with pytest.raises(DataError, match=r"cannot be read; got .*text.txt \(PermissionError"):
        prepare_data(config(text(text_file)), T)
