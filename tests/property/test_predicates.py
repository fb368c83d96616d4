"""A predicate finds what the CEL library finds in every row by itself, whatever part of it SQL answered."""

from __future__ import annotations

import cel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swampfs.artifacts.predicate import Predicate
from swampfs.artifacts.query import Record, search
from tests.artifacts import artifacts, content_of, database

TEXTS = st.sampled_from(["modelName", "name", "specName", "workflowName", "createdAt", "modelType", "ns"])
WORDS = st.sampled_from(
    ["model-1", "name-2", "vpc", "nightly", "", "2026-03", "model-", "l-1", "type/1", "é😀", "x'y", 'a\\"b']
)
TAGS = st.sampled_from(["tags.env", 'tags["run"]', "tags.none", "tags['specName']"])
SIGNS = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
NUMBERS = st.sampled_from(["0", "1", "2", "-1", "50000", "0x10", "9223372036854775807", "1.5", "2u"])


def quoted(word):
    return '"' + word.replace('"', '\\"') + '"' if not word.endswith('\\"b') else f'"{word}"'


OTHERS = """
isLatest|streaming|isLatest == false|streaming != true|true|false|has(tags.run)|has(tags.none)|"run" in tags
modelName in []|size / 0 == 1|tags.size() > 4|size(name) == 6|attributes.state == "stopped"|attributes == null
content.count > 1|isLatest < true|modelName.matches("^model-[12]$")|tags.exists(k, tags[k] == name)
(version == 1 ? streaming : isLatest)|'type' in tags
"""
LEAVES = st.one_of(
    st.builds("{} {} {}".format, TEXTS, SIGNS, WORDS.map(quoted)),
    st.builds("{} {} {}".format, WORDS.map(quoted), SIGNS, TEXTS),
    st.builds("{} {} {}".format, TAGS, SIGNS, st.sampled_from(['"prod"', '"lab"', '"7"', "7"])),
    st.builds("{} {} {}".format, st.sampled_from(["version", "size"]), SIGNS, NUMBERS),
    st.builds("{} {} {}".format, NUMBERS, SIGNS, st.sampled_from(["version", "size", "modelName"])),
    st.builds("{}.{}({})".format, TEXTS, st.sampled_from(["startsWith", "endsWith", "contains"]), WORDS.map(quoted)),
    st.builds("{} in [{}, {}]".format, TEXTS, WORDS.map(quoted), WORDS.map(quoted)),
    st.sampled_from(OTHERS.strip().replace("\n", "|").split("|")),
)
PREDICATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds("({} && {})".format, inner, inner),
        st.builds("({} || {})".format, inner, inner),
        st.builds("!({})".format, inner),
        st.builds("({} ? {} : {})".format, inner, inner, inner),
    ),
    max_leaves=6,
)
FIELDS = [
    "id",
    "name",
    "version",
    "isLatest",
    "createdAt",
    "tags",
    "modelName",
    "modelType",
    "specName",
    "dataType",
    "contentType",
    "lifetime",
    "ownerType",
    "streaming",
    "size",
    "ownerRef",
    "workflowRunId",
    "workflowName",
    "jobName",
    "stepName",
    "source",
    "attributes",
    "content",
    "ns",
]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    made = database(tmp_path_factory.mktemp("artifacts") / "a.db", list(artifacts(60, 3)))
    yield made
    made.close()


class Rows(list):
    def __repr__(self):
        return f"{len(self)} rows"


@pytest.fixture(scope="module")
def every_record(known):
    records = [Record(one, content_of) for one in known.select("1", ())]
    return Rows(({name: record(name) for name in FIELDS}, record.artifact.uuid) for record in records)


def reference(records, text):
    """The documented meaning, without any of our own reading of it."""
    program = cel.compile(text)
    speaks_of_versions = {"version", "isLatest"} & set(program.variables())
    for record, uuid in records:
        if not speaks_of_versions and not record["isLatest"]:
            continue
        try:
            if program.execute(record) is True:
                yield uuid
        except Exception:
            continue


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PREDICATES)
def test_a_predicate_finds_what_cel_finds(known, every_record, text):
    expected = list(reference(every_record, text))
    assert [record.artifact.uuid for record in search(known, Predicate(text), content_of)] == expected
