"""A projection that is not alone with its lane notices, before it counts twice or moves the position under another."""

import pytest

from services.processor.projection import LaneLostError, Projection
from tests.examples import (
    BATCH,
    EPOCH,
    LOG_ID,
    OPENING,
    a_batch_created,
    a_batch_sealed,
    a_lane_claimed,
    an_upload_queued,
    records_of,
)
from tests.fakes_rows import MemoryRows, Tables

LOG = records_of(*OPENING, a_batch_created(), an_upload_queued(), a_batch_sealed(), a_lane_claimed(after=EPOCH))
CLAIMED, SEALED = 2, 5


async def a_projection(tables: Tables, *, read: int = 0) -> Projection:
    """One that begins where the rows are, and has folded and written the log up to an offset."""
    projection = await Projection.open(MemoryRows(tables), partition=0, log_id=LOG_ID)
    await projection.fold(LOG[projection.lane.next_offset : read])
    await projection.flush()
    return projection


async def test_rows_that_another_moved_on_are_not_folded_onto() -> None:
    tables = Tables()
    late = await a_projection(tables, read=CLAIMED)
    await a_projection(tables, read=SEALED)

    with pytest.raises(LaneLostError, match="stand for 5 records, 2 were folded here"):
        await late.fold(LOG[CLAIMED:SEALED])

    batch = tables.batch(BATCH)
    assert batch is not None
    assert batch.total == 1


async def test_a_batch_is_not_shown_as_another_left_it() -> None:
    tables = Tables()
    late = await a_projection(tables, read=CLAIMED)
    await a_projection(tables, read=SEALED)

    with pytest.raises(LaneLostError):
        await late.batch(BATCH)
    with pytest.raises(LaneLostError):
        _ = [page async for page in late.unended()]


async def test_the_same_facts_written_by_another_are_settled() -> None:
    tables = Tables()
    first, second = await a_projection(tables, read=CLAIMED), await a_projection(tables, read=CLAIMED)
    await first.fold(LOG[CLAIMED:SEALED])
    await second.fold(LOG[CLAIMED:SEALED])

    await first.flush()
    await second.flush()

    assert (first.committed, second.committed) == (SEALED, SEALED)


async def test_nothing_is_written_that_was_folded_under_a_newer_claim() -> None:
    tables = Tables()
    superseded = await a_projection(tables, read=SEALED)
    superseded.epoch = EPOCH
    await superseded.fold(LOG[SEALED:])

    with pytest.raises(LaneLostError, match="claimed by another processor at 5"):
        await superseded.flush()

    assert tables.lanes[0].next_offset == SEALED


async def test_who_has_not_claimed_the_lane_yet_writes_past_the_claims_of_others() -> None:
    tables = Tables()

    await a_projection(tables, read=len(LOG))

    assert (tables.lanes[0].next_offset, tables.lanes[0].epoch) == (len(LOG), SEALED)
