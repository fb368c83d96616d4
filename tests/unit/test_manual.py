"""Manual pages and completion are made from the commands, and are those of these commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swampfs import __version__
from swampfs.cli.main import main
from swampfs.cli.manual import pages
from swampfs.cli.mount import mount

PAGES = Path(__file__).parents[2] / "docs/man"


def test_the_manual_pages_are_those_of_the_commands():
    made = pages(main, mount, __version__)
    assert {path.name: path.read_text() for path in PAGES.iterdir()} == made, "run scripts/man"


@pytest.mark.parametrize("page", sorted(PAGES.iterdir()), ids=lambda path: path.name)
def test_a_manual_page_is_read_without_complaint(page):
    if shutil.which("groff") is None:
        # It comes with man(1), which a small machine may do without: no page is read there.
        pytest.skip("this machine has no groff")
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    shown = re.sub(".\b", "", done.stdout)  # bold letters are struck twice
    assert "NAME" in shown
    assert "SEE ALSO" in shown


def complete(*words, shell="bash"):
    environment = {
        **os.environ, "_SWAMPFS_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    program = "import sys; sys.argv[0] = 'swampfs'; from swampfs.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_options_and_values_are_completed():
    assert complete("swampfs", "umo") == ["umount"]
    assert complete("swampfs", "lock", "") == ["release", "run", "status"]
    assert complete("swampfs", "mount", "--consistency", "") == ["bounded", "close-to-open"]
    assert "--json" in complete("swampfs", "status", "--j")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_it_can_read(shell, tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "swampfs", "completion", shell], capture_output=True, text=True, check=True
    ).stdout
    assert "_SWAMPFS_COMPLETE" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)
