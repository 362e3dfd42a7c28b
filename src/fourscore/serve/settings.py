"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """queue: answers under way and waiting. timeout: seconds an answer may take. answer_tokens: longest one where the request says nothing.

    body_bytes: largest request. drain: seconds that answers under way have after SIGTERM. hosts: names this server goes by, besides
    localhost and addresses. log_text: put questions and answers into the request log.
    """

    queue: int = 64
    timeout: float = 600.0
    answer_tokens: int = 1024
    body_bytes: int = 4 << 20
    drain: float = 30.0
    hosts: tuple[str, ...] = ()
    log_text: bool = False
