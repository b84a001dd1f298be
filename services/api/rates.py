"""How many requests a user may still send: a bucket each, filled evenly, kept in this api's memory. Pure.

A bucket holds `burst` requests and gains `per_s` a second. Those of the users seen last are kept, `users_max` of them:
a user who is forgotten begins with a full bucket, as one who was away for long would anyway. Told to clients as
draft-ietf-httpapi-ratelimit-headers has it.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from schemas.errors import Code, RequestError

USERS_MAX = 100_000
_POLICY = '"user"'


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a user's bucket after a request; `left` is below zero where the request was one too many."""

    per_s: float
    burst: int
    left: float

    def check(self) -> None:
        """Raises RequestError(RATE_LIMITED)."""
        if self.left < 0:
            raise RequestError(
                Code.RATE_LIMITED,
                f"you may send {self.per_s:g} requests a second, and {self.burst} at once; wait {self.wait_s} s",
            )

    @property
    def wait_s(self) -> int:
        """After how many whole seconds there is room for a request again; 0 where there is now."""
        return max(0, math.ceil(-self.left / self.per_s))

    def headers(self) -> dict[str, str]:
        """`q`: requests in `w` seconds; `r`: how many are left now; `t`: in how many seconds all of them are."""
        full_s = math.ceil(self.burst / self.per_s)
        until_full_s = math.ceil((self.burst - max(0.0, self.left)) / self.per_s)
        return {
            "RateLimit-Policy": f"{_POLICY};q={self.burst};w={full_s}",
            "RateLimit": f"{_POLICY};r={max(0, math.floor(self.left))};t={until_full_s}",
            **({"Retry-After": str(self.wait_s)} if self.left < 0 else {}),
        }


class Rates:
    """The buckets of all users; see the module's text. `per_s` 0: there is no limit."""

    def __init__(self, *, per_s: float, burst: int, users_max: int = USERS_MAX) -> None:
        self._per_s = per_s
        self._burst = burst
        self._users_max = users_max
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, user_id: str, *, now_s: float) -> Allowance | None:
        """Take one request out of the user's bucket, if it holds one; `now_s` is any clock that never goes back."""
        if not self._per_s:
            return None
        held, as_of_s = self._buckets.pop(user_id, (float(self._burst), now_s))
        held = min(float(self._burst), held + (now_s - as_of_s) * self._per_s)
        left = held - 1
        self._buckets[user_id] = (held if left < 0 else left, now_s)
        if len(self._buckets) > self._users_max:
            self._buckets.popitem(last=False)
        return Allowance(self._per_s, self._burst, left)
