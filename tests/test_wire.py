"""Socket messages: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_ray import errors, wire
from echo_ray.errors import EchoError, MessageError, MessageTooLarge

LIMIT = 1000
INDEX = st.integers(0, wire.MAX_INDEX)
WORD = st.text(max_size=20)
MAPPING = st.dictionaries(WORD, st.one_of(st.none(), st.booleans(), INDEX, WORD), max_size=3)

CLIENT = st.one_of(
    st.builds(wire.Attach, start=st.one_of(st.none(), INDEX)),
    st.builds(
        wire.Interaction,
        event_id=WORD,
        event=st.builds(wire.Event, prompt=WORD),
        at_chunk=st.one_of(st.none(), INDEX),
    ),
    st.builds(wire.Ack, chunk_index=INDEX),
    *(
        st.just(kind())
        for kind in (wire.Pause, wire.Resume, wire.TakeSnapshot, wire.Ping, wire.Stop)
    ),
)
SERVER = st.one_of(
    st.builds(wire.Created, session=MAPPING),
    st.builds(
        wire.VideoStart,
        format=WORD,
        fps=INDEX,
        width=INDEX,
        height=INDEX,
        mime=WORD,
        start=INDEX,
    ),
    st.builds(
        wire.ChunkMetadata,
        chunk_index=INDEX,
        num_frames=INDEX,
        pts_ms=st.one_of(INDEX, st.floats(0, 1e12)),
        byte_length=INDEX,
        digest=WORD,
        epoch=INDEX,
        prompt=WORD,
        ignored_words=st.lists(WORD, max_size=3).map(tuple),
        started_event_ids=st.lists(WORD, max_size=3).map(tuple),
        active_event_ids=st.lists(WORD, max_size=3).map(tuple),
        completed_event_ids=st.lists(WORD, max_size=3).map(tuple),
        discontinuity=st.booleans(),
        drift=st.one_of(st.none(), MAPPING),
        owner=WORD,
        chunk_seconds=st.floats(0, 100),
    ),
    st.builds(wire.InteractionQueued, event_id=WORD, effective_chunk=INDEX),
    st.builds(wire.SnapshotCommitted, snapshot=MAPPING),
    st.builds(wire.Migrating, to=WORD),
    st.builds(wire.Migrated, owner=WORD, epoch=INDEX),
    st.builds(wire.Done, reason=WORD),
    st.builds(
        wire.ErrorMessage,
        code=WORD,
        message=WORD,
        retryable=st.booleans(),
        param=st.one_of(st.none(), WORD),
        retry_after_s=st.one_of(st.none(), st.floats(0, 100)),
        event_id=st.one_of(st.none(), WORD),
    ),
    *(st.just(kind()) for kind in (wire.Paused, wire.Resumed, wire.GoingAway, wire.Pong)),
)


def parse(data: Any) -> wire.Message | None:
    return wire.parse_client(data, limit_bytes=LIMIT)


@given(CLIENT)
def test_a_client_message_is_read_as_it_was_written(message: wire.Message) -> None:
    assert wire.parse_client(wire.encode(message), limit_bytes=10_000) == message


@given(SERVER)
def test_a_server_message_is_read_as_it_was_written(message: wire.Message) -> None:
    assert wire.parse_server(wire.encode(message)) == message


@given(st.text(max_size=200))
def test_any_text_is_a_message_or_refused(text: str) -> None:
    try:
        parse(text)
    except MessageError as e:
        e.message.encode()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
TYPES = st.sampled_from(
    [
        "session.attach",
        "session.interaction",
        "session.ack",
        "session.pause",
        "ping",
        "video.chunk_metadata",
        "error",
    ]
)
FIELDS = st.sampled_from(["from", "event_id", "event", "at_chunk", "chunk_index", "code", "x"])


@given(TYPES, st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_shape_of_a_known_type_is_read_or_refused(kind: str, fields: dict[str, Any]) -> None:
    text = json.dumps({"type": kind, **fields})
    for read in (
        lambda: wire.parse_client(text, limit_bytes=10**6),
        lambda: wire.parse_server(text),
    ):
        try:
            message = read()
        except MessageError as e:
            e.message.encode()
            continue
        if message is not None:
            assert message.type == kind or (kind, message.type) == ("ping", "session.ping")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("nope", "not JSON"),
        ("[1]", "JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"type": "ping", "type": "ping"}', "twice"),
        ('{"type": NaN}', "NaN"),
        ('{"type": "session.ack", "chunk_index": ' + "9" * 5000 + "}", "not JSON"),
        ("{}", "type"),
        ('{"type": null}', "type"),
        ('{"type": "session.ack"}', "chunk_index is missing"),
        ('{"type": "session.ack", "chunk_index": true}', "chunk_index"),
        ('{"type": "session.ack", "chunk_index": 1.0}', "chunk_index"),
        ('{"type": "session.ack", "chunk_index": -1}', "chunk_index"),
        ('{"type": "session.ack", "chunk_index": 9007199254740992}', "chunk_index"),
        ('{"type": "session.ack", "chunk_index": 1, "chunk": 2}', "'chunk' is unknown"),
        ('{"type": "session.attach", "start": 2}', "'start' is unknown"),
        ('{"type": "session.interaction", "event_id": "e"}', "event is missing"),
        ('{"type": "session.interaction", "event_id": "e", "event": "x"}', "event"),
        ('{"type": "session.interaction", "event_id": "e", "event": {}}', "event"),
        (
            '{"type": "session.interaction", "event_id": "e", "event": {"prompt": "x", "y": 1}}',
            "event",
        ),
    ],
)
def test_a_malformed_message_is_refused_saying_why(text: str, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        wire.parse_client(text, limit_bytes=10**6)


def test_size_and_kind_of_a_message_are_limited() -> None:
    with pytest.raises(MessageError, match="binary"):
        parse(b"{}")
    fits = '{"type":"x","y":"' + "ä" * 490 + '"}'
    assert parse(fits) is None
    with pytest.raises(MessageTooLarge, match="at most 1000"):
        parse(fits.replace('"y":"', '"y":"' + "a" * 10))
    with pytest.raises(MessageTooLarge):
        parse("a" * 10**6)


def test_unknown_types_are_ignored_and_servers_may_say_more() -> None:
    assert parse('{"type": "session.dance", "how": [1]}') is None
    assert wire.parse_server('{"type": "weather"}') is None
    assert wire.parse_server('{"type": "pong", "at": 3}') == wire.Pong()
    with pytest.raises(MessageError):
        parse('{"type": "ping", "at": 3}')
    with pytest.raises(MessageError):
        wire.parse_server('{"type": "session.migrated", "owner": 3, "epoch": 1}')


def every(kind: type[EchoError]) -> list[type[EchoError]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in every(sub))]


def test_every_error_comes_back_by_its_code() -> None:
    for kind in every(EchoError):
        if kind.__module__ != errors.__name__:
            continue
        error = kind("what is wrong", param="field", retry_after_s=2.0)
        back = wire.error_from(error.to_dict())
        assert type(back) is kind
        assert (back.message, back.param, back.retry_after_s) == ("what is wrong", "field", 2.0)
        told = wire.parse_server(wire.encode(wire.error_message(error, event_id="e")))
        assert isinstance(told, wire.ErrorMessage)
        assert (told.code, told.retryable, told.event_id) == (kind.code, kind.retryable, "e")


def test_an_unknown_code_keeps_its_words_and_whether_to_retry() -> None:
    back = wire.error_from({"code": "new_trouble", "message": "odd", "retryable": True})
    assert back.retryable
    assert "new_trouble" in back.message
    assert not wire.error_from({"code": "new_trouble"}).retryable


def test_a_segment_of_an_older_release_ignores_no_words() -> None:
    head = {"chunk_index": 0, "num_frames": 9, "pts_ms": 0, "byte_length": 3}
    text = json.dumps({"type": "video.chunk_metadata", **head, "digest": "d", "epoch": 1})
    message = wire.parse_server(text)
    assert isinstance(message, wire.ChunkMetadata)
    assert message.ignored_words == ()
