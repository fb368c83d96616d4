"""The one exception tree.

What a failure means to each audience — the kernel (``errno``), the shell (``exit_code``), the retry loop
(``retryable``) and the operator (``remedy``) — is a class attribute, so no code ever reads a message to decide.
Backends translate their SDK's errors into these, once, at their edge (``design/style.md`` 11).
"""

from __future__ import annotations

import errno as _errno
from typing import Any

EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_MOUNT = 32
EXIT_LOCK_TIMEOUT = 75


class SwampfsError(Exception):
    """Root of the tree. The text says what failed, on what and why; ``remedy`` says what to do now."""

    errno: int = _errno.EIO
    exit_code: int = EXIT_SYSTEM
    retryable: bool = False
    remedy: str = ""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy

    def line(self) -> str:
        """The one line an operator sees: the message, then the next step."""
        text = " ".join(str(self).split())
        return f"{text} — {self.remedy}" if self.remedy else text


# --- the user's input ------------------------------------------------------------------------------------


class UsageError(SwampfsError):
    errno = _errno.EINVAL
    exit_code = EXIT_USAGE


class SettingsError(UsageError):
    """A flag, environment variable, URL or ``.swamp.yaml`` that cannot be used."""


class DatastoreTypeError(UsageError):
    """A datastore type that cannot be registered or is not known."""


class NamespaceError(UsageError):
    """A namespace that may not be used: taken by another repository, or not the one a service is bound to."""


class AbortedError(SwampfsError):
    """The caller's signal was raised. Nothing is rolled back; what was marked dirty still is (spec §10.7)."""

    errno = _errno.EINTR


class HostileNameError(SwampfsError):
    """A name that no file system path may carry (``..``, absolute, NUL, too long)."""

    errno = _errno.EINVAL
    exit_code = EXIT_USAGE


class NameTooLongError(HostileNameError):
    errno = _errno.ENAMETOOLONG


# --- this machine ----------------------------------------------------------------------------------------


class MountError(SwampfsError):
    exit_code = EXIT_MOUNT


class StateBusyError(MountError):
    """Another process owns the state directory."""

    errno = _errno.EBUSY
    remedy = "use that mount, unmount it first, or pass another --state-dir"


class StateError(MountError):
    """The state directory cannot be used right now: full disk, permissions. Nothing in it is touched."""

    remedy = "make room or correct the permissions, then mount again"


class NotMountedError(MountError):
    errno = _errno.ENOENT
    exit_code = EXIT_USAGE
    remedy = "see `findmnt -t fuse.swampfs` for what is mounted"


class CacheError(SwampfsError):
    """The library's cache directory cannot be used right now: full disk, permissions, a locked database."""

    remedy = "make room, or correct the cache directory's permissions, then run it again: nothing was lost"


class SyncTimeoutError(SwampfsError):
    """One direction of a sync took longer than it may. What was transferred stays, and what is marked stays marked."""

    errno = _errno.ETIMEDOUT
    retryable = True
    remedy = "run it again: it goes on where it stopped; --timeout gives it longer"


class SyncNotSupportedError(UsageError):
    """A datastore that is used in place."""


class PushPendingError(SwampfsError):
    """A wait for pushes ended before everything was committed. Nothing is lost: it is journaled."""

    errno = _errno.ETIMEDOUT
    retryable = True
    remedy = "see `swampfs status`; the changes are journaled and pushed when the datastore answers"


# --- the file system -------------------------------------------------------------------------------------


class FileError(SwampfsError):
    """A system call's answer, raised by ``fs/`` so that only ``fuse/`` knows errno numbers' transport."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"{what}: {_errno.errorcode.get(number, number)}")
        self.errno = number


class ReadOnlyError(SwampfsError):
    errno = _errno.EROFS


# --- the datastore ---------------------------------------------------------------------------------------


class StoreError(SwampfsError):
    """An operation on the datastore failed; the base class is "the store said no".

    ``http_status``, ``code``, ``request_id`` and ``body_preview`` are what the service answered, where it did
    (spec §10.2); no code decides by them.
    """

    http_status: int | None = None
    code: str = ""
    request_id: str = ""
    body_preview: str = ""


class AbsentError(StoreError):
    """A definite 404 for one object. Never raised for a bucket, a timeout or a refusal."""

    errno = _errno.ENOENT
    retried: bool = False
    """An earlier attempt of the same call got no answer: it may be what removed the object."""


class BucketMissingError(StoreError):
    errno = _errno.ENOENT
    remedy = "check the bucket's name, region and endpoint, or create it"


class AccessDeniedError(StoreError):
    errno = _errno.EACCES
    remedy = "check the credentials (environment, profile, instance role) and the bucket's policy"


class CredentialsError(AccessDeniedError):
    """There are no usable credentials, or they have expired."""


class PreconditionError(StoreError):
    """The object is not in the state the request asked for (412)."""

    errno = _errno.EEXIST
    retried: bool = False
    """An earlier attempt of the same call got no answer: it may be what changed the object."""


class ConflictingWriteError(StoreError):
    """Another conditional write of the same key is under way (409); it decides, then we ask again."""

    errno = _errno.EBUSY
    retryable = True


class StoreUnreachableError(StoreError):
    """No answer: refused, unresolved, reset or timed out."""

    errno = _errno.ETIMEDOUT
    retryable = True
    remedy = "check the endpoint and the network; work goes on from local state meanwhile"


class CircuitOpenError(StoreUnreachableError):
    """Not asked: the store has not answered for a while, and no probe says that it is back."""

    retryable = False


class StoreBusyError(StoreError):
    """429 or 5xx."""

    retryable = True


class PreconditionsUnsupportedError(StoreError):
    """The store ignores conditional writes, so neither locks nor commits would be safe."""

    remedy = "mount with --read-only, or use a store that honours If-Match and If-None-Match"


class StoreFullError(StoreError):
    errno = _errno.ENOSPC


class TransferError(StoreError):
    """Some files of a batch failed (spec §10.2); ``failures`` has each with its reason."""

    retryable = True
    remedy = "nothing was lost: what was not transferred is still marked; run the same command again"

    def __init__(self, message: str, failures: dict[str, Exception]) -> None:
        super().__init__(message)
        self.failures = failures


class IntegrityError(StoreError):
    """Bytes that do not have the size and hash their index entry promises."""

    remedy = "the writer may be mid-push: try again; if it stays, push the file again from a machine that has it"


class IndexCorruptError(StoreError):
    remedy = "nothing was changed; run `swampfs doctor` or repair the index from a machine with a full cache"


class UnpartitionableError(IndexCorruptError):
    """Entries that have no shard, so that migrating would lose them (spec §8.8)."""

    remedy = "move or delete these files, then migrate again. Nothing was changed"


class IndexVersionError(IndexCorruptError):
    remedy = "this datastore was written by newer software; upgrade swampfs. Nothing was changed"


# --- locks -----------------------------------------------------------------------------------------------


class LockTimeoutError(SwampfsError):
    """Spec §9.2: names the key, the holder and how long we waited."""

    errno = _errno.EBUSY
    exit_code = EXIT_LOCK_TIMEOUT
    retryable = True
    remedy = "wait for the holder, or see `swampfs status`"

    def __init__(self, message: str, *, lock_key: str = "", holder: Any = None, waited_ms: int = 0) -> None:
        super().__init__(message)
        self.lock_key = lock_key
        self.holder = holder  # records.LockInfo, or None if it could not be read
        self.waited_ms = waited_ms


class LeaseLostError(SwampfsError):
    """Our lock was taken over; whatever it guarded must not be written (H18)."""

    errno = _errno.EIO
    retryable = True
