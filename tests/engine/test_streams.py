"""Many requests at once: each reader gets what it would get alone, and nothing of the cache is lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PACKED, PLAIN, build, random_ids

from fourscore.engine import Engine, Sampling, Stream
from fourscore.engine.scoring import cached_logits
from fourscore.files import FourscoreError
from fourscore.model import Model, load

Ask = tuple[list[int], Sampling, str | None]


def read(stream: Stream) -> tuple[list[int], str, str | None]:
    pieces = list(stream)
    return [i for p in pieces for i in p.ids], "".join(p.text for p in pieces), stream.finish_reason


def quiet(engine: Engine, ask: Ask) -> tuple[list[int], str, str | None]:
    """Alone, in an engine that computes nothing else."""
    return read(engine.submit(*ask))


@pytest.fixture
def model(tiny_llama: Path) -> Model:
    return load(str(tiny_llama), weights="f32")


@pytest.fixture(params=["native", "transformers"])
def make(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    return partial(Engine, native=request.param == "native")


def asks(count: int, seed: int, adapters: list[str | None]) -> list[Ask]:
    """Prompts with common beginnings and without, greedy and sampled, short and long."""
    rng = random.Random(seed)
    system = random_ids(40, seed=99)
    found: list[Ask] = []
    for n in range(count):
        prompt = (system if rng.random() < 0.5 else []) + random_ids(rng.choice([1, 3, 20, 90]), seed=n % 7)
        sampling = Sampling(
            max_new_tokens=rng.choice([1, 4, 12]), temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(3), top_p=rng.choice([1.0, 0.9])
        )
        found.append((prompt, sampling, rng.choice(adapters)))
    return found


@pytest.mark.parametrize("cache_tokens", [4000, 300])
def test_any_schedule_gives_every_stream_the_tokens_of_a_quiet_run(model: Model, folders: dict[str, Path], cache_tokens: int) -> None:
    """Submits from three threads, cancels in between; the small cache has room for two or three at a time."""
    wanted = asks(36, 5, [None, "desk", "till"])
    engine = Engine(model, adapters=folders, cache_tokens=cache_tokens, native=False)
    got: dict[int, Any] = {}
    cancelled: list[Stream] = []

    def client(part: int) -> None:
        rng = random.Random(part)
        streams = {}
        for n in range(part, len(wanted), 3):
            streams[n] = engine.submit(*wanted[n])
            if rng.random() < 0.3:
                stream = engine.submit(random_ids(30, seed=n), Sampling(max_new_tokens=60))
                time.sleep(rng.random() * 0.01)
                stream.cancel()
                cancelled.append(stream)
        got.update((n, read(stream)) for n, stream in streams.items())

    threads = [threading.Thread(target=client, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {read(stream)[2] for stream in cancelled} <= {"cancelled", "length", "stop"}
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert sum(stats.tokens_in.values()) >= sum(len(prompt) for prompt, _, _ in wanted)
    engine.close()
    assert engine.stats().cache_used == 0
    alone = Engine(load(str(model.path), weights="f32"), adapters=folders, native=False)
    for n, ask in enumerate(wanted):
        assert got[n] == quiet(alone, ask), n
    alone.close()


def test_who_loses_its_cache_is_computed_again_and_loses_nothing(model: Model, make: Callable[..., Engine]) -> None:
    """Eight prompts fit, their answers do not: the youngest give way and come back, in the middle of what they write."""
    engine, wanted = make(model, cache_tokens=200), [(random_ids(20, seed=n), Sampling(max_new_tokens=60, seed=n)) for n in range(8)]
    wanted = [(p, replace(s, temperature=float(n % 2))) for n, (p, s) in enumerate(wanted)]
    streams = [engine.submit(*ask) for ask in wanted]
    got = [read(s) for s in streams]
    assert engine.stats().preempted > 0
    alone = make(model)
    for (prompt, sampling), answer in zip(wanted, got, strict=True):
        assert quiet(alone, (prompt, sampling, None)) == answer
    for each in (engine, alone):
        each.close()
        assert each.stats().cache_used == 0


def test_a_common_beginning_is_computed_once_and_changes_nothing(model: Model, make: Callable[..., Engine]) -> None:
    engine, system = make(model), random_ids(100)
    prompts = [system + random_ids(5, seed=n) for n in range(6)]
    streams = [engine.submit(p, Sampling(max_new_tokens=5)) for p in prompts]
    got = [read(s) for s in streams]
    assert streams[0].usage.cached == 0
    assert [s.usage.cached for s in streams[1:]] == [100] * 5
    for prompt, answer in zip(prompts, got, strict=True):
        fresh = make(model)
        assert quiet(fresh, (prompt, Sampling(max_new_tokens=5), None)) == answer
        fresh.close()
    again = engine.submit(prompts[2] + got[2][0], Sampling(max_new_tokens=2))  # the next turn of a chat
    read(again)
    assert again.usage.cached == 109  # all but the last token, which was chosen and never computed
    engine.close()
    assert engine.stats().cache_used == 0


@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
def test_every_architecture_streams_what_transformers_writes(name: str) -> None:
    """Windows, recurrent layers, rotary frequencies that change: what cannot be cut into chunks or shared is computed at once."""
    built = build(name)
    engine = Engine(built)
    ids = random_ids(100)
    prompts = [ids[:5], ids[:30], ids[20:50], ids[:33], ids[3:12]]
    streams = [engine.submit(p, Sampling(max_new_tokens=8)) for p in prompts]
    got = [read(stream)[0] for stream in streams]  # all of it: Phi-3's forward changes its module, so nobody else may run beside it
    for prompt, ids_read in zip(prompts, got, strict=True):
        inputs = torch.tensor([prompt])
        out = built.network.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False, pad_token_id=0)
        want = out[0, len(prompt) :].tolist()
        assert ids_read == (want[:-1] if want[-1] in engine.stop_ids else want)
    engine.close()
    assert engine.stats().cache_used == 0


def test_streams_and_calls_share_the_engine(model: Model, folders: dict[str, Path]) -> None:
    engine = Engine(model, adapters=folders)
    requests = [(random_ids(9, seed=n), random_ids(4, seed=n + 50)) for n in range(4)]
    scores, texts = engine.score(requests), engine.generate([requests[0][0]], 8, adapter="desk")
    streams = [engine.submit(random_ids(30, seed=n), Sampling(max_new_tokens=30), "till") for n in range(3)]
    for _ in range(3):
        assert engine.score(requests) == scores
        assert engine.generate([requests[0][0]], 8, adapter="desk") == texts
    assert [len(read(s)[0]) for s in streams] == [30, 30, 30]
    engine.close()


def test_a_stop_string_ends_a_stream_and_a_generation_alike(smol: Model) -> None:
    engine = Engine(smol)
    prompt = smol.tokenizer.encode("One, two, three,")
    (free,) = engine.generate([prompt], max_new_tokens=12)
    for stop in (free.text[6:9], free.text[4:20], free.text[-1]):
        (whole,) = engine.generate([prompt], max_new_tokens=12, stop_strings=[stop, "never written"])
        ids, text, reason = read(engine.submit(prompt, Sampling(max_new_tokens=12, stop=(stop, "never written"))))
        assert (ids, text, reason) == (whole.ids, whole.text, "stop")
        assert text == free.text[: free.text.index(stop)]
        assert smol.tokenizer.decode(ids).startswith(text)
        assert len(ids) < len(free.ids)


def test_a_cancelled_stream_stops_and_frees_its_cache(model: Model, make: Callable[..., Engine]) -> None:
    engine = make(model)
    stream = engine.submit(random_ids(50), Sampling(max_new_tokens=400))
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 3:
            stream.cancel()
    assert stream.finish_reason == "cancelled"
    assert stream.usage.new < 400
    assert stream.timing.queued is not None
    assert stream.timing.first_token is not None
    assert stream.timing.queued <= stream.timing.first_token
    assert len(stream.timing.between) == stream.usage.new - 1
    engine.close()
    assert engine.stats().cache_used == 0


def test_a_stream_is_read_from_an_event_loop(model: Model, make: Callable[..., Engine]) -> None:
    engine = make(model)

    async def one(n: int) -> tuple[list[int], str | None]:
        stream = engine.submit(random_ids(12, seed=n), Sampling(max_new_tokens=10))
        return [i async for piece in stream for i in piece.ids], stream.finish_reason

    async def several() -> list[tuple[list[int], str | None]]:
        return list(await asyncio.gather(*(one(n) for n in range(4))))

    got = asyncio.run(several())
    assert got == [(g.ids, "length") for g in engine.generate([random_ids(12, seed=n) for n in range(4)], max_new_tokens=10)]
    engine.close()


def test_adapters_come_and_go_while_streams_run(model: Model, folders: dict[str, Path]) -> None:
    engine = Engine(model, native=False)
    running = engine.submit(random_ids(20), Sampling(max_new_tokens=60))
    engine.add_adapter("desk", folders["desk"])
    by_desk = engine.submit(random_ids(9), Sampling(max_new_tokens=60), "desk")
    with pytest.raises(FourscoreError, match="already has an adapter `desk`"):
        engine.add_adapter("desk", folders["till"])
    engine.remove_adapter("desk")  # waits
    assert by_desk.ended
    assert len(read(by_desk)[0]) == 60
    with pytest.raises(FourscoreError, match="no adapter named `desk`"):
        engine.submit(random_ids(9), Sampling(), "desk")
    assert len(read(running)[0]) == 60
    engine.add_adapter("desk", folders["till"])  # another one under the same name
    other = Engine(load(str(model.path), weights="f32"), adapters=folders)
    ask = (random_ids(9), Sampling(max_new_tokens=8))
    assert read(engine.submit(*ask, "desk")) == read(other.submit(*ask, "till"))
    assert read(engine.submit(*ask)) == read(other.submit(*ask))
    engine.close()
    other.close()


def test_closing_finishes_or_cancels_what_runs(model: Model, make: Callable[..., Engine]) -> None:
    for drain in (True, False):
        engine = make(model)
        streams = [engine.submit(random_ids(20, seed=n), Sampling(max_new_tokens=100)) for n in range(3)]
        engine.close(drain=drain)
        assert all(s.ended for s in streams)
        assert {s.finish_reason for s in streams} == ({"length"} if drain else {"cancelled"})
        with pytest.raises(FourscoreError, match="the engine is closed"):
            engine.submit(random_ids(5))
        assert engine.stats().cache_used == 0


def test_what_can_never_run_is_refused_at_once(model: Model, make: Callable[..., Engine]) -> None:
    engine = make(model, cache_tokens=100)
    with pytest.raises(FourscoreError, match="empty prompt"):
        engine.submit([])
    with pytest.raises(FourscoreError, match="40 tokens and 80 new ones, and the cache takes (100|96)"):
        engine.submit(random_ids(40), Sampling(max_new_tokens=80))
    with pytest.raises(FourscoreError, match="and the model takes 512"):
        engine.submit(random_ids(40), Sampling(max_new_tokens=500))


def test_a_short_prompt_does_not_wait_for_a_long_one(model: Model, make: Callable[..., Engine]) -> None:
    engine = make(model)
    long = engine.submit(random_ids(480), Sampling(max_new_tokens=4))
    short = engine.submit(random_ids(6, seed=1), Sampling(max_new_tokens=1))
    read(short)
    assert long.usage.new == 0 or long.timing.first_token is not None
    read(long)
    assert short.timing.first_token is not None
    engine.close()


def test_states_under_way_give_their_caches_back(model: Model, make: Callable[..., Engine]) -> None:
    engine = make(model)
    states = [engine.prefill(random_ids(20, seed=n)) for n in range(3)]
    assert engine.stats().cache_used == (96 if engine.fast else 60)  # pages of 16
    del states
    engine.close()
    assert engine.stats().cache_used == 0


def test_scoring_through_caches_gives_the_packed_logits(model: Model, make: Callable[..., Engine]) -> None:
    """Any tree: questions with choices, beginnings shared by all, one inside another, the same twice; in packs of any size."""
    engine = make(model)
    rng = random.Random(1)
    system = random_ids(20)
    alone: dict[int, torch.Tensor] = {}
    sequences, tails = [], []
    for n in range(30):
        tail = rng.choice([1, 1, 3, 7])
        sequences.append((system if n % 3 else []) + random_ids(rng.choice([1, 15]), seed=n % 5) + random_ids(tail, seed=n % 4))
        tails.append(rng.choice([1, tail]))
    loop = engine._loop
    for budget in (8, 60, 2000):
        met = []
        for members, logits, rows in cached_logits(loop, sequences, tails, None, budget):
            for member, row in zip(members, rows, strict=True):
                met.append(member)
                with torch.inference_mode():
                    want = model.network(torch.tensor([sequences[member]])).logits[0, -tails[member] :]
                torch.testing.assert_close(logits[torch.tensor(row)], want, atol=1e-4, rtol=0)
                if engine.fast:  # the same bits whatever it was computed with
                    assert torch.equal(logits[torch.tensor(row)], alone.setdefault(member, logits[torch.tensor(row)]))
        assert sorted(met) == list(range(30))
    engine.close()
    assert engine.stats().cache_used == 0
