"""The frames between the lane's process and its child: whole whatever the pieces they come in, and never believed."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.processor.work import frames

MESSAGES = st.lists(st.dictionaries(st.text(), st.integers() | st.text()), max_size=5)


@given(messages=MESSAGES, piece_bytes=st.integers(1, 40))
def test_messages_come_out_as_they_went_in_whatever_the_pieces(messages, piece_bytes):
    stream = b"".join(frames.encode(message) for message in messages)
    splitter = frames.Splitter()

    received = []
    for at in range(0, len(stream), piece_bytes):
        received += splitter.feed(stream[at : at + piece_bytes])

    assert messages == received


@pytest.mark.parametrize("damaged", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x04nope", b"\0\0\0\x04[42]"])
def test_what_is_no_frame_is_refused(damaged):
    with pytest.raises(frames.BrokenFrameError):
        frames.Splitter().feed(damaged)


def test_a_pipe_carries_a_message_larger_than_itself():
    ours, theirs = os.pipe()
    message = {"text": "x" * 20_000}

    frames.write(theirs, frames.encode(message))

    assert message == frames.read(ours)
    os.close(theirs)
    assert frames.read(ours) is None
    os.close(ours)


def test_a_message_cut_off_by_the_end_is_no_message():
    ours, theirs = os.pipe()
    os.write(theirs, frames.encode({"a": 1})[:-1])
    os.close(theirs)

    assert frames.read(ours) is None
    os.close(ours)
