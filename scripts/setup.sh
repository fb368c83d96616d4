# Sourced by the other scripts: system packages, a virtual environment, and the project in it.
# Idempotent and quick when everything is there. Sets VENV and PYTHON.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${SWAMPFS_VENV:-$ROOT/.venv}"

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null 2>&1; then sudo "$@"
    else die "needs root to run: $* — run as root, or install sudo"
    fi
}

need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ "${#missing[@]}" = 0 ] && return
    command -v apt-get >/dev/null 2>&1 || die "install these packages first: ${missing[*]}"
    say "installing: ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
}

find_python() {
    local candidate
    for candidate in "${SWAMPFS_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# A Python with venv, and the headers that pyfuse3 is compiled with.
need_python() {
    find_python >/dev/null || need_packages python3 python3-venv
    BASE_PYTHON="$(find_python)" || die "needs Python 3.11 or newer with venv; set SWAMPFS_PYTHON to one"
    "$BASE_PYTHON" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
        || need_packages python3-dev
}

# The stamp changes with pyproject.toml, so a pull that adds a dependency installs it.
install_project() { # extras, "core" for none
    local stamp="$VENV/.swampfs-$1" wanted spec="$ROOT"
    [ "$1" = core ] || spec="$ROOT[$1]"
    wanted="$(sha256sum "$ROOT/pyproject.toml" | cut -d' ' -f1)"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    [ -x "$VENV/bin/python" ] || "$BASE_PYTHON" -m venv "$VENV"
    say "installing swampfs[$1] into $VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e "$spec" 2> >(grep -v '^WARNING: Location' >&2)
    printf '%s' "$wanted" > "$stamp"
}

setup() { # extras
    need_packages fuse3 libfuse3-dev pkg-config gcc
    # Tests give machines wrong clocks and networks of their own.
    [ "${1:-}" != dev ] || need_packages faketime iproute2
    need_python
    [ -e /dev/fuse ] || as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || die "there is no /dev/fuse: load the kernel's fuse module, or give the container the device"
    install_project "$1"
    PYTHON="$VENV/bin/python"
}
