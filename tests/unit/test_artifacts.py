"""What the artifact catalog shows, and what it makes of metadata as it is found (data-model spec §3, §5.4)."""

from __future__ import annotations

import json

import pytest
import yaml

from swampfs.artifacts import metadata
from swampfs.artifacts.cel import free_names, functions, parse
from swampfs.artifacts.predicate import Expression, Predicate
from swampfs.artifacts.query import Record, nothing, search, selected
from swampfs.errors import StateError, UsageError
from swampfs.state.artifacts import Artifacts, Document
from tests.artifacts import artifacts, content_of, database

PLACE = "data/aws/ec2/vpc/id/name"


@pytest.fixture
def known(tmp_path):
    made = Artifacts(str(tmp_path / "artifacts.db"))
    yield made
    made.close()


def document(version, *, lifecycle="", renamed_to="", step="", place=PLACE):
    body = {"id": "x", "name": "name", "version": version, "tags": {"modelName": "net"}}
    body |= {"ownerDefinition": {"stepName": step}, "lifecycle": lifecycle, "renamedTo": renamed_to}
    return metadata.parse(f"{place}/{version}", yaml.safe_dump(body).encode(), f"print {version}")


def shown(known, where="1"):
    return [(one.version, one.is_latest) for one in known.select(where, ())]


def test_the_highest_version_is_the_latest(known):
    known.put("", PLACE, [document(9), document(10), document(2)])
    assert sorted(shown(known)) == [(2, False), (9, False), (10, True)]


def test_each_step_has_a_latest_of_its_own(known):
    known.put("", PLACE, [document(1, step="a"), document(2, step="b"), document(3, step="a")], latest=3)
    assert shown(known, "is_latest = 1") == [(2, True), (3, True)]


@pytest.mark.parametrize(
    "tombstone", [document(3, lifecycle="deleted"), document(3, lifecycle="deleted", renamed_to="x")]
)
def test_a_name_whose_latest_is_a_tombstone_is_not_shown_at_all(known, tombstone):
    known.put("", PLACE, [document(1), document(2)], latest=2)
    known.put("", PLACE, [tombstone], latest=3)
    assert shown(known) == []
    known.put("", PLACE, [], gone=[f"{PLACE}/3"], latest=2)
    assert shown(known) == [(1, False), (2, True)]


def test_a_tombstone_that_is_history_is_left_out(known):
    known.put("", PLACE, [document(1), document(2, lifecycle="deleted"), document(3)], latest=3)
    assert shown(known) == [(1, False), (3, True)]


def test_a_marker_that_names_no_version_is_as_none(known):
    known.put("", PLACE, [document(1), document(2)], latest=7)
    assert shown(known) == [(1, False), (2, True)]


def test_tags_follow_what_is_written_over_a_version(known):
    first = document(1)
    for tags in ({"env": "prod", "a": "b"}, {"env": "lab"}):
        known.put("", PLACE, [first._replace(artifact=first.artifact._replace(tags=tags))])
    found = {text: len(list(search(known, Predicate(text)))) for text in ('tags.env == "prod"', 'tags.env == "lab"')}
    assert found == {'tags.env == "prod"': 0, 'tags.env == "lab"': 1}
    assert known.db.execute("SELECT count(*) FROM tagged").fetchone() == (1,)


def test_a_database_of_another_version_or_none_at_all_is_made_anew(tmp_path):
    path = tmp_path / "artifacts.db"
    made = database(path, list(artifacts(5, 2)))
    assert made.count() == 10
    made.db.execute("PRAGMA user_version = 77")
    made.close()
    again = Artifacts(str(path))
    assert again.count() == 0
    again.close()
    path.write_bytes(b"no database at all" * 1000)
    once_more = Artifacts(str(path))
    assert once_more.count() == 0
    once_more.close()


def test_a_reader_of_no_database_says_so(tmp_path):
    with pytest.raises(StateError, match="cannot be read"):
        Artifacts(str(tmp_path / "none.db"), read_only=True)


# --- metadata ------------------------------------------------------------------------------------------------


def test_values_are_the_words_that_were_written():
    body = b"""
id: 7f3e
contentType: text/plain
streaming: true
size: 812
createdAt: 2026-03-14T09:26:54.001Z
tags: {type: file, env: on, port: 0808, ratio: 1.10, nothing: null, modelName: net-eu}
ownerDefinition: {ownerType: manual, ownerRef: x, stepName: null}
"""
    found = metadata.parse(f"{PLACE}/3", body, "print").artifact
    assert found.tags == {
        "type": "file", "env": "on", "port": "0808", "ratio": "1.10", "nothing": "", "modelName": "net-eu",
    }  # fmt: skip
    assert (found.created_at, found.size, found.streaming) == ("2026-03-14T09:26:54.001Z", 812, True)
    assert (found.type_normalized, found.model_id, found.data_name, found.version) == ("aws/ec2/vpc", "id", "name", 3)
    assert found.place == PLACE


@pytest.mark.parametrize(
    "body",
    [b"", b"- a list", b"a: [", b"\xff\xfe", b"x" * (2 << 20), b"[" * 100_000, b"!!python/object/apply:os.system [ls]"],
    ids=["empty", "list", "cut", "not text", "long", "deep", "dangerous"],
)
def test_what_is_no_metadata_is_a_problem_and_no_failure(body):
    found = metadata.parse(f"{PLACE}/1", body, "print")
    assert found.artifact is None
    assert found.problem


@pytest.mark.parametrize(
    "line", ["size: !!float .inf", "createdAt: !!timestamp x", "streaming: !!bool x", "size: !!int ''", "size: 9e999"]
)
def test_a_tag_of_yaml_changes_nothing(line):
    found = metadata.parse(f"{PLACE}/1", f"id: x\ntags: {{type: x}}\n{line}\n".encode(), "print").artifact
    assert (found.data_type, found.size, found.streaming) == ("x", 0, False)


def test_a_merge_that_grows_is_merged_by_nobody():
    levels = [f"m{i}: &m{i} {{!!merge <<: [{','.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 30)]
    body = "\n".join(["id: x", "m0: &m0 {a: b}", *levels, "tags: {env: prod, <<: *m29}"])
    assert metadata.parse(f"{PLACE}/1", body.encode(), "print").artifact.tags == {"env": "prod", "<<": ""}


def test_a_text_has_no_end_within(known):
    body = b'{"id": "x", "tags": {"k": "a\\0b"}, "ownerDefinition": {"source": "a\\0b"}}'
    one = metadata.parse(f"{PLACE}/1", body, "print")
    known.put("", PLACE, [one])
    for text in ('source.endsWith("b")', 'tags.k > "a"', 'tags["k"].endsWith("b")'):
        assert len(list(search(known, Predicate(text)))) == 1


def test_versions_above_the_marker_are_not_finished(known):
    known.put("", PLACE, [document(1), document(2)], latest=1)
    assert shown(known) == [(1, True), (2, False)]
    known.put("", PLACE, [], latest=2)
    assert shown(known) == [(1, False), (2, True)]


def test_what_a_name_is_called_now_is_known(known):
    known.put("", PLACE, [document(1), document(2, lifecycle="deleted", renamed_to="new")], latest=2)
    assert known.renamed("model_name = ?", ("net",)) == "new"
    assert known.renamed("model_name = ?", ("other",)) is None


def test_a_change_that_fails_leaves_everything_as_it_was(known):
    known.put("", PLACE, [document(1)])
    with pytest.raises(ZeroDivisionError), known.transaction():
        known.put("", PLACE, [document(2)._replace(artifact=document(2).artifact._replace(tags={"a": "b"}))])
        _ = 1 / 0
    assert shown(known) == [(1, True)]
    known.put("", PLACE, [document(2)._replace(artifact=document(2).artifact._replace(tags={"a": "b"}))])
    assert len(list(search(known, Predicate('tags.a == "b"')))) == 1


def test_an_anchor_that_grows_has_no_text():
    bomb = b"id: x\na: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
    )
    found = metadata.parse(f"{PLACE}/1", bomb + b"tags: {env: *j}\n", "print").artifact
    assert found.tags == {"env": ""}


@pytest.mark.parametrize(
    "path",
    [
        "data/a/b/1",
        "outputs/a/b/c/1",
        "data/a/b/c/latest",
        "data/a/b/c/0",
        "data/a/b/c/1x",
        "data/a/b/c/" + "9" * 30,
        "data/a/b/c/01",
        "data/a/b/Latest/1",
    ],
)
def test_not_every_directory_is_a_version(path):
    assert metadata.path_of(path) is None


def test_rows_of_another_namespace_are_taken_as_they_are_and_nonsense_is_left_out(known):
    row = {"type_normalized": "a/b", "model_id": "id", "data_name": "n", "version": 2, "is_latest": 1, "id": "u",
           "model_name": "net", "tags": '{"env": "prod"}', "size": 7, "streaming": 0}  # fmt: skip
    away = {"type_normalized": "..", "model_id": "..", "data_name": "../../../proc"}
    bad = [
        None,
        7,
        {},
        {**row, "version": "x"},
        {**row, "version": float("inf")},
        {**row, **away},
        {**row, "tags": "{"},
        {**row, "data_name": ""},
        {**row, "version": -1},
    ]
    found = [one for raw in [row, *bad] if (one := metadata.of_export("infra", raw)) is not None]
    known.import_rows("infra", found)
    assert [(one.namespace, one.model_name, one.is_latest) for one in known.select("1", ())] == [("infra", "net", True)]
    known.import_rows("infra", [])
    assert list(known.select("1", ())) == []


# --- expressions ---------------------------------------------------------------------------------------------


def test_what_an_expression_refers_to_is_known_without_what_its_macros_bind():
    term = parse(
        "attributes.list.exists(x, x.a == name) && has(tags.k) ? size(content) > 1 : [1, 2].all(size, size > 0)"
    )
    assert free_names(term) == {"attributes", "name", "tags", "content"}
    assert functions(term) == {"exists", "has", "size", "all"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modelNam == 'x'", "unknown field modelNam"),
        ("namespace == 'x'", "a namespace is called ns"),
        ("modelId == 'x'", "unknown field modelId"),
        ("modelName.startwith('x')", "unknown function startwith"),
        ("modelName == ", "no CEL expression"),
        ("modelName == 'x' )", "no CEL expression"),
        ("'" + "x" * 5000 + "'", "5002 characters"),
        ("(" * 500 + "true" + ")" * 500, "no CEL expression"),
        ('"\\U00110000" == name', "no CEL expression"),
        *(
            (text, "neither true nor false")
            for text in (
                "name",
                "'net-eu'",
                "version > 1 && size",
                "!(size + 1)",
                "tags",
                "size(name)",
                "[true]",
                "string(isLatest)",
                "null",
            )
        ),
        ("a" + ".a" * 2000, "no CEL expression|unknown field"),
    ],
)
def test_a_predicate_that_is_wrong_is_refused_with_what_is_wrong(text, told):
    with pytest.raises(UsageError, match=told):
        Predicate(text)


def test_only_the_latest_are_looked_at_unless_versions_are_spoken_of(tmp_path):
    known = database(tmp_path / "a.db", list(artifacts(4, 3)))
    found = {text: len(list(search(known, Predicate(text)))) for text in ("", "size >= 0", "version > 0", "!isLatest")}
    assert found == {"": 4, "size >= 0": 4, "version > 0": 12, "!isLatest": 8}
    known.close()


def test_content_that_is_not_here_is_null_and_meets_no_predicate(tmp_path):
    known = database(tmp_path / "a.db", list(artifacts(30, 1)))
    running = Predicate('attributes.state == "stopped"')
    assert list(search(known, running, nothing)) == []
    found = [record.artifact for record in search(known, running, content_of)]
    assert found
    assert all(one.size % 3 == 1 for one in found)
    absent = list(search(known, Predicate("attributes == null"), content_of))
    assert all(record.artifact.size % 3 == 0 for record in absent)
    known.close()


def test_content_is_what_its_type_says(known):
    bodies = {
        "application/json": b'{"a": [1]}',
        "text/plain": b"words",
        "application/yaml": b"a: 1",
        "image/png": b"\x89",
    }
    one = document(1).artifact
    seen = {kind: Record(one._replace(content_type=kind), lambda _, body=body: body) for kind, body in bodies.items()}
    assert [record("content") for record in seen.values()] == [{"a": [1]}, "words", "a: 1", ""]
    assert [record("attributes") for record in seen.values()] == [{"a": [1]}, {}, {}, {}]
    broken = Record(one._replace(content_type="application/json"), lambda _: b"{")
    assert broken("attributes") == {}


def test_a_selection_shapes_what_is_shown_and_is_null_where_it_fails(known):
    record = Record(document(3).artifact, nothing)
    kinds = [
        "name",
        "{'n': name, 'v': version}",
        "[version, version + 1]",
        "0.0 / 0.0",
        "tags.none",
        "timestamp('2026-01-01T00:00:00Z')",
    ]
    assert [selected(record, Expression(text)) for text in kinds] == [
        "name", {"n": "name", "v": 3}, [3, 4], None, None, "2026-01-01T00:00:00Z",
    ]  # fmt: skip
    assert json.loads(json.dumps(record.as_json()))["modelName"] == "net"
    assert "attributes" not in record.as_json()


def test_problems_are_kept_but_not_shown(known):
    known.put("", PLACE, [Document(f"{PLACE}/1", "print", None, "not a mapping"), document(2)])
    assert shown(known) == [(2, True)]
    assert known.versions("", [PLACE])[PLACE] == {f"{PLACE}/1": "print", f"{PLACE}/2": "print 2"}
