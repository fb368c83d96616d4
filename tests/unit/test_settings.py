"""Where a datastore is: URLs, environment, ``.swamp.yaml``, in that order of their kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from swampfs.errors import SettingsError
from swampfs.settings import (
    Backend,
    Repo,
    duration_s,
    find_repo,
    read_repo,
    resolve_source,
    source_of_env,
    source_of_repo,
    source_of_url,
    tiers_of,
)


def write_repo(directory: Path, text: str) -> Repo:
    directory.mkdir(exist_ok=True)
    (directory / ".swamp.yaml").write_text(text)
    return read_repo(directory)


def test_urls_name_a_bucket_and_prefix_or_a_directory():
    source = source_of_url("s3://ops-runtime/team/a%20b")
    assert (source.backend, source.bucket, source.prefix) == (Backend.S3, "ops-runtime", "team/a b")
    assert source_of_url("file:///srv//swamp/").directory == "/srv/swamp"


def test_two_endpoints_and_namespaces_are_different_datastores():
    from dataclasses import replace

    base = source_of_url("s3://bucket/x")
    others = [replace(base, endpoint="http://one"), replace(base, namespace="infra"), source_of_url("s3://bucket/y")]
    assert len({source.datastore_id for source in (base, *others)}) == 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("filesystem:/srv/x", (Backend.FILESYSTEM, "/srv/x", "")),
        ("filesystem:$BASE/x", (Backend.FILESYSTEM, "/base/x", "")),
        ("filesystem:rel", (Backend.FILESYSTEM, "/repo/rel", "")),
        ("s3:bucket/some/prefix", (Backend.S3, "bucket", "some/prefix")),
        ('@swamp/s3-datastore:{"bucket":"bucket","prefix":"p"}', (Backend.S3, "bucket", "p")),
        ("s3://bucket/p", (Backend.S3, "bucket", "p")),
    ],
)
def test_the_environment_grammar(value, expected):
    source = source_of_env(value, {"BASE": "/base"}, Path("/repo"))
    assert (source.backend, source.bucket or source.directory, source.prefix) == expected


@pytest.mark.parametrize("value", ["nocolon", "@swamp/s3-datastore:{", "@swamp/s3-datastore:[]", "filesystem:$NONE/x",
                                   "@acme/x:{}", "@swamp/gcs-datastore:{}"])  # fmt: skip
def test_a_bad_environment_value_is_a_settings_error(value):
    with pytest.raises(SettingsError):
        source_of_env(value, {}, Path("/"))


def test_a_repository_names_its_datastore(tmp_path):
    text = (
        "repoId: r\ndatastore:\n  type: '@swamp/s3-datastore'\n  config: {bucket: bbb, prefix: p}\n  namespace: infra\n"
    )
    source = source_of_repo(write_repo(tmp_path, text), {})
    assert (source.bucket, source.prefix, source.namespace) == ("bbb", "p", "infra")
    legacy = write_repo(tmp_path, "datastore: {type: s3, bucket: bbb, region: eu-west-1, endpoint: 'http://x'}")
    assert source_of_repo(legacy, {}).endpoint == "http://x"
    assert source_of_repo(write_repo(tmp_path, "repoId: r"), {}).directory == str(tmp_path / ".swamp")
    home = write_repo(tmp_path, "datastore: {type: filesystem, path: '~/store'}")
    assert source_of_repo(home, {"HOME": "/home/ana"}).directory == "/home/ana/store"


def test_the_environment_wins_over_the_repository(tmp_path):
    write_repo(tmp_path, "datastore: {type: filesystem, path: /from/file}")
    source, repo = resolve_source(None, {"SWAMP_DATASTORE": "filesystem:/from/env"}, tmp_path)
    assert source.directory == "/from/env"
    assert repo is not None
    below = tmp_path / "sub"
    below.mkdir()
    assert resolve_source(None, {}, below)[0].directory == "/from/file"
    assert find_repo(Path("/")) is None


def test_directories_and_excludes_keep_tops_local(tmp_path):
    repo = write_repo(
        tmp_path, "datastore: {type: filesystem, path: /x, directories: [data], exclude: [outputs, 'data/*']}"
    )
    assert "outputs" in tiers_of(repo).kept_local
    assert "audit" in tiers_of(repo).kept_local
    assert "data" not in tiers_of(repo).kept_local
    assert tiers_of(None).kept_local == frozenset()


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("2s", 2), ("1m", 60), ("1h", 3600), ("3", 3)])
def test_durations(text, seconds):
    assert duration_s(text) == seconds
    with pytest.raises(SettingsError):
        duration_s(text + "x")
