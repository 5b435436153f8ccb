"""Finding and reading the files of a source: links, hidden files, byte order marks, other formats, changed files."""

import bz2
import gzip
import lzma
import os
import re
import subprocess

import numpy as np
import pytest

from moezoo.core.data import source_files, text_files
from moezoo.core.data.source_files import find_files, find_texts
from moezoo.core.data.text_files import documents_of, text_of
from moezoo.core.errors import DataError


def found(path, suffixes=(".txt",)):
    return find_files(str(path), suffixes, "data.sources[0].path (x.yaml)")


def read(path):
    [file] = found(path)
    return "".join(text_of(file, lambda _: None))


def write(path, content="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_links_are_followed_once_and_hidden_files_are_skipped(tmp_path):
    folder = tmp_path / ".cache" / "texts"  # a folder that is named explicitly may be hidden
    write(folder / "a.txt")
    write(tmp_path / "elsewhere" / "b.txt")
    write(tmp_path / "elsewhere" / "deep" / "c.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(folder)  # in circles
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (folder / "broken.txt").symlink_to(folder / "nowhere.txt")
    for hidden in ("._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "linked/.git/d.txt"):
        write(folder / hidden)
    expected = ["a.txt", "again/b.txt", "again/deep/c.txt"]
    assert [os.path.relpath(file.name, folder) for file in found(folder)] == expected
    by_glob = [os.path.relpath(file.name, folder) for file in found(folder / "**" / "*.txt")]
    assert [os.path.basename(name) for name in by_glob] == ["a.txt", "b.txt", "c.txt"]


def test_hidden_files_of_a_url_are_skipped():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/b.txt", "deep/c.txt"):
        memory.pipe(f"/.corpus/{name}", b"text")
    try:
        assert [file.name for file in found("memory://.corpus")] == ["/.corpus/a.txt", "/.corpus/deep/c.txt"]
    finally:
        memory.rm("/.corpus", recursive=True)


@pytest.mark.parametrize("path", ["", " ", "file://"])
def test_empty_path_raises_and_does_not_read_the_working_folder(tmp_path, monkeypatch, path):
    write(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"path is empty; got .*data.sources\[0\].path \(x.yaml\)"):
        found(path)
    assert len(found(".")) == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_byte_order_mark_is_no_character(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", chunk)
    assert read(write(tmp_path / "a.txt", "\ufeffé \ufeff".encode())) == "é \ufeff"
    assert read(write(tmp_path / "a.txt", "\ufeff".encode())) == ""
    [file] = found(write(tmp_path / "a.jsonl", '\ufeff{"text": "é"}\n'), (".jsonl",))
    assert list(documents_of(file, "text", lambda _: None)) == ["é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("the cat é".encode("utf-16"), r"file is UTF-16 text; .*iconv -f UTF-16 -t UTF-8 /.*/a.txt > /.*/a.txt.txt"),
        ("the cat é".encode("utf-16-le"), "file is UTF-16LE text; .*iconv -f UTF-16LE "),
        ("the cat é".encode("utf-16-be"), "file is UTF-16BE text; .*iconv -f UTF-16BE "),
        ("the cat".encode("utf-32"), "file is UTF-32 text; .*iconv -f UTF-32 "),
        (gzip.compress(b"the cat"), r"file is compressed with gzip; .*gunzip -c (/.*/a.txt) > \1.txt\.$"),
        (bz2.compress(b"the cat"), "file is compressed with bzip2; .*bunzip2 -c /.*/a.txt > /"),
        (lzma.compress(b"the cat"), "file is compressed with xz; .*xz -dc /.*/a.txt > /"),
        (b"\x28\xb5\x2f\xfd\0\0", "file is compressed with zstd; .*zstd -dc /.*/a.txt > /"),
        (b"PAR1\x15\0", "file is a Parquet table; .*JSON lines"),
        (b"\x93NUMPY\1\0", "file is a NumPy array; .*kind: tokens"),
        (np.int32([20240520, 1, 9]).tobytes(), "file has token ids in .*kind: tokens, path: /.*must end in .bin"),
        (b"\0" * 9000, "file has NUL bytes, so it is no text; got /"),
        (np.arange(900, dtype=">i4").tobytes(), "file has NUL bytes, so it is no text; got /"),
    ],
    ids=(
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "gzip",
        "bzip2",
        "xz",
        "zstd",
        "parquet",
        "numpy",
        "bin",
        "nul",
        "int32",
    ),
)
def test_other_format_is_named(tmp_path, content, message):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=message):
        read(path)
    with pytest.raises(DataError, match=message.replace(r"\1.txt", r"\1.jsonl").replace("/a.txt.txt", "/a.txt.jsonl")):
        list(documents_of(found(path)[0], "text", lambda _: None))


@pytest.mark.parametrize("text", ["BZhang walked in.", "PAR1S", "PK", "a\0b"])
def test_text_that_only_begins_like_another_format_is_read(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == text


def test_folder_without_texts_says_what_it_has(tmp_path):
    for name in ("a.txt.gz", "b.txt.gz", "c.md", ".hidden.pdf"):
        write(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(f"no *.txt in the folder; got {tmp_path} (it has *.md, *.txt.gz);")):
        found(tmp_path)


def test_file_that_changes_while_it_is_read_raises(tmp_path):
    path = write(tmp_path / "a.txt")
    [file] = found(path)
    write(path, "another text")
    with pytest.raises(DataError, match=r"was changed while it was read; got 12 bytes; expected the 4 bytes"):
        list(text_of(file, lambda _: None))


def test_endless_line_and_pipe_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_LINE_BYTES", 3 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "x"}\n')
        file.truncate(200 << 30)  # of zeros, which take no space
    [file] = found(path)
    with pytest.raises(DataError, match=r"line is longer than 3 MiB; expected a JSON object per line; .*, line 2"):
        list(documents_of(file, "text", lambda _: None))
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"not a regular file; got .*b\.txt"):
        found(tmp_path / "b.txt")


@pytest.mark.parametrize(("name", "out"), [("a FILE", "'{}'.txt"), ("a.jsonl.gz", "{}.jsonl")])
def test_text_made_by_the_advice_is_found_again(tmp_path, name, out):
    path = write(tmp_path / name, gzip.compress(b"the cat"))
    with pytest.raises(DataError) as failure:
        list(text_of(found(path)[0], lambda _: None))
    command = str(failure.value).partition("Decompress it: ")[2].removesuffix(".")
    assert command.endswith(f" > {out.format(path)}")
    subprocess.run(command, shell=True, check=True)
    written = found(tmp_path, (".txt", ".jsonl"))
    assert ["".join(text_of(file, lambda _: None)) for file in written] == ["the cat"]


def test_suffixes_are_compared_in_any_case(tmp_path):
    for name in ("A.TXT", "b.txt", "c.JSONL", "d.ndjson", "e.Npy"):
        write(tmp_path / name)
    names = {suffixes: [os.path.basename(file.name) for file in found(tmp_path, suffixes)] for suffixes in SUFFIXES}
    assert list(names.values()) == [["A.TXT", "b.txt"], ["c.JSONL", "d.ndjson"], ["e.Npy"]]


SUFFIXES = ((".txt",), source_files.JSON_LINES, (".npy", ".bin"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson"])
def test_json_lines_are_refused_as_plain_text(tmp_path, name):
    write(tmp_path / name, '{"text": "x"}\n')
    for path in (tmp_path / name, tmp_path / "*"):
        with pytest.raises(DataError, match=r"is JSON lines.*got /.*/a\.\w+; .*\. Use a source \{kind: jsonl, path: "):
            find_texts(str(path), "data.sources[0].path (x.yaml)")
