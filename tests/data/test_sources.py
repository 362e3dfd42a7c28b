"""Reading sources: every format, every hash, and one clear line for each broken file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fourscore.data.sources import read_source
from fourscore.files import FourscoreError

ROWS = [{"text": "Where is my parcel?", "label": "delivery"}, {"text": 'He said "no";\nthen left', "label": "other"}]
CSV = 'text,label\nWhere is my parcel?,delivery\n"He said ""no"";\nthen left",other\n'


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_every_format_gives_the_same_rows(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    sources = [
        written(tmp_path, "a.jsonl", "".join(json.dumps(r) + "\n" for r in ROWS)),
        written(tmp_path, "a.csv", CSV),
        written(tmp_path, "mark.csv", "\ufeff" + CSV),
        written(
            tmp_path, "crlf.csv", CSV.replace("label\n", "label\r\n").replace("delivery\n", "delivery\r\n").replace("other\n", "other\r\n")
        ),
        str(tmp_path / "a.parquet"),
    ]
    for source in sources:
        table = read_source(source)
        assert [row.columns for row in table.rows] == ROWS, source
        assert [row.number for row in table.rows] == [1, 2]
        assert table.columns == ["text", "label"]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_semicolons_and_tabs_separate_where_the_header_has_no_comma(tmp_path: Path, mark: str):
    source = written(tmp_path, "a.csv", f"text{mark}label\nyes, it is{mark}good\n")
    assert read_source(source).rows[0].columns == {"text": "yes, it is", "label": "good"}


def test_jsonl_numbers_are_lines_and_other_unicode_breaks_are_text(tmp_path: Path):
    source = written(tmp_path, "a.jsonl", '{"a": "one\u2028two"}\n\n{"a": "three"}\r\n')
    table = read_source(source)
    assert [(row.number, row.columns["a"]) for row in table.rows] == [(1, "one\u2028two"), (3, "three")]


def test_a_long_csv_field_is_read(tmp_path: Path):
    source = written(tmp_path, "a.csv", "text,label\n" + "x" * 200_000 + ",y\n")
    assert len(read_source(source).rows[0].columns["text"]) == 200_000


def test_the_right_hash_passes_and_a_wrong_one_shows_both(tmp_path: Path):
    source = written(tmp_path, "a.csv", CSV)
    right = hashlib.sha256(CSV.encode()).hexdigest()
    assert read_source(source, right).sha256 == right == read_source(source).sha256
    with pytest.raises(FourscoreError) as caught:
        read_source(source, "0" * 64)
    assert right in str(caught.value)
    assert "0" * 64 in str(caught.value)


BAD = {
    "a.txt": ("x", "`.txt` is not a data file"),
    "empty.jsonl": ("", "the file is empty"),
    "blank.csv": ("\n\n", "the file is empty"),
    "header.csv": ("text,label\n", "the file has no rows"),
    "broken.jsonl": ('{"a": 1}\n{"a": 2\n', r"broken.jsonl:2: not JSON"),
    "list.jsonl": ("[1, 2]\n", r"list.jsonl:1: not a JSON object"),
    "twice.jsonl": ('{"a": 1, "a": 2}\n', r"twice.jsonl:1: column `a` stands twice"),
    "nan.jsonl": ('{"a": NaN}\n', r"nan.jsonl:1: NaN is not a JSON value"),
    "deep.jsonl": ("[" * 200_000 + "\n", r"deep.jsonl:1: (JSON nested too deeply|not JSON)"),
    "latin.jsonl": ('{"a": "x"}\n{"a": "caf\u00e9"}\n'.encode("latin-1"), r"latin.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    "short.csv": ("text,label\nonly one\n", r"short.csv:2: 1 fields where the header has 2"),
    "header2.csv": ("a,a\n1,2\n", r"column `a` stands twice in the header"),
    "quote.csv": ('text,label\n"never closed,x\n', r"quote.csv:2: not CSV"),
    "nul.csv": (b"a,b\n\0,1\n", "NUL bytes"),
    "not.parquet": ("PAR1 nothing PAR1", "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_gives_one_clear_line(tmp_path: Path, name: str):
    content, complaint = BAD[name]
    with pytest.raises(FourscoreError, match=complaint) as caught:
        read_source(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert caught.value.todo


def test_a_misspelt_path_gets_a_near_one(tmp_path: Path):
    written(tmp_path, "tickets.csv", CSV)
    with pytest.raises(FourscoreError, match=r"no such file\. Did you mean `tickets.csv`\?"):
        read_source(str(tmp_path / "ticket.csv"))


def test_a_file_inside_a_wheel_is_read_without_installing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fourscore.model.wheel import wheel_path

    monkeypatch.setenv("FOURSCORE_HOME", str(tmp_path))
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("desk/data/rows.csv", CSV)
        archive.writestr("desk/__init__.py", "raise SystemExit('imported')")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    place = wheel_path("desk", "1.0", sha256)  # a wheel put there by hand is used when its hash is right
    place.parent.mkdir(parents=True)
    wheel.rename(place)
    table = read_source("wheel:desk==1.0/desk/data/rows.csv", sha256)
    assert [row.columns for row in table.rows] == ROWS
    assert table.sha256 == sha256
    with pytest.raises(FourscoreError, match=r"no file `desk/data/other.csv`"):
        read_source("wheel:desk==1.0/desk/data/other.csv", sha256)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("wheel:desk/rows.csv", "not a wheel source"), ("hub:rows.csv", "not a hub source"), ("wheel:a==1/rows.csv", "needs `sha256`")],
)
def test_a_source_that_is_not_spelt_out_is_refused(source: str, complaint: str):
    with pytest.raises(FourscoreError, match=complaint):
        read_source(source)


def test_a_hub_file_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setenv("FOURSCORE_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the variable of that name sets at import
    with pytest.raises(FourscoreError, match=r"the hub c.*(download the file by other means|Download the file)"):
        read_source("hub:owner/dataset/data/train.jsonl")
