"""Pickles that want something done: nothing is imported, opened, called or allocated, and each is a typed error."""

import ast
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import weight_sync.foreign.stream as stream
from weight_sync import read_serialized_named_tensors
from weight_sync.errors import PayloadRefused
from weight_sync.foreign.records import read_records
from weight_sync.foreign.stream import Budget, read_stream

READER = Path(__file__).with_name("hostile_payloads.py")


def watched(*options):
    """What a process that read them all under an audit hook has to say."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answer = subprocess.run(
        [sys.executable, str(READER), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    return json.loads(answer.stdout)


def test_the_watch_sees_what_a_pickle_does_when_it_is_carried_out():
    wrong = " ".join(watched("control")["wrong"])
    assert "a listing: os.listdir /" in wrong
    assert "much memory: 6710" in wrong
    assert "an exception: ZeroDivisionError" in wrong


def test_two_thousand_hostile_pickles_do_nothing_and_are_refused():
    report = watched("corpus")
    assert report["wrong"] == []
    assert report["count"] > 2_000
    # What is left are lists of no tensors.
    assert report["read"] < 10
    assert set(report["errors"]) <= {"read", "PayloadRefused", "TransportError", "ManifestMismatch"}


def test_mutations_of_good_payloads_do_nothing_and_are_refused():
    report = watched("fuzz", 20261129, 10_000)
    assert (report["wrong"], report["count"]) == ([], 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_million_mutations_of_good_payloads_do_nothing_and_are_refused(seed):
    report = watched("fuzz", seed, 250_000)
    assert (report["wrong"], report["count"]) == ([], 250_000)


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (b"cos\nsystem\n(S'id'\ntR.", "the global os.system at byte 0"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "the global builtins.eval at byte 18"),
        (b"\x80\x02\x82\x01)R.", "the opcode EXT1 at byte 2"),
        (b"\x80\x04NQ.", "the opcode BINPERSID at byte 3"),
        (b"\x80\x04\xff.", "the opcode 0xff, which does not exist at byte 2"),
        (b"\x80\x04(](K\x01", "a payload that is cut short"),
    ],
)
def test_the_error_names_the_opcode_or_the_global_and_its_place(payload, named):
    with pytest.raises(PayloadRefused) as refusal:
        # Bytes that could be base64 are taken for it.
        read_serialized_named_tensors(base64.b64encode(payload))
    assert named in str(refusal.value)
    assert "nothing was executed" in str(refusal.value)


def test_the_budget_of_opcodes_is_one_for_a_payload_and_those_inside_it(monkeypatch):
    from hostile_payloads import good

    [local] = [payload for payload in good() if b"LocalSerializedTensor" in payload]
    monkeypatch.setattr(stream.Budget.__init__, "__defaults__", (150,))
    read_records(local, 0)
    monkeypatch.setattr(stream.Budget.__init__, "__defaults__", (60,))
    read_stream(local, lambda module, name: stream.Global(name, "class"), Budget(60))
    with pytest.raises(PayloadRefused, match="opcodes"):
        read_records(local, 0)


def test_the_reader_knows_nothing_that_could_execute():
    """No import of the reader can unpickle, and it never looks a name up."""
    for path in Path(stream.__file__).parent.glob("*.py"):
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        assert not names & {
            "eval",
            "exec",
            "__import__",
            "importlib",
            "globals",
            "getattr",
            "compile",
        }
