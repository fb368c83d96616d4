"""Random shells on two machines against a dictionary: what a user did is what everybody ends up seeing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swampfs.errors import FileError
from swampfs.testing.memory import MemoryStore
from tests.datastores import check_bucket
from tests.engine import Store, load, machine

UUID = "7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
DIRECTORIES = ["audit", "files", "files/sub", f"data/test/{UUID}/n/1", f"data/test/{UUID}/n"]
NAMES = ["raw", "latest", "x", ".#scratch"]
PATHS = st.builds("{}/{}".format, st.sampled_from(DIRECTORIES), st.sampled_from(NAMES))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), PATHS, st.binary(max_size=8)),
        st.tuples(st.just("unlink"), PATHS),
        st.tuples(st.just("rename"), PATHS, PATHS),
        st.tuples(st.just("rename_dir"), st.sampled_from(["files/sub", f"data/test/{UUID}/n/1"]), st.just("moved")),
        st.tuples(st.just("push")),
        st.tuples(st.just("pull")),
        st.tuples(st.just("crash")),
    ),
    max_size=25,
)


async def step(node, model, op, *arguments):
    """One user action on the machine and on the model; both must agree on whether it can be done."""
    if op == "write":
        path, body = arguments
        await node.mkdirs(path.rpartition("/")[0])
        await node.write(path, body)
        model[path] = body
    elif op == "unlink":
        if arguments[0] in model:
            await node.unlink(arguments[0])
            del model[arguments[0]]
        else:
            with pytest.raises((FileError, FileNotFoundError)):
                await node.unlink(arguments[0])
    elif op == "rename" and arguments[0] in model:
        source, target = arguments
        await node.mkdirs(target.rpartition("/")[0])
        await node.rename(source, target)
        model[target] = model.pop(source)
    elif op == "rename_dir" and any(path.startswith(arguments[0] + "/") for path in model):
        source, target = arguments
        if any(path.startswith(target + "/") for path in model):
            return
        await node.rename(source, target)
        for path in [path for path in model if path.startswith(source + "/")]:
            model[target + path[len(source) :]] = model.pop(path)
    elif op == "push":
        await node.push()
    elif op == "pull":
        await node.pull()


async def check(node, model):
    assert node.names() == set(model)
    for path, body in model.items():
        assert await node.read(path) == body, path


@pytest.mark.parametrize("index", ["v1", "v2", "none"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_any_history_of_one_user_ends_the_same_everywhere(index, steps):
    async def main(home: Path) -> None:
        store = MemoryStore()
        model = {"audit/raw": b"1", f"data/test/{UUID}/n/1/raw": b"2", f"data/test/{UUID}/n/latest": b"1"}
        load(store, model, index)
        rest = list(steps)
        while True:
            async with machine(store, home / "a") as a:
                await check(a, model)
                while rest and rest[0][0] != "crash":
                    await step(a, model, *rest.pop(0))
                    assert a.names() == set(model)
                await check(a, model)
                if not rest:
                    await a.push()
                    assert a.sync.cache.conflicts() == []
                    break
                rest.pop(0)  # kill -9: leave without a push
        published = {path: body for path, body in model.items() if ".#" not in path}
        async with machine(store, home / "b") as b:
            await check(b, published)
        if store.objects:
            changed = any(key.startswith("_index/") for key in store.objects)
            if changed:
                assert check_bucket(Store(store), hashed=index != "none") == published

    with tempfile.TemporaryDirectory() as home:
        trio.run(main, Path(home))


@pytest.mark.parametrize("index", ["v1", "v2"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(st.tuples(st.sampled_from("ab"), STEPS), max_size=6))
def test_two_machines_that_take_turns_lose_nothing_and_converge(index, steps):
    """Each burst of changes ends with a push and everybody's pull: then no conflict may arise and all agree."""

    async def main(home: Path) -> None:
        store = MemoryStore()
        model: dict[str, bytes] = {"audit/raw": b"1", "files/x": b"2"}
        load(store, model, index)
        async with machine(store, home / "a") as a, machine(store, home / "b") as b:
            for name, burst in steps:
                node = a if name == "a" else b
                for action in burst:
                    if action[0] != "crash" and ".#" not in "".join(str(word) for word in action[1:]):
                        await step(node, model, *action)
                await node.push()
                await a.pull()
                await b.pull()
                await check(a, model)
                await check(b, model)
            assert a.sync.cache.conflicts() == b.sync.cache.conflicts() == []

    with tempfile.TemporaryDirectory() as home:
        trio.run(main, Path(home))
