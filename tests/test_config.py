"""Values as they are written: what a setting of a kind takes, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from echo_ray.config import EchoConfig, from_mapping, read_yaml, with_overrides
from echo_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    rate: float = 1.0
    limit: float | None = None
    pair: tuple[float, float] = (0.9, 0.99)
    count: int = 1
    name: str = ""


def row(*assignments: str) -> Row:
    return from_mapping(Row, with_overrides({}, assignments))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2e-3", 0.002),
        ("2E-3", 0.002),
        ("1.5e3", 1500.0),
        ("5.e-1", 0.5),
        (".5e+1", 5.0),
        ("-1e0", -1.0),
        ("+1e2", 100.0),
        ("0.002", 0.002),
        ("2", 2.0),
    ],
)
def test_a_fraction_may_be_written_with_an_exponent(text: str, number: float) -> None:
    assert row(f"rate={text}", f"limit={text}", f"pair=[{text}, 1e-8]") == Row(
        rate=number, limit=number, pair=(number, 1e-8)
    )


@pytest.mark.parametrize(
    "text",
    [
        "nan",
        "inf",
        "-inf",
        "infinity",
        "1e999",
        "e3",
        "1e",
        ".e1",
        "1e3s",
        "1_0e3",
        "٢e3",
        '" 2e3"',
    ],
)
def test_what_is_no_number_is_refused_as_a_fraction(text: str) -> None:
    with pytest.raises(ConfigError, match=r"rate: expected float, got '.*' \(str\)"):
        row(f"rate={text}")


def test_only_fractions_are_read_so() -> None:
    assert row("name=2e3").name == "2e3"
    with pytest.raises(ConfigError, match=r"count: expected int, got '2e3' \(str\)"):
        row("count=2e3")


def test_a_config_file_may_use_exponents_within_the_limits(tmp_path: Path) -> None:
    file = tmp_path / "local.yaml"
    file.write_text("session: {idle_grace_s: 3e1}\n")
    assert from_mapping(EchoConfig, read_yaml(file)).session.idle_grace_s == 30.0
    file.write_text("session: {idle_grace_s: 1e9}\n")
    with pytest.raises(ConfigError, match=r"idle_grace_s: 1000000000\.0 is not allowed"):
        from_mapping(EchoConfig, read_yaml(file))


@pytest.mark.parametrize("text", [".nan", ".inf"])
def test_a_setting_s_limits_hold_for_what_is_not_finite(text: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        from_mapping(EchoConfig, with_overrides({}, [f"session.idle_grace_s={text}"]))


def test_settings_reach_any_depth_and_leave_what_was_given_alone() -> None:
    given = {"storage": {"redis": {"prefix": "mine"}}, "http": {"port": 1}}
    assigned = ["storage.redis.url=redis://r:1/0", "storage.s3.bucket=b", "http.port=2"]
    changed = with_overrides(given, assigned)
    assert given == {"storage": {"redis": {"prefix": "mine"}}, "http": {"port": 1}}
    config = from_mapping(EchoConfig, changed)
    redis = config.storage.redis
    assert (redis.prefix, redis.url) == ("mine", "redis://r:1/0")
    assert (config.storage.s3.bucket, config.http.port) == ("b", 2)
    with pytest.raises(ConfigError, match="url is a value, not a section"):
        with_overrides(changed, ["storage.redis.url.host=x"])


@pytest.mark.parametrize("text", ["-1", "604801", ".nan"])
def test_the_sweep_is_never_or_at_most_a_week_apart(text: str) -> None:
    assert from_mapping(EchoConfig, {"storage": {"sweep_s": 0}}).storage.sweep_s == 0.0
    with pytest.raises(ConfigError, match=r"storage\.sweep_s.*0 \(never\) to 604800 seconds"):
        from_mapping(EchoConfig, with_overrides({}, [f"storage.sweep_s={text}"]))
