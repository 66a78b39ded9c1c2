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
