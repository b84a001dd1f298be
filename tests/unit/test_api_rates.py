"""How much a user may ask: bursts, the even filling, the headers of the draft, and that memory stays bounded."""

import pytest

from schemas.errors import Code, RequestError
from services.api.rates import Rates


def test_a_burst_is_granted_and_then_as_many_as_come_in_time() -> None:
    rates = Rates(per_s=2, burst=3)

    at_once = [rates.take("ada", now_s=100.0) for _ in range(5)]
    later = [rates.take("ada", now_s=100.0 + seconds) for seconds in (0.4, 0.5, 0.6, 1.0)]

    assert [each.left >= 0 for each in at_once if each] == [True, True, True, False, False]
    assert [each.left >= 0 for each in later if each] == [False, True, False, True]


def test_users_do_not_take_from_each_other() -> None:
    rates = Rates(per_s=1, burst=1)

    assert [rates.take(user, now_s=0.0).left for user in ("ada", "grace", "ada")] == [0, 0, -1]  # type: ignore[union-attr]  # there is a limit


def test_a_bucket_never_holds_more_than_the_burst() -> None:
    rates = Rates(per_s=1_000, burst=2)
    rates.take("ada", now_s=0.0)

    assert [rates.take("ada", now_s=1e6).left for _ in range(3)] == [1, 0, -1]  # type: ignore[union-attr]  # there is a limit


def test_the_headers_say_what_the_draft_says() -> None:
    rates = Rates(per_s=0.5, burst=10)

    first = rates.take("ada", now_s=0.0)
    for _ in range(9):
        last = rates.take("ada", now_s=0.0)
    refused = rates.take("ada", now_s=0.0)

    assert first is not None
    assert last is not None
    assert refused is not None
    assert first.headers() == {"RateLimit-Policy": '"user";q=10;w=20', "RateLimit": '"user";r=9;t=2'}
    assert last.headers()["RateLimit"] == '"user";r=0;t=20'
    assert refused.headers() == {
        "RateLimit-Policy": '"user";q=10;w=20',
        "RateLimit": '"user";r=0;t=20',
        "Retry-After": "2",
    }


def test_who_waits_as_long_as_told_is_granted() -> None:
    rates = Rates(per_s=0.3, burst=1)
    rates.take("ada", now_s=0.0)
    refused = rates.take("ada", now_s=0.0)
    assert refused is not None

    with pytest.raises(RequestError, match="4 s") as error:
        refused.check()
    granted = rates.take("ada", now_s=float(refused.wait_s))

    assert error.value.code is Code.RATE_LIMITED
    assert granted is not None
    granted.check()


def test_no_more_users_are_kept_than_may_be() -> None:
    rates = Rates(per_s=1, burst=1, users_max=3)
    for number in range(100):
        rates.take(f"user{number}", now_s=0.0)

    remembered = [user for user in range(97, 100) if rates.take(f"user{user}", now_s=0.0).left < 0]  # type: ignore[union-attr]  # there is a limit
    forgotten = rates.take("user0", now_s=0.0)

    assert remembered == [97, 98, 99]
    assert forgotten is not None
    assert forgotten.left == 0


def test_without_a_limit_nobody_is_counted() -> None:
    assert Rates(per_s=0, burst=1).take("ada", now_s=0.0) is None
