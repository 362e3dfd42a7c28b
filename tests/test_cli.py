"""The command line as a person meets it: help, exit codes, one clear line for a mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fourscore.files import hash_file

VERBS = ["init", "pull", "check", "plan", "train", "eval", "compare", "gate", "report", "run", "verify", "serve", "key"]


def fourscore(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fourscore.cli", *words], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_help_lists_every_verb():
    out = fourscore("--help").stdout
    for verb in VERBS:
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str):
    done = fourscore(verb, "--help")
    assert done.returncode == 0
    assert f"Example: fourscore {verb}" in done.stdout
    assert "--json" in done.stdout
    assert "--debug" in done.stdout


def test_help_and_package_import_without_torch():
    code = (
        "import sys, fourscore, fourscore.cli; from typer.testing import CliRunner; "
        "CliRunner().invoke(fourscore.cli.app, ['--help']); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_usage_exits_with_2():
    assert fourscore("run").returncode == 2
    assert fourscore("dance").returncode == 2


def test_a_missing_study_is_one_line_and_exit_1():
    done = fourscore("run", "nothing.yaml")
    assert done.returncode == 1
    assert done.stderr == "fourscore: nothing.yaml: no such study file. Make one with `fourscore init DATA`.\n"
    assert done.stdout == ""


def test_an_error_with_json_is_json_too():
    done = fourscore("run", "nothing.yaml", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["what"] == "no such study file"


def test_debug_shows_the_traceback():
    assert "Traceback" in fourscore("run", "nothing.yaml", "--debug").stderr
    assert "Traceback" not in fourscore("run", "nothing.yaml").stderr


def test_verify_of_something_else_is_refused(tmp_path: Path):
    done = fourscore("verify", str(tmp_path))
    assert done.returncode == 1
    assert "not a run folder" in done.stderr


def test_init_writes_a_study_that_check_accepts(tmp_path: Path):
    rows = [{"question": f"Is {n} even?", "answer": "yes" if n % 2 == 0 else "no"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "numbers.yaml"
    assert fourscore("init", str(tmp_path / "rows.jsonl"), "--out", str(out)).returncode == 0
    text = out.read_text()
    assert text.count("#") > 20
    again = fourscore("init", str(tmp_path / "rows.jsonl"), "--out", str(out))
    assert again.returncode == 1
    assert "is there already" in again.stderr
    assert out.read_text() == text


BAD = """\
study: bad
model: {{name: {model}}}
data:
  source: {source}
  prompt: {{user: "{{{{ q }}}}", answer: "{{{{ a }}}}"}}
  choices: [yes it is, "no"]
  max_tokens: 64
{more}"""


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ("", "", "empty"),
        ('{"q": "Is it?", "a": "perhaps"}\n', "", "perhaps"),
        ('{"q": "Is it?"}\n', "", "'a' is undefined"),
        ('{"q": "' + "why " * 300 + '", "a": "no"}\n', "", "max_tokens"),
        ('{"q": "Is it?", "a": "no"}\n{"q": \n', "", ":2"),
    ],
)
def test_bad_rows_give_one_clear_line(tmp_path: Path, tiny_llama: Path, rows: str, more: str, says: str):
    good = "".join(json.dumps({"q": f"Is {n} it?", "a": "no" if n % 2 else "yes it is"}) + "\n" for n in range(30)) if rows else ""
    (tmp_path / "rows.jsonl").write_text(rows + good)
    (tmp_path / "bad.yaml").write_text(BAD.format(model=tiny_llama, source="rows.jsonl", more=more))
    assert says in refused(tmp_path, "check")
    assert not list((tmp_path / "runs" / "bad" / "steps").glob("data-*"))


def refused(folder: Path, verb: str, **environment: str) -> str:
    """Run a verb on the study bad.yaml, which must end with exit code 1 and one clear line."""
    done = fourscore(verb, str(folder / "bad.yaml"), "--runs", str(folder / "runs"), **environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fourscore: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def write_bad(folder: Path, model: Path | str, more: str = "", source: str = "rows.jsonl") -> None:
    rows = [{"q": f"Is {n} it?", "a": "no" if n % 2 else "yes it is"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.yaml").write_text(BAD.format(model=model, source=source, more=more))


def test_a_target_pattern_that_matches_nothing_names_the_layers_there_are(tmp_path: Path, tiny_llama: Path):
    write_bad(tmp_path, tiny_llama, "train: {targets: [querry_proj]}\n")
    line = refused(tmp_path, "plan")
    assert "querry_proj" in line
    assert "q_proj" in line


def test_truncated_weights_are_named(tmp_path: Path, tiny_llama: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    write_bad(tmp_path, model)
    assert "model.safetensors" in refused(tmp_path, "check")


def test_a_wrong_hash_shows_both(tmp_path: Path, tiny_llama: Path):
    write_bad(tmp_path, tiny_llama, source="rows.jsonl\n  sha256: " + "0a" * 32)
    line = refused(tmp_path, "check")
    assert "0a" * 32 in line
    assert hash_file(tmp_path / "rows.jsonl") in line


def test_without_a_network_one_line_says_so(tmp_path: Path):
    write_bad(tmp_path, "smollm2-135m-instruct")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    line = refused(
        tmp_path, "check", FOURSCORE_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", PIP_RETRIES="0", PIP_TIMEOUT="2", **nowhere
    )
    assert "network" in line or "reach" in line
    assert not list((tmp_path / "home").rglob("*.whl"))


def test_a_changed_data_file_is_read_again(tmp_path: Path, tiny_llama: Path):
    write_bad(tmp_path, tiny_llama)
    words = ("check", str(tmp_path / "bad.yaml"), "--runs", str(tmp_path / "runs"), "--json")
    assert json.loads(fourscore(*words).stdout)["rows_read"] == 40
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write(json.dumps({"q": "One more?", "a": "no"}) + "\n")
    assert json.loads(fourscore(*words).stdout)["rows_read"] == 41
