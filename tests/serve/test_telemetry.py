import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from echo_ray.errors import ConfigError
from echo_ray.serve.telemetry import LOGGER, TABLE, MetricSpec, Telemetry, log, log_as_json

UNBOUNDED = {"session", "session_id", "viewer", "user", "prompt", "trace", "error", "epoch"}


def test_every_metric_of_the_table_can_be_used_and_is_scraped_under_its_name():
    telemetry = Telemetry()
    for spec in TABLE:
        labels = dict.fromkeys(spec.labels, "x")
        match spec.kind:
            case "counter":
                telemetry.count(spec.name, 2, **labels)
            case "gauge":
                telemetry.set(spec.name, 3, **labels)
            case "histogram":
                telemetry.observe(spec.name, 0.5, **labels)
    samples = {
        sample.name
        for family in text_string_to_metric_families(telemetry.render().decode())
        for sample in family.samples
    }
    for spec in TABLE:
        series = f"{spec.series}_count" if spec.kind == "histogram" else spec.series
        assert series in samples
        assert series.startswith("echo_ray_")


def test_names_are_unique_and_labels_bounded():
    names = [spec.name for spec in TABLE]
    assert len(names) == len(set(names))
    assert all(spec.help.endswith(".") for spec in TABLE)
    assert not [s.name for s in TABLE if UNBOUNDED & set(s.labels)]
    assert all(spec.buckets for spec in TABLE if spec.kind == "histogram")
    assert all(sorted(spec.buckets) == list(spec.buckets) for spec in TABLE)


def test_two_processes_do_not_share_a_registry():
    one, two = Telemetry(), Telemetry()
    one.count("frames_generated", 5)
    assert one.value("echo_ray_frames_generated_total") == 5
    assert two.value("echo_ray_frames_generated_total") == 0


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda t: t.count("nothing"), "not in the table"),
        (lambda t: t.count("sessions", state="live"), "is a gauge"),
        (lambda t: t.set("stalls", 1), "is a counter"),
        (lambda t: t.observe("stalls", 1), "is a counter"),
        (lambda t: t.count("chunks"), "labels"),
        (lambda t: t.count("stalls", session="s1"), "labels"),
    ],
)
def test_metrics_outside_the_table_are_refused(call, reason):
    with pytest.raises(ConfigError, match=reason):
        call(Telemetry())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="summary"):
        Telemetry((MetricSpec("x", "summary", "s", "Never."),))


@pytest.fixture
def lines():
    logger = logging.getLogger(LOGGER)
    before = list(logger.handlers), logger.level, logger.propagate
    stream = io.StringIO()
    log_as_json(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_an_outage_of_a_store_is_said_once_a_second_and_counted(lines):
    factory, now = logging.getLogRecordFactory(), [0.0]

    def record(*args, **kwargs):
        made = factory(*args, **kwargs)
        made.created = now[0]
        return made

    logging.setLogRecordFactory(record)
    try:
        for now[0] in (1000.0, 1000.1, 1000.9, 1001.1, 1001.2, 1030.0):
            log(logging.WARNING, "store_failed", session="s1", op="progress", error="gone")
            log(logging.WARNING, "store_failed", session="s1", op="renew", error="gone")
            log(logging.WARNING, "lease_lost", session="s1", reason="expired")
    finally:
        logging.setLogRecordFactory(factory)
    said = [line for line in lines() if line["event"] == "store_failed"]
    assert [line.get("unsaid") for line in said if line["op"] == "renew"] == [None, 2, 1]
    assert len(said) == 2 * 3
    assert len(lines()) - len(said) == 6


def test_log_lines_are_json_objects_with_their_fields(lines):
    log(logging.INFO, "resumed", session="s1", seconds=0.5)
    log(logging.DEBUG, "too_quiet")
    try:
        raise ValueError("broken")
    except ValueError as error:
        log(logging.ERROR, "engine_failed", failure=error, text="two\nlines")
    first, second = lines()
    assert (first["level"], first["event"], first["session"]) == ("info", "resumed", "s1")
    assert first["time"].endswith("Z")
    assert "ValueError: broken" in second["exception"]
    assert second["text"] == "two\nlines"
