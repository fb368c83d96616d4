"""``swampfs explain``: why the last operation on a path failed, since when, and what to do now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from swampfs.cli.control import ask, by_mount
from swampfs.cli.words import FILE_NAME, printable

_STEPS = {
    "EBUSY": "another machine holds the lock: wait and try again; `swampfs lock status` says who, and "
    "`swampfs lock release --force` ends the lock of a machine that is gone",
    "EACCES": "the datastore refuses: renew credentials, or compare its policy with docs/security.md",
    "ETIMEDOUT": "the datastore did not answer in time: look at endpoint and network; it goes on when it does",
    "EIO": "what the datastore holds is not what its index says: its writer is at it, or died; `swampfs doctor` looks",
    "ENOENT": "its content is gone from the datastore: write it anew, or remove it",
    "ESTALE": "another machine replaced the file while it was open: open it again",
    "ENOSPC": "the disk of the state directory is full: make room there, or `swampfs flush` and `swampfs evict`",
    "EROFS": "mount it without --read-only",
    "ENAMETOOLONG": "use a shorter name: a path of a datastore has at most 1024 bytes",
    "EILSEQ": "use a name in UTF-8: the index is JSON",
    "EINVAL": "use another name: a datastore cannot have this one",
}


@click.command()
@click.argument("path", type=FILE_NAME)
@click.option("--json", "as_json", is_flag=True, help="Every fact, as JSON.")
def explain(path: str, as_json: bool) -> None:
    """Tell why the last operation on a path failed, since when, and what to do now.

    \b
    Example: swampfs explain ~/repo/.swamp/data/aws/ec2/vpc/1/raw
    """
    ((registration, relatives),) = by_mount([path]).items()
    answer = ask(registration, {"cmd": "explain", "path": relatives[0]})
    answer["now"] = list(steps(answer))
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    lines = [f"{answer['path'] or '.'}: {_headline(answer)}"]
    failure = answer["failure"]
    if failure is not None:
        again = f", {failure['times']} times since {failure['since']}" if failure["times"] > 1 else ""
        lines += [f"  when    {failure['at']}{again}", f"  why     {failure['why']}"]
    for text in (*lines, *(f"  now     {step}" for step in answer["now"])):
        click.echo(printable(text))


def _headline(facts: dict[str, Any]) -> str:
    failure = facts["failure"]
    if "impossible" in facts:
        return str(facts["impossible"])
    if failure is not None:
        over = ", and was done since" if facts["isOver"] else ""
        return f"{failure['operation']} failed: {failure['errno']}{over}"
    if facts["isLocal"]:
        return "nothing failed lately; it is of this machine only, and never published"
    info = facts["info"]
    state = "is not there" if info is None else f"is here ({info.get('state') or info['kind']})"
    return f"nothing failed lately; it {state}"


def steps(facts: dict[str, Any]) -> Iterator[str]:
    """What is in the way now, each with the next step; one line if nothing is."""
    if "impossible" in facts:
        yield _STEPS["EINVAL"]
        return
    told = False
    for step in (*_of_content(facts), *_of_change(facts)):
        told = True
        yield step
    failure = None if facts["isOver"] else facts["failure"]
    if failure is not None and failure["errno"] in _STEPS and not told:
        yield _STEPS[failure["errno"]]
    elif not told:
        yield "nothing is in the way" if failure is None else "try again; should it fail again, see `swampfs status`"


def _of_content(facts: dict[str, Any]) -> Iterator[str]:
    if facts["unread"]:
        yield f"its content could not be read: {facts['unread']}"
    if facts["offline"]:
        yield "the datastore does not answer: what is here can be read, changes are queued; it goes on by itself"
    elif facts["refreshError"]:
        yield f"the mount cannot see what others do: {facts['refreshError']}"
    for detail in facts["findings"]:
        yield f"its index entry: {detail}"
    if facts["conflicts"]:
        yield f"{facts['conflicts']} version(s) of this machine were kept aside: `swampfs conflicts list`"
    if facts["readOnly"] and facts["failure"] and facts["failure"]["errno"] == "EROFS":
        yield "the mount is read-only: mount it without --read-only"


def _of_change(facts: dict[str, Any]) -> Iterator[str]:
    """Of a change that is not in the datastore yet."""
    for holder in facts["lockHolders"]:
        if holder["state"] == "waiting" and holder["by"]:
            who = f"{holder['by']} (pid {holder['pid']} on {holder['hostname']})"
            yield f"{facts['lock']} is held by {who}: wait for it"
    if facts["change"] is None:
        return
    if facts["isOpen"]:
        yield "it is changed and still open for writing: it is pushed when it is closed (`fuser -v`)"
    elif facts["heldBack"]:
        yield f"it is changed, and pushed when {facts['lock']} is given back"
    elif facts["waitsForLock"]:
        yield f"it is changed, and pushed when {facts['waitsForLock']}, which another machine holds, is free"
    elif facts["pushError"]:
        yield f"it is changed, and pushes fail at present: {facts['pushError']}"
    else:
        yield "it is changed, and will be pushed in a moment; `swampfs flush` waits for that"
