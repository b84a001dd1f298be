"""The fan-out: who is told what, in which order, and what happens to those who do not keep up.

No socket and no clock here: a client's queue is looked into with `take`, and times are told.
"""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.notifier.hub import (
    PACED_UPLOADS_MAX,
    TOO_SLOW,
    Client,
    Close,
    Frame,
    Hub,
    HubLimits,
    TooManyConnectionsError,
)

BATCH = "batch-1"
OTHER_BATCH = "batch-2"
UPLOAD = "upload-1"
OTHER_UPLOAD = "upload-2"
MANY = 1_000_000


def a_hub(**limits: float) -> Hub:
    """A hub with room for all, unless told otherwise."""
    given = {
        "clients_max": MANY,
        "clients_per_user_max": MANY,
        "client_bytes_max": MANY,
        "client_frames_max": MANY,
        "history_bytes_max": MANY,
        **limits,
    }
    return Hub(HubLimits(**given))


def a_fact(offset: int, size_bytes: int = 10) -> Frame:
    return Frame.of(str(offset).rjust(size_bytes, "0"), position=f"1f3a9c02.0-{offset}", offset=offset)


def a_client(hub: Hub, *batches: str, user: str = "ada") -> Client:
    client = hub.connect(wake=lambda: None)
    hub.identify(client, user)
    for batch_id in batches:
        hub.subscribe(client, batch_id, after=-1)
    return client


def told(client: Client) -> list[str]:
    return [frame.text for frame in client.take(bytes_max=MANY)]


def test_the_hub_imports_nothing_that_waits_or_knows_the_time() -> None:
    code = "import sys, services.notifier.hub; print({'asyncio', 'socket', 'uvicorn', 'starlette'} & set(sys.modules))"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "set()"


def test_a_fact_is_told_to_those_who_watch_its_batch_and_to_nobody_else() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    hub.watch(OTHER_BATCH, floor=0)
    here, both, elsewhere = a_client(hub, BATCH), a_client(hub, BATCH, OTHER_BATCH), a_client(hub, OTHER_BATCH)

    fact = a_fact(1)
    hub.tell(BATCH, fact, upload_id=None)

    assert [[fact.text], [fact.text], []] == [told(here), told(both), told(elsewhere)]


def test_all_clients_are_given_the_very_same_frame() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    clients = [a_client(hub, BATCH) for _ in range(3)]

    fact = a_fact(1)
    hub.tell(BATCH, fact, upload_id=None)

    taken = [frame for client in clients for frame in client.take(bytes_max=MANY)]
    assert [fact] * 3 == taken
    assert all(frame is fact for frame in taken)


def test_a_batch_subscribed_to_twice_is_told_once() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH, BATCH)

    fact = a_fact(1)
    hub.tell(BATCH, fact, upload_id=None)

    assert [fact.text] == told(client)


def test_a_client_that_unsubscribed_is_told_no_more_and_the_last_one_to_leave_is_known() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    first, second = a_client(hub, BATCH), a_client(hub, BATCH)

    was_last = [hub.unsubscribe(first, BATCH), hub.unsubscribe(first, BATCH), hub.unsubscribe(second, BATCH)]
    hub.tell(BATCH, a_fact(1), upload_id=None)

    assert was_last == [False, False, True]
    assert [told(first), told(second)] == [[], []]


def test_a_client_that_disconnects_leaves_the_batches_it_was_the_last_to_watch() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    hub.watch(OTHER_BATCH, floor=0)
    leaving = a_client(hub, BATCH, OTHER_BATCH)
    a_client(hub, OTHER_BATCH)

    left = hub.disconnect(leaving)

    assert left == [BATCH]
    assert (hub.watched_by(BATCH), hub.watched_by(OTHER_BATCH)) == (0, 1)


def test_frames_are_taken_in_order_and_up_to_a_size_but_never_none_of_those_that_wait() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)
    for offset in range(5):
        hub.tell(BATCH, a_fact(offset), upload_id=None)

    sizes = [[frame.offset for frame in client.take(bytes_max=bytes_max)] for bytes_max in (25, 1, MANY)]

    assert sizes == [[0, 1], [2], [3, 4]]
    assert not client.waiting
    assert client.queued_bytes == 0


def test_a_client_with_more_bytes_waiting_than_it_may_is_closed_with_the_last_position_it_was_sent() -> None:
    hub = a_hub(client_bytes_max=100)
    hub.watch(BATCH, floor=0)
    slow, quick = a_client(hub, BATCH), a_client(hub, BATCH)
    hub.tell(BATCH, a_fact(0), upload_id=None)
    slow.sent(slow.take(bytes_max=MANY))
    hub.tell(BATCH, a_fact(1), upload_id=None)
    slow.take(bytes_max=MANY)
    quick.take(bytes_max=MANY)

    quickly_told = []
    for offset in range(2, 13):
        hub.tell(BATCH, a_fact(offset), upload_id=None)
        quickly_told += quick.take(bytes_max=MANY)

    assert slow.close is not None
    assert slow.close.code == TOO_SLOW
    assert slow.close.reason(slow.position) == "too slow, go on with since=1f3a9c02.0-0"
    assert not slow.waiting
    assert quick.close is None
    assert list(range(2, 13)) == [frame.offset for frame in quickly_told]


def test_a_client_with_more_frames_waiting_than_it_may_is_closed() -> None:
    hub = a_hub(client_frames_max=3)
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)

    closed_at = []
    for offset in range(4):
        hub.tell(BATCH, a_fact(offset), upload_id=None)
        closed_at.append(client.close is not None)

    assert closed_at == [False, False, False, True]


def test_a_closed_client_is_told_nothing_and_the_first_reason_stays() -> None:
    hub = a_hub(client_frames_max=1)
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)
    for offset in range(3):
        hub.tell(BATCH, a_fact(offset), upload_id=None)
    first = client.close

    client.end_too_slow()
    hub.tell_percentage(BATCH, UPLOAD, Frame.of("50 %"), now_s=0)

    assert client.close is first
    assert told(client) == []


def test_the_reason_of_a_close_fits_its_frame_however_many_partitions_a_position_has() -> None:
    hub = a_hub(client_frames_max=1)
    client = a_client(hub)
    long = "1f3a9c02" + "".join(f".{number}-9223372036854775807" for number in range(256))
    client.put(Frame.of("a snapshot", position=long))
    client.sent(client.take(bytes_max=MANY))

    client.put(a_fact(1))
    client.put(a_fact(2))

    assert client.close is not None
    assert client.close.reason(client.position) == "too slow, go on with the last position you have"


def test_a_reason_is_cut_to_what_a_close_frame_holds_without_breaking_a_character() -> None:
    assert Close(4001, "é" * 200).reason(None) == "é" * 61


def test_a_client_is_woken_for_every_frame_and_for_its_end() -> None:
    hub = a_hub(client_frames_max=2)
    hub.watch(BATCH, floor=0)
    woken: list[str] = []
    client = hub.connect(wake=lambda: woken.append("woken"))
    hub.subscribe(client, BATCH, after=-1)

    counts = []
    hub.tell_percentage(BATCH, UPLOAD, Frame.of("10 %"), now_s=0)
    counts.append(len(woken))
    for offset in range(3):
        hub.tell(BATCH, a_fact(offset), upload_id=None)
        counts.append(len(woken))

    assert counts == [1, 2, 3, 4]
    assert client.close is not None


def test_of_the_percentages_that_wait_only_the_latest_of_each_upload_is_told_and_after_the_facts() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)

    for second, percent in enumerate((10, 20, 30)):
        hub.tell_percentage(BATCH, UPLOAD, Frame.of(f"one {percent}"), now_s=second)
        hub.tell_percentage(BATCH, OTHER_UPLOAD, Frame.of(f"two {percent}"), now_s=second)
    fact = a_fact(1)
    hub.tell(BATCH, fact, upload_id="another")

    assert [fact.text, "one 30", "two 30"] == told(client)


def test_percentages_of_an_upload_are_told_at_most_ten_a_second_and_the_last_one_is_not_lost() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)

    heard: list[str] = []
    for millisecond in range(0, 1_000, 5):
        now_s = millisecond / 1_000
        hub.tell_percentage(BATCH, UPLOAD, Frame.of(str(millisecond)), now_s=now_s)
        hub.tell_due(now_s=now_s)
        heard += told(client)
    still_waiting = hub.tell_due(now_s=2)
    heard += told(client)

    assert len(heard) <= 11
    assert heard[-1] == "995"
    assert not still_waiting


def test_a_fact_about_an_upload_overtakes_its_percentages() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)
    for upload_id in (UPLOAD, OTHER_UPLOAD):
        hub.tell_percentage(BATCH, upload_id, Frame.of(f"{upload_id} 90"), now_s=0)
        hub.tell_percentage(BATCH, upload_id, Frame.of(f"{upload_id} 95"), now_s=0)

    outcome = a_fact(1)
    hub.tell(BATCH, outcome, upload_id=UPLOAD)
    hub.tell_due(now_s=1)

    assert [outcome.text, f"{OTHER_UPLOAD} 95"] == told(client)


def test_a_fact_about_the_whole_batch_overtakes_all_its_percentages() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)
    for upload_id in (UPLOAD, OTHER_UPLOAD):
        hub.tell_percentage(BATCH, upload_id, Frame.of("90"), now_s=0)
        hub.tell_percentage(BATCH, upload_id, Frame.of("95"), now_s=0)

    cancelled = a_fact(1)
    hub.tell(BATCH, cancelled, upload_id=None)
    still_waiting = hub.tell_due(now_s=1)

    assert [cancelled.text] == told(client)
    assert not still_waiting


def test_percentages_never_close_a_client() -> None:
    hub = a_hub(client_bytes_max=50, client_frames_max=2)
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)

    for second in range(1_000):
        hub.tell_percentage(BATCH, UPLOAD, Frame.of(f"{second} of 1000"), now_s=second)

    assert client.close is None
    assert told(client) == ["999 of 1000"]


def test_a_client_that_comes_back_is_given_what_it_missed_if_all_of_it_is_at_hand() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=7)
    for offset in (9, 12):
        hub.tell(BATCH, a_fact(offset), upload_id=None)
    client = a_client(hub)

    missed = {after: hub.missed(client, BATCH, after=after) for after in (6, 7, 8, 9, 11, 12, 20)}

    assert missed == {
        6: None,
        7: [a_fact(9), a_fact(12)],
        8: [a_fact(9), a_fact(12)],
        9: [a_fact(12)],
        11: [a_fact(12)],
        12: [],
        20: [],
    }


def test_a_client_that_is_subscribed_already_has_missed_nothing() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)
    hub.tell(BATCH, a_fact(1), upload_id=None)

    missed = hub.missed(client, BATCH, after=0)

    assert missed == []


def test_a_client_that_follows_from_a_later_place_is_given_what_is_before_it() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    hub.watch_user("ada", floor={0: 0})
    of_batch, of_user, of_both = a_client(hub), a_client(hub), a_client(hub)
    for offset in range(1, 6):
        hub.tell(BATCH, a_fact_of(BATCH, offset), upload_id=None, user_id="ada")
    hub.subscribe(of_batch, BATCH, after=3)
    hub.subscribe_user(of_user, after={0: 3})
    hub.subscribe(of_both, BATCH, after=4)
    hub.subscribe_user(of_both, after={0: 2})

    def offsets(frames: list[Frame] | None) -> list[int]:
        return [frame.offset for frame in frames or []]

    assert [offsets(hub.missed(of_batch, BATCH, after=after)) for after in (1, 3, 4)] == [[2, 3], [], []]
    assert [offsets(hub.missed(of_user, BATCH, after=after)) for after in (1, 3, 4)] == [[2, 3], [], []]
    assert [offsets(hub.missed(of_both, BATCH, after=after)) for after in (0, 1, 2)] == [[1, 2], [2], []]
    assert [offsets(hub.missed_of_user(of_user, after={0: after})) for after in (1, 3)] == [[2, 3], []]
    assert offsets(hub.missed_of_user(of_batch, after={0: 1})) == [2, 3]
    hub.subscribe(of_batch, BATCH, after=1)
    assert hub.missed(of_batch, BATCH, after=1) == []


def test_the_oldest_facts_of_all_batches_are_given_up_first_and_are_then_known_to_be_gone() -> None:
    hub = a_hub(history_bytes_max=30)
    hub.watch(BATCH, floor=0)
    hub.watch(OTHER_BATCH, floor=0)
    client = a_client(hub)

    for batch_id, offset in ((BATCH, 1), (OTHER_BATCH, 2), (BATCH, 3), (OTHER_BATCH, 4)):
        hub.tell(batch_id, a_fact(offset), upload_id=None)

    assert hub.missed(client, BATCH, after=0) is None
    assert [a_fact(3)] == hub.missed(client, BATCH, after=1)
    assert [a_fact(2), a_fact(4)] == hub.missed(client, OTHER_BATCH, after=0)


def test_what_was_kept_of_a_forgotten_batch_ages_out_without_touching_its_next_watch() -> None:
    hub = a_hub(history_bytes_max=30)
    hub.watch(BATCH, floor=0)
    hub.tell(BATCH, a_fact(1), upload_id=None)
    hub.forget(BATCH)
    hub.watch(BATCH, floor=1)
    client = a_client(hub)

    for offset in (2, 3, 4):
        hub.tell(BATCH, a_fact(offset), upload_id=None)

    assert [a_fact(2), a_fact(3), a_fact(4)] == hub.missed(client, BATCH, after=1)


def test_forgetting_a_batch_ends_its_subscriptions_and_its_percentages() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    client = a_client(hub, BATCH)
    for percent in ("10", "20"):
        hub.tell_percentage(BATCH, UPLOAD, Frame.of(percent), now_s=0)

    hub.forget(BATCH)

    assert not hub.watches(BATCH)
    assert client.batches == {}
    assert not hub.tell_due(now_s=1)
    assert hub.disconnect(client) == []


def of_user(hub: Hub, *users: str) -> list[Client]:
    """Clients that follow all batches of their users, which are watched from offset 0 of two partitions."""
    clients = []
    for user in users:
        if not hub.watches_user(user):
            hub.watch_user(user, floor={0: 0, 1: 0})
        clients.append(a_client(hub, user=user))
        hub.subscribe_user(clients[-1], after={})
    return clients


def a_fact_of(batch_id: str, offset: int, partition: int = 0) -> Frame:
    position = f"1f3a9c02.{partition}-{offset}"
    return Frame.of(f"{partition}-{offset}", position=position, partition=partition, offset=offset, batch_id=batch_id)


def test_facts_of_all_batches_are_told_to_those_who_follow_their_user() -> None:
    hub = a_hub()
    ada, grace = of_user(hub, "ada", "grace")

    for batch_id, offset, user in ((BATCH, 1, "ada"), (OTHER_BATCH, 2, "ada"), ("batch-3", 3, "grace")):
        hub.tell(batch_id, a_fact_of(batch_id, offset), upload_id=None, user_id=user)

    assert (told(ada), told(grace)) == (["0-1", "0-2"], ["0-3"])


def test_a_fact_is_told_once_to_who_follows_its_batch_and_its_user() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    (both,) = of_user(hub, "ada")
    hub.subscribe(both, BATCH, after=-1)

    hub.tell(BATCH, a_fact_of(BATCH, 1), upload_id=None, user_id="ada")
    hub.tell_percentage(BATCH, UPLOAD, Frame.of("10 %"), now_s=0, user_id="ada")
    hub.unsubscribe(both, BATCH)
    hub.tell(BATCH, a_fact_of(BATCH, 2), upload_id="another", user_id="ada")
    hub.unsubscribe_user(both)
    hub.tell(BATCH, a_fact_of(BATCH, 3), upload_id="another", user_id="ada")

    assert told(both) == ["0-1", "0-2", "10 %"]


def test_facts_from_before_a_user_was_followed_are_not_told() -> None:
    hub = a_hub()
    hub.watch_user("ada", floor={0: 5})
    client = a_client(hub)
    hub.subscribe_user(client, after={})

    for offset in (4, 5, 6):
        hub.tell(BATCH, a_fact_of(BATCH, offset), upload_id=None, user_id="ada")

    assert told(client) == ["0-6"]


def test_who_comes_back_is_given_what_it_missed_of_all_partitions_but_of_the_batches_it_follows() -> None:
    hub = a_hub()
    hub.watch(BATCH, floor=0)
    of_user(hub, "ada")
    for batch_id, offset, partition in ((BATCH, 1, 0), (OTHER_BATCH, 2, 0), ("batch-3", 1, 1), ("batch-3", 2, 1)):
        hub.tell(batch_id, a_fact_of(batch_id, offset, partition), upload_id=None, user_id="ada")
    back, follows_one = a_client(hub), a_client(hub, BATCH)

    after = {0: 0, 1: 1}
    missed = [hub.missed_of_user(client, after=after) or [] for client in (back, follows_one)]

    assert [[frame.text for frame in frames] for frames in missed] == [["0-1", "0-2", "1-2"], ["0-2", "1-2"]]
    assert hub.missed_of_user(back, after={0: 0}) is None, "a partition that is not named may hold anything"


def test_facts_of_a_user_that_were_given_up_are_known_to_be_gone_in_their_partition_only() -> None:
    hub = a_hub(history_bytes_max=6)
    of_user(hub, "ada")
    for offset, partition in ((1, 0), (2, 0), (1, 1)):
        hub.tell(BATCH, a_fact_of(BATCH, offset, partition), upload_id=None, user_id="ada")
    back = a_client(hub)

    assert hub.missed_of_user(back, after={0: 0, 1: 0}) is None
    assert [frame.text for frame in hub.missed_of_user(back, after={0: 1, 1: 0}) or []] == ["0-2", "1-1"]


def test_forgetting_a_user_names_the_clients_that_followed_it() -> None:
    hub = a_hub()
    ada, grace = of_user(hub, "ada", "grace")

    left = hub.forget_user("ada")
    hub.tell(BATCH, a_fact_of(BATCH, 1), upload_id=None, user_id="ada")

    assert left == {ada}
    assert (ada.follows_user, grace.follows_user, told(ada)) == (None, {}, [])


def test_the_paces_of_a_users_many_uploads_are_not_kept_for_ever() -> None:
    hub = a_hub()
    (client,) = of_user(hub, "ada")

    for number in range(10 * PACED_UPLOADS_MAX):
        hub.tell_percentage(BATCH, f"upload {number}", Frame.of("1 %"), now_s=number, user_id="ada")
        client.take(bytes_max=MANY)

    assert len(hub._users["ada"].percentages) <= PACED_UPLOADS_MAX


def test_no_more_clients_are_taken_than_the_limits_allow_and_leaving_makes_room() -> None:
    hub = a_hub(clients_max=3, clients_per_user_max=2)
    first, _ = a_client(hub, user="ada"), a_client(hub, user="ada")
    third = hub.connect(wake=lambda: None)

    with pytest.raises(TooManyConnectionsError, match="3 connections are open"):
        hub.connect(wake=lambda: None)
    with pytest.raises(TooManyConnectionsError, match="this user has 2"):
        hub.identify(third, "ada")
    hub.disconnect(first)
    hub.identify(third, "ada")
    fourth = a_client(hub, user="grace")

    assert (third.user_id, fourth.user_id) == ("ada", "grace")


steps = st.lists(st.tuples(st.sampled_from(["tell", "join", "leave", "come back"]), st.integers(0, 3)), max_size=60)


@given(steps)
def test_snapshot_and_facts_after_it_are_all_facts_whenever_clients_come_and_go(
    moves: list[tuple[str, int]],
) -> None:
    hub = a_hub(history_bytes_max=45)
    hub.watch(BATCH, floor=0)
    clients: dict[int, Client] = {}
    known: dict[int, list[int]] = {}
    offset = 0

    for move, who in moves:
        if move == "tell":
            offset += 1
            hub.tell(BATCH, a_fact(offset), upload_id=None)
        elif move == "leave" and who in clients:
            known[who] += [frame.offset for frame in clients[who].take(bytes_max=MANY)]
            hub.disconnect(clients.pop(who))
        elif move in ("join", "come back") and who not in clients:
            client = clients[who] = a_client(hub)
            after = known.get(who, [0])[-1:] or [0]
            missed = hub.missed(client, BATCH, after=after[0]) if move == "come back" and who in known else None
            if missed is None:
                known[who] = list(range(1, offset + 1))
            for frame in missed or []:
                client.put(frame)
            hub.subscribe(client, BATCH, after=-1)

    for who, client in clients.items():
        assert list(range(1, offset + 1)) == known[who] + [frame.offset for frame in client.take(bytes_max=MANY)]
