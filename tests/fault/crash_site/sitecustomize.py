"""``kill -9`` at a named point of the program: put this directory on ``PYTHONPATH`` and name the point.

``SWAMPFS_TEST_CRASH`` is ``before|after MODULE:FUNCTION [WORD]``: the process dies as the function is called, or
returns, with arguments that mention the word, and leaves the file ``SWAMPFS_TEST_CRASHED``. Python imports this module
at its start, also in the mount's own process.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal


def _arm(when, where, word=""):
    module_name, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
    function = getattr(owner, name)

    def die(moment, arguments):
        if moment == when and word in " ".join(map(str, arguments)):
            os.close(os.open(os.environ["SWAMPFS_TEST_CRASHED"], os.O_CREAT | os.O_WRONLY))
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    def run(*args, **more):
        die("before", args)
        result = function(*args, **more)
        die("after", args)
        return result

    @functools.wraps(function)
    async def run_async(*args, **more):
        die("before", args)
        result = await function(*args, **more)
        die("after", args)
        return result

    setattr(owner, name, run_async if inspect.iscoroutinefunction(function) else run)


if "SWAMPFS_TEST_CRASH" in os.environ:
    _arm(*os.environ["SWAMPFS_TEST_CRASH"].split())
