"""Run what is missing of a study, one step a process, and publish what is finished.

Each step runs in a process of its own: its peak memory is its own, and a crash takes nothing else down. The child dies
with its parent and holds the run's lock as long as it lives, so two runs never write one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fourscore.files import FourscoreError, atomic_file, locked, read_json
from fourscore.progress import duration, say
from fourscore.spec import Study, moved
from fourscore.study import environment, evidence, publish
from fourscore.study.graph import graph_of
from fourscore.study.inputs import Inputs, find_inputs
from fourscore.study.steps import Finished, Step, find_finished, finish, step_key, work_folder_of


def execute(study: Study, run: Path, until: str = "report", *, resume: bool = True) -> dict[str, Finished]:
    """Run every step up to and including `until` (a step's name, or its first word: `train` is every seed).

    Finished steps are not run again; a step that was stopped goes on from what it left, or begins anew without `resume`.
    Raises FourscoreError with the failing step's own line.
    """
    run.mkdir(parents=True, exist_ok=True)
    with locked(run / "lock", "this study") as lock:
        where = environment.describe(study)
        inputs = find_inputs(study)
        done: dict[str, Finished] = {}
        wanted = _up_to(graph_of(study, inputs), until)
        with atomic_file(run / "study.yaml") as file:
            yaml.safe_dump(moved(study, Path(), run).model_dump(mode="json"), file, sort_keys=False, allow_unicode=True)
        for number, step in enumerate(wanted, 1):
            key = step_key(step, done, where)
            finished = find_finished(run, step, key)
            if finished is None:
                say(f"[{number}/{len(wanted)}] {step.title or step.name}")
                if not resume:
                    shutil.rmtree(work_folder_of(run, step, key), ignore_errors=True)
                publish.retract(run, step.name)
                finished = _run_step(study, inputs, run, step, key, done, where, lock)
            else:
                say(f"[{number}/{len(wanted)}] {step.title or step.name}: done before")
            evidence.append(run, finished)
            done[step.name] = finished
            publish.publish(run, done)
            if step.name == "plan" and step is not wanted[-1]:
                refuse_what_does_not_fit(finished)
        return done


def refuse_what_does_not_fit(plan: Finished) -> None:
    """A FourscoreError where the plan says that the study needs more memory than it may use."""
    told = read_json(plan.folder / "plan.json")
    if not told["fits"]:
        train, measure = (told["predicted"][f"{what}_peak_rss_bytes"] / 2**30 for what in ("train", "evaluate"))
        raise FourscoreError(
            f"training would need {train:.1f} GiB of memory and measuring {measure:.1f} GiB; "
            f"{told['memory_limit_bytes'] / 2**30:.1f} GiB may be used",
            where=str(plan.folder),
            todo="lower `train.tokens_per_step` or `data.max_tokens`, choose a smaller model, or raise `memory_gb`",
        )


def _up_to(graph: list[Step], until: str) -> list[Step]:
    last = [n for n, step in enumerate(graph) if step.name == until or step.name.split("-")[0] == until]
    if not last:
        raise FourscoreError(f"no step `{until}` in this study", todo="steps: " + ", ".join(s.name for s in graph))
    return graph[: last[-1] + 1]


def _run_step(
    study: Study, inputs: Inputs, run: Path, step: Step, key: str, done: Mapping[str, Finished], where: Mapping[str, Any], lock: int
) -> Finished:
    work = work_folder_of(run, step, key)
    resumed = work.exists()
    work.mkdir(parents=True, exist_ok=True)
    order = {
        "study": study.model_dump(mode="json"),
        "step": step.name,
        "base": str(inputs.base),
        "base_sha256": inputs.base_sha256,
        "source_sha256": inputs.source_sha256,
        "out": str(work),
        "run": str(run),
        "folders": {name: str(f.folder) for name, f in done.items()},
    }
    threads = str(environment.threads(study))
    started = time.monotonic()
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "fourscore.study.child", str(writer), str(os.getpid())],
        stdin=subprocess.PIPE,
        pass_fds=(writer, lock),
        env=_environment_of_a_child(threads),
    )
    os.close(writer)
    try:
        assert child.stdin is not None
        child.stdin.write(json.dumps(order).encode())
        child.stdin.close()
        with os.fdopen(reader, "rb") as answers:
            answer = answers.read()
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if code != 0:
        raise _failure(step, code, answer, run)
    finished = finish(run, step, key, done, where, time.monotonic() - started, resumed)
    say(f"    took {duration(time.monotonic() - started)}")
    return finished


def _environment_of_a_child(threads: str) -> dict[str, str]:
    """Threads that sleep at barriers instead of spinning: beside another busy program a spinning pool was 28 times slower.

    And few kept oneDNN products: each shape takes 0.6 MB, and rows of mixed lengths make 20 MB of them a step.
    """
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    return {**defaults, **os.environ, **quiet, "OMP_NUM_THREADS": threads}


def _failure(step: Step, code: int, answer: bytes, run: Path) -> FourscoreError:
    if answer:
        told = json.loads(answer)
        return FourscoreError(told["what"], where=told["where"], todo=told["todo"])
    if code < 0:
        return FourscoreError(
            f"step `{step.name}` was killed by signal {-code}" + (" (out of memory?)" if code == -9 else ""),
            where=str(run),
            todo="run the same command again: finished steps are kept"
            + ("; if it repeats, lower `train.tokens_per_step` or `data.max_tokens`" if code == -9 else ""),
        )
    return FourscoreError(f"step `{step.name}` failed with exit code {code}", where=str(run), todo="run again with --debug to see why")
