"""The section `telemetry`: where traces go. Metrics and logs are always there and need nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from echo_ray.errors import ConfigError

_URL = re.compile(r"https?://[^\s/@]+(/[^\s@]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetrySection:
    """Traces, which are off."""

    otlp_endpoint: str | None = None
    """An OpenTelemetry collector's address for traces, `http://HOST:4318/v1/traces`; None: off."""

    def __post_init__(self) -> None:
        # The value is not told: it may hold a password.
        if self.otlp_endpoint is not None and not _URL.fullmatch(self.otlp_endpoint):
            raise ConfigError(
                "telemetry.otlp_endpoint: write it as http://HOST:4318/v1/traces, without a user",
                param="telemetry.otlp_endpoint",
            )
