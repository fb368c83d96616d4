"""The circuit breaker, and how long the S3 driver waits for whom."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from swampfs.backends.circuit import CircuitStore
from swampfs.backends.retry import RetryingStore
from swampfs.backends.s3_wire import Key, Unanswered, Wire
from swampfs.errors import AbsentError, CircuitOpenError, StoreBusyError, StoreUnreachableError
from swampfs.testing.fault_proxy import Fault, FaultProxy
from swampfs.testing.faults import Fault as StoreFault
from swampfs.testing.faults import FaultyStore
from swampfs.testing.memory import MemoryStore
from tests.harness import wait_for
from tests.seaweed import ACCESS_KEY, SECRET_KEY


class Link:
    """A network that is up or down, as a driver sees it."""

    def __init__(self):
        self.is_up, self.silent, self.ended = True, 0.0, []

    def probe(self, timeout_s):
        if not self.is_up:
            raise StoreUnreachableError("no answer")

    def silent_s(self):
        return self.silent

    def end_silent(self, since):
        self.ended.append(since)


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def faulty():
    store = MemoryStore()
    store.put("here", b"1")
    return FaultyStore(store)


@pytest.fixture
def circuit(faulty, link):
    return CircuitStore(faulty, link)


def fail(circuit, faulty, times):
    faulty.faults.append(StoreFault("head", "here", times=times))
    for _ in range(times):
        with pytest.raises(StoreUnreachableError):
            circuit.head("here")


def test_failures_alone_open_nothing(circuit, faulty, tmp_path):
    fail(circuit, faulty, 2)
    assert not circuit.is_probe_due()
    fail(circuit, faulty, 1)
    assert circuit.is_probe_due()
    assert not circuit.probe(), "nothing was wrong with the store, so nothing is over"
    assert circuit.open_since is None and not circuit.is_probe_due()
    circuit.download("here", str(tmp_path / "x"))


def test_an_answer_in_between_starts_the_count_anew(circuit, faulty):
    fail(circuit, faulty, 2)
    with pytest.raises(AbsentError):  # a refusal is an answer
        circuit.head("not here")
    fail(circuit, faulty, 2)
    assert not circuit.is_probe_due()


def test_while_it_is_open_downloads_fail_at_once_and_the_rest_still_asks(circuit, faulty, link, tmp_path):
    fail(circuit, faulty, 3)
    link.is_up = False
    assert not circuit.probe()
    with pytest.raises(CircuitOpenError, match="has not answered for"):
        circuit.download("here", str(tmp_path / "x"))
    assert circuit.is_probe_due()
    assert circuit.head("here").size == 1, "locks and commits ask"
    assert circuit.open_since is None, "and an answer is an answer"
    link.is_up = True
    assert circuit.is_probe_due() and circuit.probe(), "that the outage is over is said once, by a probe"
    assert not circuit.is_probe_due()


def test_who_waited_when_an_outage_began_waits_for_its_end_and_who_comes_during_it_does_not(
    circuit, faulty, link, tmp_path, monkeypatch
):
    retrying, download = RetryingStore(circuit, first_pause_s=0.02), faulty.download

    def break_off(key, target):
        monkeypatch.setattr(faulty, "download", download)
        link.is_up = False
        assert not circuit.probe()
        raise StoreUnreachableError("the connection broke")

    def come_back():
        link.is_up = True
        faulty.faults = [StoreFault("download", "here", error=StoreBusyError("503"))]  # all come at once
        circuit.probe()

    monkeypatch.setattr(faulty, "download", break_off)
    answers = []
    first = threading.Thread(target=lambda: answers.append(retrying.download("here", str(tmp_path / "x"))))
    first.start()
    wait_for(lambda: circuit.open_since is not None, "the outage is known")
    with pytest.raises(CircuitOpenError):
        retrying.download("here", str(tmp_path / "y"))
    threading.Timer(0.2, come_back).start()  # after more pauses than there are attempts
    first.join(10)
    assert [info.size for info in answers] == [1]


def test_a_probe_that_is_answered_ends_what_has_waited_since_before(circuit, link, tmp_path):
    link.is_up = False
    circuit.probe()
    last_silence = time.monotonic()
    circuit.probe()
    link.is_up = True
    assert circuit.probe()
    assert len(link.ended) == 1 and link.ended[0] >= last_silence
    circuit.download("here", str(tmp_path / "x"))


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


def ends(circuit, link, clock, seconds):
    """When requests were ended, looking each second."""
    began, found = clock.now, []
    while clock.now < began + seconds:
        before = len(link.ended)
        if circuit.is_probe_due():
            assert not circuit.probe()
        if len(link.ended) > before:
            found.append(clock.now - began)
        clock.now += 1
    return found


def test_silent_requests_to_a_store_that_answers_others_are_ended_but_not_again_and_again(circuit, link, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("swampfs.backends.circuit.time", clock)
    link.silent = 6.0
    assert ends(circuit, link, clock, 5) == [0], "most likely a connection that is no more"
    link.silent = 0.0
    assert ends(circuit, link, clock, 15) == []
    link.silent = 6.0
    assert ends(circuit, link, clock, 100) == [0, 11, 32, 73], "or the store is slow: more and more in peace, then"


# --- the driver ---------------------------------------------------------------------------------------------


class Answering(threading.Thread):
    """A server that writes pieces of an answer at intervals, to each that connects."""

    def __init__(self, pieces, pause_s):
        super().__init__(daemon=True)
        self._pieces, self._pause_s = pieces, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/bucket"
        self.start()

    def run(self):
        connection, _ = self._listener.accept()
        with connection, self._listener:
            connection.recv(65536)
            for piece in self._pieces:
                time.sleep(self._pause_s)
                try:
                    connection.sendall(piece)
                except OSError:
                    return


def wire(url, timeout_s):
    return Wire(url, "us-east-1", lambda: Key("a", "s", ""), timeout_s)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"


@pytest.mark.parametrize("what", ["body", "headers"])
def test_an_answer_that_dribbles_ends_by_its_pace(what):
    whole = HEAD % 1000 + b"x" * 1000 if what == "body" else b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1000
    server = Answering([whole[at : at + 1] for at in range(len(whole))], 0.02)
    began = time.monotonic()
    with pytest.raises(Unanswered) as failure:
        wire(server.url, 0.5).get("key", {})
    assert isinstance(failure.value.__cause__, TimeoutError)
    assert 0.4 < time.monotonic() - began < 5, "its thousand bytes would take 20 s"


def test_a_large_answer_may_take_longer_than_the_timeout():
    piece = b"x" * 20_000
    server = Answering([HEAD % 200_000, *[piece] * 10], 0.1)  # 200 kB a second
    assert wire(server.url, 0.5).get("key", {}).body == piece * 10


def get_twice(reader, key):
    """The connection that was kept may be no more, as with any change of the proxy's."""
    with contextlib.suppress(Unanswered):
        reader.get(key, {})
    return reader.get(key, {})


def test_a_body_that_is_not_what_was_put_is_no_answer(server):
    client = server.client()
    for name, body in (("a", b"first"), ("b", b"second"), ("large", b"x" * (20 << 20))):
        client.put_object(Bucket="ready", Key=f"hashed/{name}", Body=body)
    proxy = FaultProxy(server.endpoint)
    try:
        reader = Wire(f"{proxy.url}/ready", "us-east-1", lambda: Key(ACCESS_KEY, SECRET_KEY, ""), 10.0)
        assert reader.get("hashed/a", {}).body == b"first"
        assert len(reader.get("hashed/large", {}).body) == 20 << 20
        for fault in (Fault.FLIPPED, Fault.SHORTENED):
            proxy.set(fault)
            with pytest.raises(Unanswered, match="does not have the hash"):
                get_twice(reader, "hashed/b")
        proxy.set(None)
        assert get_twice(reader, "hashed/b").body == b"second"
    finally:
        proxy.close()


def test_a_request_on_a_connection_the_network_forgot_is_ended_when_the_store_is_back(server):
    proxy = FaultProxy(server.endpoint)
    try:
        waiting = wire(f"{proxy.url}/ready", 60.0)
        assert waiting.silent_s() == 0.0
        proxy.set(Fault.HALF_OPEN)
        failures = []

        def ask():
            try:
                waiting.head_bucket()
            except Unanswered as error:
                failures.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(Unanswered):
            waiting.probe(0.3)
        silent_at = time.monotonic()
        assert waiting.silent_s() >= 0.29
        proxy.set(None)
        assert waiting.probe(5.0).status in (200, 403)
        assert waiting.head_bucket().status in (200, 403), "on a connection of its own"
        assert asking.is_alive()
        waiting.end_silent(silent_at)
        asking.join(5)
        assert len(failures) == 1
        assert waiting.silent_s() == 0.0
    finally:
        proxy.close()
