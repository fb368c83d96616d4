"""Why an operation failed is noted; to note it must not need what it failed for."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from swampfs.fs.failures import Failures
from swampfs.fs.inodes import Inodes


class Unreadable:
    def node(self, ino):
        raise sqlite3.DatabaseError("database disk image is malformed")


@pytest.mark.parametrize("error", [None, sqlite3.DatabaseError("malformed"), OSError(errno.EIO, "bad disk")])
def test_a_catalog_that_cannot_be_read_makes_no_second_error(error):
    failures = Failures(Unreadable(), Inodes())
    failures.note("mkdir", 1, b"name", errno.EIO, error)
    assert failures.recent() == []
