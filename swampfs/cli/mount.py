"""``swampfs mount``: settings from flags, environment and repository; in front or in the background."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import trio
from click.core import ParameterSource

from swampfs.cli import logs
from swampfs.cli.words import FILE_NAME
from swampfs.errors import EXIT_MOUNT, EXIT_SYSTEM, SettingsError, SwampfsError, UsageError
from swampfs.settings import (
    MARKER,
    Backend,
    Consistency,
    MountSettings,
    Repo,
    Source,
    duration_s,
    read_repo,
    resolve_source,
    size_bytes,
    tiers_of,
    user_data_dir,
    with_namespace,
)

_READY_FD = "SWAMPFS_READY_FD"
_IGNORED = (
    "rw auto noauto user nouser users owner group defaults _netdev nofail exec async relatime norelatime atime "
    "diratime nodiratime strictatime nostrictatime lazytime nolazytime suid nosuid dev nodev"
)
_IGNORED_OPTIONS = frozenset(_IGNORED.split())
"""Of mount(8): what it does itself, and what is so in any case. No program runs with other rights (nosuid, nodev)."""
_KERNEL_OPTIONS = ("noexec", "noatime")


def seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Option callback: ``500ms``, ``2s``, ``1m`` → seconds."""
    try:
        return duration_s(value)
    except SettingsError as error:
        raise click.BadParameter(error.line(), ctx, param) from None


def size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Option callback: ``500M``, ``10G`` → bytes."""
    try:
        return size_bytes(value)
    except SettingsError as error:
        raise click.BadParameter(error.line(), ctx, param) from None


def octal(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Option callback: ``022``, ``0o77`` → permission bits."""
    try:
        mask = int(value, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o777:
        raise click.BadParameter(f"{value!r} is no mask of permissions — write it like 022 or 077", ctx, param)
    return mask


@click.command()
@click.argument("arguments", type=FILE_NAME, nargs=-1, metavar="[SOURCE] [MOUNTPOINT]")
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.option("--read-only", is_flag=True, envvar="SWAMPFS_READ_ONLY", help="Refuse every change.")
@click.option("--namespace", envvar="SWAMPFS_NAMESPACE", help="Bind one namespace of the datastore.")
@click.option("--all-namespaces", is_flag=True, envvar="SWAMPFS_ALL_NAMESPACES",
              help="Show every namespace below its name; all but the bound one are read-only.")  # fmt: skip
@click.option("--state-dir", envvar="SWAMPFS_STATE_DIR", type=click.Path(path_type=Path),
              help="Where this machine keeps content, journal and catalog.")  # fmt: skip
@click.option("--cache-size", envvar="SWAMPFS_CACHE_SIZE", callback=size, default="10G", show_default=True,
              help="How much content this machine keeps; clean files nobody has open go.")  # fmt: skip
@click.option("--scrub", envvar="SWAMPFS_SCRUB", callback=seconds, default="24h", show_default=True,
              help="How often to verify what this machine keeps; 0 = never.")  # fmt: skip
@click.option("--refresh", envvar="SWAMPFS_REFRESH", callback=seconds, default="2s", show_default=True,
              help="How often to look for changes by others.")  # fmt: skip
@click.option("--push-delay", envvar="SWAMPFS_PUSH_DELAY", callback=seconds, default="2s", show_default=True,
              help="Quiet time of a model before its changes are pushed.")  # fmt: skip
@click.option("--timeout", envvar="SWAMPFS_TIMEOUT", callback=seconds, default="30s", show_default=True,
              help="Longest a file operation waits for the datastore.")  # fmt: skip
@click.option("--consistency", envvar="SWAMPFS_CONSISTENCY", default="bounded", show_default=True,
              type=click.Choice([kind.value for kind in Consistency]),
              help="close-to-open: ask for changes at each open, publish at each close.")  # fmt: skip
@click.option("--fsync", envvar="SWAMPFS_FSYNC", default="local", show_default=True,
              type=click.Choice(["local", "remote"]),
              help="What fsync(2) waits for: this machine's disk, or the datastore.")  # fmt: skip
@click.option("--prefetch", envvar="SWAMPFS_PREFETCH", default="on", show_default=True,
              type=click.Choice(["on", "off"]),
              help="Whether to fetch ahead of who opens one small file after another.")  # fmt: skip
@click.option("--fast-lane", envvar="SWAMPFS_FAST_LANE", default="on", show_default=True,
              type=click.Choice(["on", "off"]),
              help="Whether what needs no wait is answered before pyfuse3 sees it.")  # fmt: skip
@click.option("--passthrough", envvar="SWAMPFS_PASSTHROUGH", default="on", show_default=True,
              type=click.Choice(["on", "off"]),
              help="Whether the kernel reads large local files by itself, where it can (Linux 6.9, root).")  # fmt: skip
@click.option("--writeback-cache", envvar="SWAMPFS_WRITEBACK_CACHE", default="off", show_default=True,
              type=click.Choice(["on", "off"]),
              help="Whether the kernel collects what is written to a file until its close or fsync.")  # fmt: skip
@click.option("--lock-ttl", envvar="SWAMPFS_LOCK_TTL", callback=seconds, default="30s", show_default=True,
              help="How long a lock of this mount outlives it if it dies.")  # fmt: skip
@click.option("--offline", envvar="SWAMPFS_OFFLINE", type=click.Choice(["queue", "fail"]), default="queue",
              show_default=True, help="Whether changes are accepted while the datastore is out of reach.")  # fmt: skip
@click.option("--uid", envvar="SWAMPFS_UID", type=int, help="Owner of files that have none.")
@click.option("--gid", envvar="SWAMPFS_GID", type=int, help="Group of files that have none.")
@click.option("--umask", envvar="SWAMPFS_UMASK", callback=octal, default="000", show_default=True, metavar="OCTAL",
              help="Permissions nobody has here, whatever a mode says; 077 = only the owner.")  # fmt: skip
@click.option("--allow-other", is_flag=True, envvar="SWAMPFS_ALLOW_OTHER", help="Let other users in (mode bits apply).")
@click.option("--allow-root", is_flag=True, envvar="SWAMPFS_ALLOW_ROOT", help="Let root in.")
@click.option("--xattrs", is_flag=True, envvar="SWAMPFS_XATTRS",
              help="Answer user.swamp.state, sha256, version, model and error to getfattr(1).")  # fmt: skip
@click.option("-o", "options", multiple=True, metavar="K=V,…", help="The same settings in mount(8) form.")
@click.option("--metrics-port", envvar="SWAMPFS_METRICS_PORT", type=click.IntRange(1, 65535), metavar="PORT",
              help="Serve /metrics for Prometheus at this port of 127.0.0.1.")  # fmt: skip
@click.option("--fake", is_flag=True, hidden=True)
@click.option("--log-file", envvar="SWAMPFS_LOG_FILE", type=click.Path(path_type=Path),
              help="Log of a background mount.  [default: swampfs.log in the state directory]")  # fmt: skip
@click.option("--log-level", envvar="SWAMPFS_LOG_LEVEL", default="info", show_default=True,
              type=click.Choice(["debug", "info", "warning", "error"]), help="What is worth a line.")  # fmt: skip
@click.option("--log-format", envvar="SWAMPFS_LOG_FORMAT", default="text", show_default=True,
              type=click.Choice(["text", "json"]), help="json: an object per line.")  # fmt: skip
@click.option("--trace-file", envvar="SWAMPFS_TRACE_FILE", type=click.Path(),
              help="Append one JSON line per request to the datastore.")  # fmt: skip
@click.pass_context
def mount(ctx: click.Context, /, **flags: Any) -> None:
    """Mount a datastore.

    SOURCE is s3://bucket/prefix, file:///dir or a repository directory; without it, the repository of the current
    directory is mounted at its .swamp/.

    \b
    Example: swampfs mount s3://ops-runtime/team ~/repo/.swamp
    """
    _merge_options(ctx, flags)
    settings = _settings(flags, os.environ)
    if flags["fake"]:
        return
    ready_fd = os.environ.get(_READY_FD)
    if ready_fd is None and not flags["foreground"]:
        _in_background(settings, flags["log_file"])
        return
    logs.begin(flags["log_level"], flags["log_format"])
    if ready_fd is None:

        def on_ready() -> None:
            click.echo(f"mounted {settings.source.url} at {settings.mountpoint}", err=True)
            _tell_systemd(f"READY=1\nSTATUS={settings.source.url} at {settings.mountpoint}")

        _serve(settings, on_ready)
        _tell_systemd("STOPPING=1")
    else:
        _serve_for_parent(settings, int(ready_fd))


def _tell_systemd(state: str) -> None:
    """One datagram, if a service manager asked for it (``sd_notify(3)``)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def _serve(settings: MountSettings, on_ready: Any) -> None:
    """Run the mount; a failure to start ends with the mount exit code unless it has one of its own."""
    os.environ.pop(_READY_FD, None)
    try:
        from swampfs import mount as mounting
    except ImportError as error:
        if error.name != "pyfuse3":
            raise
        raise SettingsError(
            "the part that mounts is not installed: there is no pyfuse3",
            remedy="install fuse3 and libfuse3-dev, then `pip install 'swampfs[mount]'`",
        ) from None
    try:
        trio.run(mounting.run, settings, dict(os.environ), on_ready)
    except SwampfsError as error:
        if error.exit_code == EXIT_SYSTEM:
            error.exit_code = EXIT_MOUNT
        raise


# --- in the background ----------------------------------------------------------------------------------------


def _in_background(settings: MountSettings, log_file: Path | None) -> None:
    """Start the mount in a session of its own; return once it serves, or fail with its reason."""
    log_path = (log_file or settings.state_dir / "swampfs.log").absolute()
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = open(log_path, "ab")  # noqa: SIM115
    except OSError as error:
        raise SettingsError(f"{log_path} cannot be written: {error.strerror}", remedy="pass --log-file") from None
    reader, writer = os.pipe()
    with log, os.fdopen(reader, "rb") as pipe:
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "swampfs", *sys.argv[1:]],
            env={**os.environ, _READY_FD: str(writer)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        answer = pipe.read()
    if not answer:
        raise SwampfsError(f"the mount process ended with {child.wait()}", remedy=f"see {log_path}")
    verdict = json.loads(answer)
    if "error" in verdict:
        child.wait()
        click.echo(f"swampfs: {verdict['error']}", err=True)
        sys.exit(verdict["exitCode"])
    child.returncode = 0  # it lives on; nobody waits for it


def _serve_for_parent(settings: MountSettings, ready_fd: int) -> None:
    """The background process: say through the pipe how starting went, then serve."""

    def report(verdict: Mapping[str, Any]) -> None:
        os.write(ready_fd, json.dumps(verdict).encode())
        os.close(ready_fd)

    os.chdir("/")
    ready = False

    def on_ready() -> None:
        nonlocal ready
        ready = True
        report({"ready": True})

    try:
        _serve(settings, on_ready)
    except SwampfsError as error:
        if ready:
            raise
        report({"error": error.line(), "exitCode": error.exit_code})
        sys.exit(error.exit_code)


# --- settings -------------------------------------------------------------------------------------------------


def _merge_options(ctx: click.Context, flags: dict[str, Any]) -> None:
    """``-o k=v,…`` → flags; a flag given by name wins. Raises UsageError for an unknown key."""
    parameters = {param.name: param for param in ctx.command.params if isinstance(param, click.Option)}
    for group in flags.pop("options"):
        for word in filter(None, group.split(",")):
            key, has_value, value = word.partition("=")
            name = {"ro": "read_only"}.get(key, key.replace("-", "_"))
            if key in _IGNORED_OPTIONS or key.startswith(("x-", "comment")):
                continue
            if key in _KERNEL_OPTIONS:
                flags["kernel_options"] = (*flags.get("kernel_options", ()), key)
                continue
            if key == "remount":
                raise UsageError("a swampfs mount cannot be remounted", remedy="`swampfs umount` it and mount it anew")
            parameter = parameters.get(name)
            if parameter is None or name in ("options", "foreground", "fake"):
                raise UsageError(f"unknown mount option {key!r}", remedy="`swampfs mount --help` lists them")
            if has_value and (not value or '"' in value):
                raise UsageError(f"the mount option {key!r} has the value {value!r}", remedy="write it without quotes")
            if parameter.is_flag == bool(has_value):
                what = "takes no value" if parameter.is_flag else "needs a value"
                raise UsageError(f"the mount option {key!r} {what}")
            if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
                flags[name] = True if parameter.is_flag else parameter.process_value(ctx, value)


def _settings(flags: Mapping[str, Any], env: Mapping[str, str]) -> MountSettings:
    source, repo, mountpoint = _endpoints(flags["arguments"], env)
    if flags["namespace"]:
        source = with_namespace(source, flags["namespace"])
    if source.backend is Backend.S3 and source.endpoint is None:
        # Part of the datastore's identity: the same bucket name at two endpoints is two datastores.
        source = replace(source, endpoint=env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None)
    state_dir = flags["state_dir"] or user_data_dir(env) / "swampfs" / source.datastore_id
    for name in ("refresh", "timeout"):
        if flags[name] <= 0:
            raise UsageError(f"--{name} must be longer than 0")
    if flags["all_namespaces"]:
        _check_all_namespaces(source, repo, mountpoint)
    if flags["lock_ttl"] < 1:
        raise UsageError("--lock-ttl must be 1s or longer: it is renewed every third of it")
    return MountSettings(
        source=source,
        mountpoint=mountpoint,
        state_dir=Path(state_dir).absolute(),
        repo=repo,
        tiers=tiers_of(repo),
        all_namespaces=flags["all_namespaces"],
        cache_bytes=flags["cache_size"],
        scrub_s=flags["scrub"] or float("inf"),
        read_only=flags["read_only"],
        refresh_s=flags["refresh"],
        push_delay_s=flags["push_delay"],
        timeout_s=flags["timeout"],
        lock_ttl_s=flags["lock_ttl"],
        consistency=Consistency(flags["consistency"]),
        queue_offline=flags["offline"] == "queue",
        uid=os.getuid() if flags["uid"] is None else flags["uid"],
        gid=os.getgid() if flags["gid"] is None else flags["gid"],
        umask=flags["umask"],
        allow_other=flags["allow_other"],
        allow_root=flags["allow_root"],
        xattrs=flags["xattrs"],
        fsync_remote=flags["fsync"] == "remote",
        prefetch=flags["prefetch"] == "on",
        fast_lane=flags["fast_lane"] == "on",
        passthrough=flags["passthrough"] == "on",
        writeback_cache=flags["writeback_cache"] == "on",
        kernel_options=frozenset(flags.get("kernel_options", ())),
        metrics_port=flags["metrics_port"],
        trace_file=str(Path(flags["trace_file"]).absolute()) if flags["trace_file"] else None,
    )


def _check_all_namespaces(source: Source, repo: Repo | None, mountpoint: Path) -> None:
    if not source.namespace:
        raise UsageError("--all-namespaces needs one to be bound", remedy="add --namespace NAME")
    if repo is not None and mountpoint == repo.mountpoint:
        raise UsageError(
            f"{mountpoint} must be this repository's own namespace, not all of them",
            remedy="mount them in another directory",
        )


def _endpoints(arguments: tuple[str, ...], env: Mapping[str, str]) -> tuple[Source, Repo | None, Path]:
    """SOURCE and MOUNTPOINT from none, one or two arguments; the repo whose ``.swamp`` is mounted over, if it is."""
    if len(arguments) > 2:
        raise UsageError("too many arguments", remedy="write: swampfs mount [SOURCE] [MOUNTPOINT]")
    given_source = arguments[0] if len(arguments) == 2 else None
    given_mountpoint = arguments[-1] if arguments else None
    if len(arguments) == 1 and (Path(arguments[0]) / MARKER).exists():
        given_source, given_mountpoint = arguments[0], None  # a repository alone: at its own .swamp
    if given_mountpoint is not None and "://" in given_mountpoint:
        raise UsageError("there is no MOUNTPOINT", remedy=f"write: swampfs mount {given_mountpoint} DIRECTORY")
    source, repo = resolve_source(given_source, env, Path.cwd())
    if given_mountpoint is None:
        if repo is None:
            raise UsageError("there is no MOUNTPOINT")
        return source, repo, Path(os.path.realpath(repo.mountpoint))
    mountpoint = Path(os.path.realpath(given_mountpoint))
    if mountpoint.name == ".swamp" and (mountpoint.parent / MARKER).exists():
        repo = read_repo(mountpoint.parent)
    return source, replace(repo, directory=Path(os.path.realpath(repo.directory))) if repo else None, mountpoint
