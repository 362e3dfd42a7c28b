"""The process in which one step runs: reads its order from stdin, does it, tells its error through a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path


def die_with_parent(parent: int) -> None:
    """Linux: be killed when the parent is, so that a killed study never goes on writing. Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def without_bitsandbytes() -> None:
    """Keep PEFT from importing bitsandbytes where the study computes on the CPU, and nothing here uses it.

    Installed for other reasons, it would cost every step seconds and hundreds of megabytes, and look for a kernel on the network.
    """
    from fourscore.model.device import on_gpu

    if not on_gpu():
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # Python's own way to say: not to be had


def main() -> int:
    """Run the step that stdin names. Exit code 0, or 1 with the error as JSON in the pipe."""
    writer, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    order = json.loads(sys.stdin.buffer.read())
    without_bitsandbytes()
    from fourscore.files import FourscoreError

    try:
        from fourscore.spec import Study
        from fourscore.study.graph import graph_of
        from fourscore.study.inputs import Inputs
        from fourscore.study.steps import Context

        study = Study.model_validate(order["study"])
        inputs = Inputs(Path(order["base"]), order["base_sha256"], order["source_sha256"])
        step = next(s for s in graph_of(study, inputs) if s.name == order["step"])
        folders = {name: Path(folder) for name, folder in order["folders"].items()}
        step.work(Context(step.name, study, inputs.base, Path(order["out"]), folders, Path(order["run"])))
    except FourscoreError as error:
        _tell(writer, error.what, error.where, error.todo)
        return 1
    except OSError as error:
        import errno

        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _tell(
            writer,
            "the disk is full" if full else f"{error.strerror or error}",
            str(error.filename or order["out"]),
            "free some space and run the same command again; finished steps are kept" if full else "check the path and its rights",
        )
        return _debug(error)
    except Exception as error:  # the last stop of an unforeseen fault: one line for the user, the traceback with --debug
        _tell(
            writer,
            f"step `{order['step']}` failed: {type(error).__name__}: {error}",
            "",
            "run again with --debug to see where, and report it",
        )
        return _debug(error)
    return 0


def _tell(writer: int, what: str, where: str, todo: str) -> None:
    os.write(writer, json.dumps({"what": what, "where": where, "todo": todo}).encode())


def _debug(error: BaseException) -> int:
    if os.environ.get("FOURSCORE_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
