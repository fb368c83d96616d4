"""Events: what a reader gets who is slow, or reads byte by byte."""

from __future__ import annotations

import json

from swampfs.fs.events import Events


def read_all(stream, size=1 << 16):
    text = b""
    while (part := stream.take(size)) is not None:
        assert len(part) <= size
        text += part
    return [json.loads(line) for line in text.splitlines()]


def test_a_reader_gets_what_happened_since_it_listens():
    events = Events()
    events.tell("before")
    early = events.listen()
    events.tell("first", path="x")
    late = events.listen()
    events.tell("second")
    assert [told["event"] for told in read_all(early)] == ["first", "second"]
    assert [told["event"] for told in read_all(late, size=1)] == ["second"]
    assert early.take(100) is None


def test_of_a_reader_who_does_not_keep_up_the_oldest_lines_are_dropped_and_counted():
    events = Events()
    slow = events.listen()
    events.tell("number", number=-1)
    begun = slow.take(5)
    for number in range(10_005):
        events.tell("number", number=number)
    rest = slow.take(1 << 30)
    told = [json.loads(line) for line in (begun + rest).splitlines()]
    assert told[0]["number"] == -1, "the line it had begun is whole"
    assert (told[1]["event"], told[1]["lines"]) == ("lost", 5)
    assert [one["number"] for one in told[2:]] == list(range(5, 10_005))


def test_who_has_gone_is_forgotten():
    events = Events()
    stream = events.listen()
    assert events.is_heard
    del stream
    assert not events.is_heard
