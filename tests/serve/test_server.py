"""The running server, spoken to by OpenAI's own client and by clients that misbehave."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_server import Running, running

from fourscore.serve.keys import new_key, remove_key

QUESTION: Any = [{"role": "user", "content": "Say something."}]


def client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(server: Running) -> str:
    return client(server).models.list().data[0].id


def metric(server: Running, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_models_name_the_bytes(server: Running, tiny_llama: Path):
    from fourscore.model import base_sha256

    told = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [m["base_sha256"] for m in told] == [base_sha256(tiny_llama)]
    assert client(server).models.retrieve(told[0]["id"]).id == told[0]["id"]


def test_a_chat_is_what_the_engine_writes(server: Running, model: str, tiny_llama: Path):
    import fourscore
    from fourscore.data.template import end_of_turn, render_prompt, text_message

    loaded = fourscore.load(tiny_llama)
    prompt = render_prompt(loaded.tokenizer, [text_message("user", "Say something.")])
    wanted = fourscore.Engine(loaded).generate([prompt], 12, stop_ids=[end_of_turn(loaded.tokenizer)])[0]
    answer = client(server).chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)


def test_a_stream_is_the_same_text_with_its_usage(server: Running, model: str):
    whole = client(server).chat.completions.create(model=model, messages=QUESTION, seed=7, max_tokens=12)
    chunks = list(
        client(server).chat.completions.create(
            model=model, messages=QUESTION, seed=7, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_of_greedy_tokens_are_the_highest(server: Running, model: str):
    answer = client(server).chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content
    assert len(found.content) == 5
    for token in found.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(t.logprob for t in token.top_logprobs) <= 0


def test_completions_and_responses(server: Running, model: str):
    text = client(server).completions.create(model=model, prompt="Once", max_tokens=5, temperature=0, logprobs=2)
    assert text.choices[0].logprobs is not None
    assert len(text.choices[0].logprobs.tokens or []) == 5
    pieces = client(server).completions.create(model=model, prompt="Once", max_tokens=5, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in pieces) == text.choices[0].text
    whole = client(server).responses.create(model=model, input="Say something.", temperature=0, max_output_tokens=9)
    assert whole.status == "incomplete"
    events = list(client(server).responses.create(model=model, input="Say something.", temperature=0, max_output_tokens=9, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"


def test_an_answer_follows_its_schema(server: Running, model: str):
    schema: Any = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    answer = client(server).chat.completions.create(model=model, messages=QUESTION, response_format=form, max_tokens=100)
    assert isinstance(json.loads(answer.choices[0].message.content or "")["yes"], bool)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"typo": 1}, "typo"),
        ({"temperature": "warm"}, "temperature"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_what_cannot_be_followed_is_a_400_that_names_it(server: Running, model: str, more: dict[str, Any], param: str):
    done = httpx.post(f"{server.url}/v1/chat/completions", json={"model": model, "messages": QUESTION, **more})
    assert done.status_code == 400, done.text
    assert done.json()["error"]["param"] == param


def test_values_that_ask_for_nothing_are_fine(server: Running, model: str):
    nothing: Any = {"n": 1, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "seed": None, "store": False, "tools": None}
    done = httpx.post(f"{server.url}/v1/chat/completions", json={"model": model, "messages": QUESTION, "max_tokens": 1, **nothing})
    assert done.status_code == 200, done.text


def test_refusals_have_openais_shape(server: Running, model: str):
    with pytest.raises(openai.NotFoundError) as missing:
        client(server).chat.completions.create(model="other", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client(server).chat.completions.create(model=model, messages=QUESTION, max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    assert "512" in long.value.message
    url, head = f"{server.url}/v1/chat/completions", {"content-type": "application/json"}
    assert httpx.post(url, content=b"x" * 200_000, headers=head).status_code == 413
    assert httpx.post(url, content=b"{", headers=head).status_code == 400
    assert httpx.post(url, content=b'{"model": "\\ud800", "messages": []}', headers=head).status_code == 400
    assert httpx.post(url, content=b"[" * 90_000, headers=head).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert httpx.get(f"{server.url}/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/v1/models").headers


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_costing(server: Running, model: str, stream: bool):
    body = {"model": model, "messages": QUESTION, "max_tokens": 400, "stream": stream, "logprobs": True}
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60 if stream else 0.15) as answer:
            next(answer.iter_lines())
    except httpx.ReadTimeout:
        pass
    for _ in range(100):
        if metric(server, "fourscore_running") == 0 and "cancelled" in server.log.read_text().splitlines()[-2]:
            break
        time.sleep(0.05)
    assert metric(server, "fourscore_running") == 0
    last = [json.loads(line) for line in server.log.read_text().splitlines() if "chat/completions" in line][-1]
    assert last["finish"] == "cancelled"
    assert last["completion_tokens"] < 400
    assert "messages" not in last


def test_keys_and_their_limits(tiny_llama: Path, tmp_path: Path):
    keys = tmp_path / "keys.json"
    anna, ben = new_key(keys, "anna", requests_per_minute=2), new_key(keys, "ben", tokens_per_day=60)
    assert anna not in keys.read_text()
    assert keys.stat().st_mode & 0o077 == 0
    with running(tiny_llama, tmp_path, "--keys", str(keys)) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            client(server, "fs-wrong").models.list()
        model = client(server, anna).models.list().data[0].id
        short: Any = {"model": model, "messages": QUESTION, "max_tokens": 2}
        for _ in range(2):
            client(server, anna).chat.completions.create(**short)
        with pytest.raises(openai.RateLimitError) as limited:
            client(server, anna).chat.completions.create(**short)
        assert 0 < int(limited.value.response.headers["retry-after"]) <= 60
        assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        client(server, ben).chat.completions.create(**short)
        with pytest.raises(openai.RateLimitError):
            client(server, ben).chat.completions.create(**short | {"max_tokens": 300})
        remove_key(keys, "anna")
        with pytest.raises(openai.AuthenticationError):
            client(server, anna).models.list()


def test_a_full_queue_and_a_draining_server(tiny_llama: Path, tmp_path: Path):
    with running(tiny_llama, tmp_path, "--queue", "1", "--drain", "20") as server:
        model = client(server).models.list().data[0].id
        body = {"model": model, "messages": QUESTION, "max_tokens": 300, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(openai.RateLimitError) as full:
                client(server).chat.completions.create(model=model, messages=QUESTION)
            assert full.value.code == "queue_full"
            assert int(full.value.response.headers["retry-after"]) > 0
            server.process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:][0] == "data: [DONE]"
        assert server.process.wait(20) == 0


def test_other_machines_need_keys(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(AssertionError, match="--insecure"), running(tiny_llama, tmp_path, "--host", "0.0.0.0"):
        pass
