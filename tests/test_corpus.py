"""Corpora: what is read from each format, and how each kind of bad input is refused."""

import csv
import gzip
import json
import lzma
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from workbench import bundled, corpus
from workbench.corpus import BUNDLED, from_rows, read
from workbench.errors import InputError

ROWS = [
    {"text": "Guten Tag,\n„Welt“", "lang": "de", "rating": 5, "tags": ["a", {"b": None}], "ok": True},
    {"text": " two  spaces ", "lang": "en", "rating": 4.5, "tags": [], "ok": False},
    {"text": "三", "lang": "ja", "rating": None, "tags": ["x"], "ok": True},
]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_compressed(path, content):
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(content))
        case ".xz":
            path.write_bytes(lzma.compress(content))
        case ".zst":
            path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
        case _:
            path.write_bytes(content)


def refusal(source, **options):
    with pytest.raises(InputError) as caught:
        list(read(source, **options))
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_json_lines_keep_the_text_and_metadata_of_any_kind(tmp_path, kind, suffix):
    path = tmp_path / f"some.corpus{kind}{suffix}"
    write_compressed(path, b"\xef\xbb\xbf" + lines(ROWS) + b"\n")
    rows = list(read(path))
    assert [row.text for row in rows] == [row["text"] for row in ROWS]
    assert [row.lang for row in rows] == ["de", "en", "ja"]
    assert rows[0].metadata == {"rating": 5, "tags": ["a", {"b": None}], "ok": True}
    assert rows[2].where == f"{path}:3"
    assert {row.source for row in rows} == {"some.corpus"}
    assert rows[0].messages is rows[0].domain is rows[0].segment_id is None


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_csv_with_quotes_line_breaks_and_long_fields(tmp_path, suffix):
    long = "word " * 40_000  # 200 kB
    path = tmp_path / f"t.csv{suffix}"
    write_compressed(path, f'text,lang,n\n"one, ""two""\nthree",de,1\n{long},en,2\n\nfour,,3\n'.encode())
    rows = list(read(path))
    assert [row.text for row in rows] == ['one, "two"\nthree', long, "four"]
    assert [row.lang for row in rows] == ["de", "en", None]
    assert [row.metadata for row in rows] == [{"n": "1"}, {"n": "2"}, {"n": "3"}]
    assert rows[0].where == f"{path}:2"
    assert rows[1].where == f"{path}:4"


def test_tsv(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("lang\ttext\nde\ta, b\n")
    assert [(row.lang, row.text) for row in read(path)] == [("de", "a, b")]


def test_parquet_streams_and_counts_its_rows(tmp_path):
    import datetime

    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "content": [f"text {n}" for n in range(3000)],
            "day": [datetime.date(2024, 1, 2)] * 3000,
            "x": [float("nan")] * 3000,
            "list": [[1, 2]] * 3000,
        }
    )
    pq.write_table(table, path, row_group_size=700)
    found = read(path, columns={"text": "content"})
    assert found.n_rows == 3000
    rows = list(found)
    assert [row.text for row in rows] == [f"text {n}" for n in range(3000)]
    assert rows[0].metadata == {"day": "2024-01-02", "x": None, "list": [1, 2]}
    assert rows[2999].where == f"{path}:3000"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_files_have_a_text_on_each_line(tmp_path, suffix):
    path = tmp_path / f"t.txt{suffix}"
    write_compressed(path, b"eins\r\n\n zwei \n   \ndrei")
    assert [(row.text, row.where) for row in read(path)] == [
        ("eins", f"{path}:1"),
        (" zwei ", f"{path}:3"),
        ("drei", f"{path}:5"),
    ]


def test_folders(tmp_path):
    (tmp_path / "b.txt").write_text("whole\nfile\n")
    (tmp_path / "a.txt").write_text("another")
    (tmp_path / "readme").write_text("no data")
    assert [row.text for row in read(tmp_path)] == ["another", "whole\nfile\n"]
    (tmp_path / "c.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "d.jsonl").write_bytes(lines(ROWS[1:]))
    assert [row.text for row in read(tmp_path)] == [row["text"] for row in ROWS], "data files before loose texts"


def test_columns_are_mapped_and_the_rest_is_metadata(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines([{"body": "x", "text": "not this", "code": 7, "topic": "law", "id": 12, "from": "web"}]))
    (row,) = read(
        path, columns={"text": "body", "lang": "code", "domain": "topic", "segment_id": "id", "source": "from"}
    )
    assert (row.text, row.lang, row.domain, row.segment_id, row.source) == ("x", "7", "law", "12", "web")
    assert row.metadata == {"text": "not this"}


def test_chats(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines([{"messages": chat, "lang": "en", "n": 1}, {"text": None, "messages": chat}, {"text": "a"}]))
    rows = list(read(path))
    assert [row.messages for row in rows] == [chat, chat, None]
    assert [row.text for row in rows] == [None, None, "a"]
    assert rows[0].metadata == {"n": 1}
    (tmp_path / "c.csv").write_text("conversation\n" + json.dumps(json.dumps(chat)).replace('\\"', '""') + "\n")
    (row,) = read(tmp_path / "c.csv", columns={"messages": "conversation"})
    assert row.messages == chat


def test_rows_in_memory():
    rows = list(from_rows(["one", {"text": "zwei", "lang": "de", "n": 2}]))
    assert [(row.text, row.lang, row.metadata) for row in rows] == [("one", None, {}), ("zwei", "de", {"n": 2})]
    assert from_rows(["one"]).n_rows == 1
    again = list(from_rows(rows))
    assert again[1].lang == "de" and again[1].metadata == {"n": 2} and again[1].source == rows[1].source


def test_a_corpus_can_be_read_again(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines(ROWS))
    found = read(path)
    assert list(found) == list(found)
    assert next(iter(found)) == next(iter(found))


def test_reading_is_streaming(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines(ROWS) + b"broken")
    rows = iter(read(path))
    assert [next(rows).lang for _ in range(3)] == ["de", "en", "ja"]
    with pytest.raises(InputError, match="t.jsonl:4: not JSON"):
        next(rows)


def test_memory_stays_flat(tmp_path):
    """50 MB of rows are read with a few MB of Python memory."""
    path = tmp_path / "t.jsonl.gz"
    row = lines([{"text": "x" * 1000}])
    with gzip.GzipFile(path, "wb", compresslevel=1) as file:
        for _ in range(500):
            file.write(row * 100)
    code = (
        "import tracemalloc; from workbench.corpus import read; tracemalloc.start(); "
        f"print(sum(1 for _ in read({str(path)!r})), tracemalloc.get_traced_memory()[1])"
    )
    rows, peak = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert rows == 50_000
    assert peak < 5_000_000


def test_importing_the_corpora_imports_no_torch():
    code = (
        "import sys, workbench.corpus, workbench.tokenization; print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code]).split() == [b"False", b"False"]


# Bad rows: where, what, what was expected, what to do.

BAD_LINES = {
    b'{"lang": "de", "txt": "x"}': ["no column 'text'", "'lang', 'txt'", "--column text=txt"],
    b'{"text": null}': ["'text' is missing (null)", "expected text", "--bad-rows skip"],
    b'{"text": ""}': ["'text' is empty"],
    b'{"text": " \\n "}': ["only white space"],
    b'{"text": 5}': ["'text' is 5, of type int", "expected text"],
    b'{"text": ["a"]}': ["of type list"],
    b'{"text": "a\xff"}': ["byte 12 of it (0xff) is not UTF-8", "iconv"],
    b'{"text": "a", "note": "\xe4"}': ["(0xe4) is not UTF-8"],
    b'{"text": "a\\ud800"}': ["half a surrogate pair", "'\\ud800'"],
    b'{"text": "a", "more": ["\\uDC00"]}': ["half a surrogate pair"],
    b'{"text": "cut of': ["not JSON: Unterminated string", "expected one JSON object"],
    b'"text"': ["the row is 'text'", "expected a JSON object"],
    b"[" * 100_000: ["not JSON"],
    b'{"text": "a", "lang": ["de"]}': ["'lang' is ['de']", "expected a word or a number"],
    b'{"messages": "Hi"}': ["'messages' is text but not JSON", "expected messages"],
    b'{"messages": []}': ["'messages' is []", 'expected a list of {"role": "user"'],
    b'{"messages": [{"from": "human", "value": "Hi"}]}': ["message 1 is {'from'", '"role": "user"'],
    b'{"messages": [{"role": "user", "content": 3}]}': ["the content of message 1 is 3"],
    b'{"messages": [{"role": "user", "content": " "}]}': ["no message has any text"],
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40].decode(errors="replace"))
def test_bad_rows_are_refused_or_skipped(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines(ROWS[:2]) + line + b"\n" + lines(ROWS[2:]))
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert len(message) < 500
    for part in BAD_LINES[line]:
        assert part in message
    found = read(path, bad_rows="skip")
    for _ in range(2):  # a second pass counts anew
        assert [row.lang for row in found] == ["de", "en", "ja"]
        assert found.skipped.count == 1
        assert found.skipped.messages == [message]


def test_only_the_first_messages_of_skipped_rows_are_kept(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": ""}\n' * 1000 + lines(ROWS))
    found = read(path, bad_rows="skip")
    assert len(list(found)) == 3
    assert found.skipped.count == 1000
    assert len(found.skipped.messages) == corpus.MESSAGES_KEPT


def test_a_corpus_of_bad_rows_only_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": ""}\n' * 3)
    assert "all 3 rows are bad" in refusal(path, bad_rows="skip")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.txt", "t.txt.gz", "t.json.xz"])
def test_empty_files_are_refused(tmp_path, name):
    write_compressed(tmp_path / name, b"")
    assert "the corpus is empty; expected at least one row" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_files_are_refused_after_their_good_rows(tmp_path, suffix):
    path = tmp_path / f"t.jsonl{suffix}"
    content = b"".join(lines([{"text": f"{n} {n * 7919 % 1009}"}]) for n in range(20_000))
    write_compressed(path, content)
    path.write_bytes(path.read_bytes()[:-2000])
    rows = []
    with pytest.raises(InputError, match="truncated or damaged") as caught:
        for row in read(path, bad_rows="skip"):
            rows.append(row.text)
    assert 0 < len(rows) < 20_000 or suffix == ".xz"
    assert f"{path}:{len(rows) + 1}: " in str(caught.value)
    path.write_bytes(b"no such format")
    assert "truncated or damaged" in refusal(path)


def test_files_of_several_compressed_parts(tmp_path):
    """As pigz, pzstd and `cat a.gz b.gz` make them."""
    for suffix in (".gz", ".xz", ".zst"):
        one, two = tmp_path / f"1.jsonl{suffix}", tmp_path / f"2.jsonl{suffix}"
        write_compressed(one, lines(ROWS[:2]))
        write_compressed(two, lines(ROWS[2:]))
        both = tmp_path / f"both.jsonl{suffix}"
        both.write_bytes(one.read_bytes() + two.read_bytes())
        assert [row.lang for row in read(both)] == ["de", "en", "ja"]


def test_bad_csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"text,lang\na,b,c\nfine,de\n")
    assert refusal(path).startswith(f"{path}:2: the row has 3 values; expected 2")
    found = read(path, bad_rows="skip")
    assert [row.text for row in found] == ["fine"]
    path.write_bytes(b'text,lang\n"one\ntwo",en\ngr\xfc\xdf,de\nfine,de\n')
    assert refusal(path).startswith(f"{path}:4: 'text': byte 3 of it (0xfc) is not UTF-8")
    assert [row.text for row in read(path, bad_rows="skip")] == ["one\ntwo", "fine"]
    path.write_text('text,lang\nfine,de\n"never closed,en\n')
    assert refusal(path).startswith(f"{path}:3: not a table that can be read")
    path.write_text("text,lang,text\na,b,c\n")
    assert "the column 'text' occurs twice" in refusal(path)
    path.write_bytes(b"text,gr\xf6\xdfe\na,b\n")
    assert refusal(path).startswith(f"{path}:1: 'gr\\udcf6\\udcdfe': byte 3 of it (0xf6) is not UTF-8")
    path.write_text("body,lang\na,b\n")
    assert "found 'body', 'lang'" in refusal(path)
    assert csv.field_size_limit() > 200_000


def test_bad_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    assert refusal(path).startswith(f"{path}:2: 'text' is missing (null)")
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a whole Parquet file" in refusal(path)
    latin1 = pa.array([b"gut", b"gr\xfcn"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin1}), path)
    assert refusal(path).startswith(f"{path}:2: byte 3 of it (0xfc) is not UTF-8")
    pq.write_table(pa.table({"text": [b"bytes"]}), path)
    assert "of type bytes; expected text" in refusal(path)


def test_bad_text_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("fine\ngrün\n".encode("latin-1"))
    assert refusal(path).startswith(f"{path}:2: byte 3 of it (0xfc) is not UTF-8")
    assert [row.text for row in read(path, bad_rows="skip")] == ["fine"]
    assert refusal(tmp_path).startswith(f"{path}: byte 8 of it (0xfc)")


def test_a_json_array_is_refused_with_the_conversion(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(ROWS))
    assert "one JSON array" in refusal(path)
    assert "jq -c" in refusal(path)


def test_names_that_are_nothing(tmp_path, monkeypatch):
    assert "Did you mean udhr?" in refusal("udrh")
    assert "libreoffice-help" in refusal("libreoffice")
    assert "neither a bundled corpus nor a file" in refusal("x")
    assert "no such file" in refusal(str(tmp_path / "none.jsonl"))
    assert "no such file" in refusal("none.csv")
    assert "no such file" in refusal(tmp_path / "none")
    (tmp_path / "t.pdf").write_bytes(b"")
    assert "unknown kind of file '.pdf'; expected .jsonl" in refusal(tmp_path / "t.pdf")
    (tmp_path / "t.parquet.gz").write_bytes(b"")
    assert "unknown kind of file" in refusal(tmp_path / "t.parquet.gz")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal("empty/none"), "rather a misspelt path than a Hugging Face data set"
    assert "has no file to read" in refusal(tmp_path / "empty")


def test_bad_options(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines(ROWS))
    assert "'txt' is not a field" in refusal(path, columns={"txt": "text"})
    assert "no column 'content' for the field 'text'; found 'text'" in refusal(path, columns={"text": "content"})
    assert "no column 'topic' for the field 'domain'" in refusal(path, columns={"domain": "topic"})
    assert "expected 'refuse' or 'skip'" in refusal(path, bad_rows="ignore")


# Hugging Face data sets, from local folders: nothing is downloaded.


def test_hugging_face_data_sets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS[:1]))
    found = read(f"hf:{tmp_path}")
    assert [row.text for row in found] == [row["text"] for row in ROWS]
    assert [row.text for row in found] == [row["text"] for row in ROWS]
    assert [row.lang for row in read(f"hf:{tmp_path}", split="test")] == ["de"]
    assert {row.source for row in found} == {tmp_path.name}
    message = refusal(f"hf:{tmp_path}", split="validation")
    assert "split 'validation'" in message
    assert "Check the id" in message


def test_hugging_face_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'moe-workbench[datasets]'" in refusal("owner/name")


def test_hugging_face_data_set_that_does_not_exist(tmp_path):
    pytest.importorskip("datasets")
    assert "can't be opened" in refusal(f"hf:{tmp_path}/none")


# The bundled corpora.


def groups(rows):
    """Languages of each aligned segment."""
    found = {}
    for row in rows:
        found.setdefault((row.source, row.segment_id), []).append(row.lang)
    return found


@pytest.mark.parametrize(
    ("name", "segments", "languages"),
    [("udhr", 31, 33), ("libreoffice-help", 400, 14), ("home-assistant", 400, 13), ("typescript-messages", 209, 13)],
)
def test_bundled_corpora_are_aligned(name, segments, languages):
    found = groups(read(name))
    assert len(found) == segments
    assert all(len(set(langs)) == len(langs) == languages for langs in found.values())


def test_bundled_domains():
    rows = list(read("domains"))
    assert len(rows) == 1985
    assert len({row.domain for row in rows}) == 14
    assert all(row.metadata["license"] for row in rows)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_corpora_have_their_licences(name):
    folder = bundled.path(f"corpora/{name}")
    (data,) = folder.glob("*.jsonl")
    assert data.name in (folder / "NOTICE").read_text()
    licences = [folder / "LICENSE.txt"] if name != "domains" else list((folder / "licenses").iterdir())
    assert all(path.stat().st_size > 900 for path in licences)
    if name == "domains":
        notice = (folder / "NOTICE").read_text()
        assert all(path.name in notice for path in licences)
        assert all(f"\n{row.source} " in notice for row in read(name))


def test_all_is_every_bundled_corpus():
    rows = list(read("all"))
    assert Counter(row.source for row in rows) == Counter(row.source for name in BUNDLED for row in read(name))


def test_the_demo_sample_keeps_languages_domains_and_whole_segments():
    everything, sample = list(read("all")), list(read("demo"))
    assert {row.lang for row in sample} == {row.lang for row in everything}
    assert {row.domain for row in sample} == {row.domain for row in everything}
    assert {row.source for row in sample} == {row.source for row in everything}
    whole = groups(everything)
    assert all(sorted(langs) == sorted(whole[segment]) for segment, langs in groups(sample).items())
    assert len({row.where for row in sample}) == len(sample)
    assert list(read("demo")) == sample


def test_the_demo_sample_begins_as_it_goes_on():
    """A run that stops early has seen every source."""
    sample = list(read("demo"))
    for label in ("lang", "domain"):
        early = Counter(getattr(row, label) for row in sample[: len(sample) // 4])
        whole = Counter(getattr(row, label) for row in sample)
        assert all(0.1 < early[value] / whole[value] < 0.5 for value in whole)
