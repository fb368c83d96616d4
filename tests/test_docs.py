"""The manual is tested: every guarantee names a test that exists, and every guarantee has one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
SEMANTICS = (ROOT / "docs/semantics.md").read_text()
SECURITY = (ROOT / "docs/security.md").read_text()


def test_every_guarantee_names_tests_that_exist():
    names = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert set(re.findall(r"`(test_\w+)`", SECURITY)) <= names
    for line in SEMANTICS.splitlines():
        if line.startswith("- "):
            named = re.findall(r"`(test_\w+)`", line)
            assert named, f"no test: {line}"
            assert set(named) <= names, set(named) - names


def test_every_link_in_the_manual_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


def test_every_command_in_the_readme_exists():
    from swampfs.cli.main import main

    used = set(
        re.findall(
            r"swampfs (mount|umount|status|flush|sync|migrate-index|doctor|version)\b", (ROOT / "README.md").read_text()
        )
    )
    assert used <= set(main.list_commands(click.Context(main)))


def test_commands_that_talk_to_a_mount_import_no_sdk():
    program = (
        "import click, sys; from swampfs.cli.main import main; context = click.Context(main);"
        "[main.get_command(context, name) for name in ('status', 'flush', 'umount', 'hydrate', 'conflicts')];"
        "print({'boto3', 'botocore', 'google', 'pyfuse3', 'requests'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_command_has_a_help_with_an_example():
    from swampfs.cli.main import main

    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        below = command.commands.values() if isinstance(command, click.Group) else [command]
        for one in below:
            assert one.help and "Example" in one.help, f"{name} {one.name}"


def test_every_invariant_and_every_hazard_of_the_format_has_its_test():
    names = {
        name
        for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "swampfs/testing").glob("*.py")]
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    found: dict[str, set[str]] = {}
    for number, tests in re.findall(r"^\| (H?\d+) \| (.*) \|$", (ROOT / "docs/formats.md").read_text(), re.MULTILINE):
        found[number] = set(re.findall(r"`(test_\w+)`", tests))
        assert found[number], number
        assert found[number] <= names, found[number] - names
    assert set(found) == {str(number) for number in range(1, 123)} | {f"H{number}" for number in range(1, 42)}
