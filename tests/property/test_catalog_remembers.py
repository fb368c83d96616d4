"""What the catalog remembers of what it read and wrote is at all times what is in its database."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swampfs.names import RelPath
from swampfs.records import Change, Kind, Residency
from swampfs.state.catalog import ROOT_INO, Catalog
from swampfs.state.rows import BY_INODE, BY_NAME, BY_PATH, node_of

NAMES = ["a", "b", "d", "d/a", "d/b", "e", "e/a"]
ANY = st.sampled_from(NAMES)
CHANGES = st.builds(
    Change,
    mode=st.none() | st.integers(0, 0o777),
    uid=st.none() | st.integers(0, 9),
    gid=st.none() | st.integers(0, 9),
    size=st.none(),
    mtime_ns=st.none() | st.integers(0, 10**18),
    atime_ns=st.none() | st.integers(0, 10**18),
)


class Remembering(RuleBasedStateMachine):
    """Every way a row is written, between reads in every way a row is read."""

    @initialize()
    def open(self):
        self.catalog = Catalog(":memory:")
        self.stat = os.stat(__file__)

    def teardown(self):
        self.catalog.close()

    def read(self, query, *key):
        row = self.catalog.db.execute(query, key).fetchone()
        return None if row is None else node_of(row)

    def inodes(self):
        return [ino for (ino,) in self.catalog.db.execute("SELECT ino FROM node ORDER BY ino")]

    @rule(path=ANY, kind=st.sampled_from([Kind.FILE, Kind.DIRECTORY]))
    def add(self, path, kind):
        parent = self.catalog.at(path.rpartition("/")[0])
        if parent is not None and parent.is_dir and self.catalog.at(path) is None:
            made = self.catalog.add(RelPath(path), kind, mode=0o644)
            assert made == self.read(BY_PATH, path)

    @rule(path=ANY, by_user=st.booleans())
    def remove(self, path, by_user):
        node = self.catalog.at(path)
        if node is not None and not self.catalog.has_children(node.row):
            self.catalog.remove(node, by_user=by_user)

    @rule(path=ANY, name=ANY)
    def link(self, path, name):
        node, parent = self.catalog.at(path), self.catalog.at(name.rpartition("/")[0])
        if node and not node.is_dir and parent and parent.is_dir and self.catalog.at(name) is None:
            self.catalog.add_link(node, RelPath(name), Residency.DIRTY)

    @rule(path=ANY, name=ANY)
    def move(self, path, name):
        node, parent = self.catalog.at(path), self.catalog.at(name.rpartition("/")[0])
        if node and parent and parent.is_dir and not f"{name}/".startswith(f"{path}/") and not self.catalog.at(name):
            self.catalog.move(node, RelPath(name))

    @rule(path=ANY, change=CHANGES, is_written=st.booleans(), fails=st.booleans())
    def change(self, path, change, is_written, fails):
        node = self.catalog.at(path)
        if node is None:
            return
        with contextlib.suppress(ZeroDivisionError), self.catalog.transaction():
            self.catalog.set_attributes(node.ino, change, self.stat if is_written else None)
            assert self.catalog.node(node.ino) == self.read(BY_INODE, node.ino)
            if fails:
                raise ZeroDivisionError

    @rule(path=ANY)
    def write(self, path):
        node = self.catalog.at(path)
        if node is not None and not node.is_dir:
            self.catalog.set_content(node.ino, self.stat)

    @rule(path=ANY, residency=st.sampled_from(list(Residency)))
    def move_content(self, path, residency):
        node = self.catalog.at(path)
        if node is not None and not node.is_dir:
            self.catalog.set_residency(node.ino, residency)
            if residency is Residency.STUB and node.links == 1:
                self.catalog.evicted(node.ino)

    @rule(path=ANY)
    def unpublish(self, path):
        self.catalog.unpublish(RelPath(path))

    @rule()
    def touch_the_root(self):
        self.catalog.touch(ROOT_INO, 5)

    @precondition(lambda self: hasattr(self, "catalog"))
    @invariant()
    def what_it_says_is_what_is_there(self):
        for path in NAMES:
            assert self.catalog.at(path) == self.read(BY_PATH, path)
        for ino in self.inodes():
            node = self.read(BY_INODE, ino)
            assert self.catalog.node(ino) == node
            assert self.catalog.child(node.parent, node.name) == self.read(BY_NAME, node.parent, node.name)
            clean = node.kind is Kind.FILE and node.residency is Residency.CLEAN and node.links == 1
            assert self.catalog.clean_content(ino) == ((node.path, node.size) if clean else None)


Remembering.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestRemembering = Remembering.TestCase


@pytest.mark.parametrize(
    "look",
    [
        lambda catalog, ino: catalog.node(ino),
        lambda catalog, ino: catalog.child(ROOT_INO, f"f{ino}"),
        lambda catalog, ino: catalog.clean_content(ino),
    ],
    ids=["attributes", "name", "content"],
)
def test_what_is_remembered_is_bounded(asked, monkeypatch, look):
    monkeypatch.setattr("swampfs.state.rows._MOST_KNOWN", 20)
    catalog, said = asked
    first, *others = [catalog.add(RelPath(f"f{number}"), Kind.FILE, mode=0o644).ino for number in range(3, 53)]
    for ino in (first, first, *others, first):
        said.clear()
        look(catalog, ino)
    assert said == ["SELECT"], "it was forgotten"


@pytest.fixture
def asked():
    """A catalog with a directory, and what it asks its database."""
    catalog = Catalog(":memory:")
    catalog.add(RelPath("d"), Kind.DIRECTORY, mode=0o755)
    said = []
    catalog.db.set_trace_callback(lambda statement: said.append(statement.split()[0]))
    yield catalog, said
    catalog.close()


def test_a_file_that_is_made_and_given_its_attributes_is_read_once(asked):
    """As tar does: look the name up, make it, ask for its directory, then owner, mode and times, each answered."""
    catalog, said = asked
    directory = catalog.at("d")
    for name in ("first", "second"):
        said.clear()
        assert catalog.child(directory.ino, name) is None
        node = catalog.add(RelPath(f"d/{name}"), Kind.FILE, mode=0o644)
        for change in (Change(uid=1, gid=1), Change(mode=0o600), Change(mtime_ns=7, atime_ns=7)):
            assert catalog.node(directory.ino).links == 1
            catalog.set_attributes(node.ino, change)
            assert catalog.node(node.ino) == catalog.at(f"d/{name}") == catalog.child(directory.ino, name)
    assert (said.count("SELECT"), said.count("UPDATE")) == (1, 4)  # the name; the directory's time, and three changes
