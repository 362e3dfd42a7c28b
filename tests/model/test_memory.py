"""What loading holds in memory and reads from the file, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SHAPE = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 4, "pad_token_id": 2}
LINEAR = 4 * (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 4096 * 1024)  # weights in linear layers
EMBEDDING, LARGEST = 8192 * 1024, 4096 * 1024
SLACK = 8 << 20  # holes in the heap until they are next given back, Python's objects

# Loads a tiny model first, twice: imports, caches and threads belong to the process, not to the model.
CHILD = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from fourscore.model import load

torch.set_num_threads(2)
tiny, big = sys.argv[1:]
for _ in range(2):
    load(tiny)

def kilobytes(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])

def watch():
    global most
    while not done:
        most = max(most, kilobytes("RssAnon"))
        time.sleep(0.0005)

before = most = kilobytes("RssAnon")
done = False
thread = threading.Thread(target=watch)
thread.start()
model = load(big)
done = True
thread.join()
after = kilobytes("RssAnon")

mappings, inside, resident = [], False, 0
for line in Path("/proc/self/smaps").read_text().splitlines():
    if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = line.endswith(str(Path(big).resolve() / "model.safetensors"))
        if inside:
            mappings.append((int(found[1], 16), int(found[2], 16)))
    elif inside and line.startswith("Rss:"):
        resident += int(line.split()[1])

def mapped(tensor):
    return any(first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= last for first, last in mappings)

states = [model.network.get_submodule(name).quantised for name in model.quantised]
print(json.dumps({
    "peak": (most - before) * 1024, "held": (after - before) * 1024, "resident": resident * 1024,
    "packed_mapped": [mapped(q.packed) for q in states], "scales_mapped": [mapped(q.absmax) for q in states],
    "embedding_mapped": mapped(model.network.get_input_embeddings().weight),
}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as a bf16 file, as an f32 file, and quantised; and a tiny one, dense and quantised. Their tokenizer has one word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    from fourscore.model import load

    root = tmp_path_factory.mktemp("memory")
    places = {name: root / name for name in ("bf16", "f32", "nf4", "tiny", "tiny-nf4")}
    for place in places.values():
        place.mkdir()
        Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(place / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
        tiny = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 64, "intermediate_size": 64}))
    network.save_pretrained(places["f32"])
    network.to(torch.bfloat16).save_pretrained(places["bf16"])
    tiny.save_pretrained(places["tiny"])
    for name, quantised in (("bf16", "nf4"), ("tiny", "tiny-nf4")):
        load(places[name]).network.save_pretrained(places[quantised])
    return places


def measured(tiny: Path, big: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tiny), str(big)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_no_dense_copy_is_held_while_quantising(dtype: str, folders: dict[str, Path]) -> None:
    """Anonymous memory stays below the 4-bit size, the 16-bit embedding and the largest layer as the file has it."""
    found = measured(folders["tiny"], folders[dtype])
    four_bit = LINEAR // 2 + LINEAR // 64 + LINEAR // 64 // 64 + 28 * 1100
    bound = four_bit + 2 * EMBEDDING + {"bf16": 2, "f32": 4}[dtype] * LARGEST + SLACK
    assert LINEAR // 2 - (4 << 20) < found["held"] <= found["peak"] < bound
    assert bound < 0.65 * 2 * LINEAR  # the bound could see a dense copy
    assert found["embedding_mapped"] == (dtype == "bf16")
    assert not any(found["packed_mapped"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_quantised_folder_is_mapped_and_not_read(folders: dict[str, Path]) -> None:
    """Codes and scales stay in the file. Read are each layer's record and tables, and the 64 KB that the system reads around them."""
    found = measured(folders["tiny-nf4"], folders["nf4"])
    assert all(found["packed_mapped"])
    assert all(found["scales_mapped"])
    assert found["embedding_mapped"]
    assert found["peak"] < SLACK < LINEAR // 2 // 2
    assert 0 < found["resident"] < 28 * 4 * 65536 < LINEAR // 2 // 4
