"""What one key may use: requests in the last minute, tokens in the UTC day. Kept in memory: a restart begins anew.

Tokens are taken at the start for the longest answer that a request permits, and what it did not use is given back: a day's limit is
never overdrawn, however many requests run at once.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fourscore.serve.errors import ApiError
from fourscore.serve.keys import Key

MINUTE, DAY = 60.0, 86_400.0


@dataclass
class _Account:
    requests: deque[float] = field(default_factory=deque)
    day: int = -1
    tokens: int = 0


@dataclass(frozen=True)
class Reservation:
    """Tokens set aside for one request on one day."""

    account: _Account
    day: int
    tokens: int

    def settle(self, used: int) -> None:
        """Give back what was not used."""
        if self.account.day == self.day:
            self.account.tokens += used - self.tokens


class Limits:
    """Accounts by the name of the key. Called from the event loop alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, key: Key) -> None:
        """Count a request; ApiError 429 when the last minute had as many as the key may send."""
        account, now = self._account(key), self._clock()
        if key.requests_per_minute is not None:
            if len(account.requests) >= key.requests_per_minute:
                wait = account.requests[0] + MINUTE - now
                raise self._over(key, f"Rate limit reached: {key.requests_per_minute} requests a minute.", wait)
            account.requests.append(now)

    def reserve(self, key: Key, tokens: int) -> Reservation:
        """Set tokens aside; ApiError 429 when the day has not so many left."""
        account = self._account(key)
        left = None if key.tokens_per_day is None else key.tokens_per_day - account.tokens
        if left is not None and tokens > left:
            message = (
                f"Rate limit reached: this request may use {tokens} tokens, and {max(left, 0)} of {key.tokens_per_day} a day are left."
            )
            raise self._over(key, f"{message} Lower max_tokens, or wait.", self._till_midnight())
        account.tokens += tokens
        return Reservation(account, account.day, tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """x-ratelimit-*, as OpenAI names them; nothing for a limit that the key has not."""
        account, now = self._account(key), self._clock()
        told: dict[str, str] = {}
        if key.requests_per_minute is not None:
            told["x-ratelimit-limit-requests"] = str(key.requests_per_minute)
            told["x-ratelimit-remaining-requests"] = str(key.requests_per_minute - len(account.requests))
            reset = account.requests[0] + MINUTE - now if account.requests else 0.0
            told["x-ratelimit-reset-requests"] = f"{math.ceil(reset)}s"
        if key.tokens_per_day is not None:
            told["x-ratelimit-limit-tokens"] = str(key.tokens_per_day)
            told["x-ratelimit-remaining-tokens"] = str(max(0, key.tokens_per_day - account.tokens))
            told["x-ratelimit-reset-tokens"] = f"{math.ceil(self._till_midnight())}s"
        return told

    def _account(self, key: Key) -> _Account:
        account, now = self._accounts.setdefault(key.name, _Account()), self._clock()
        while account.requests and account.requests[0] <= now - MINUTE:
            account.requests.popleft()
        if account.day != (day := int(now // DAY)):
            account.day, account.tokens = day, 0
        return account

    def _till_midnight(self) -> float:
        return DAY - self._clock() % DAY

    def _over(self, key: Key, message: str, wait: float) -> ApiError:
        headers = {"retry-after": str(max(1, math.ceil(wait))), **self.headers(key)}
        return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)
