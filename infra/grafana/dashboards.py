"""Writes the dashboards: `python infra/grafana/dashboards.py`. A panel is one line of a table.

In an expression `%` stands for the selection of the dashboard's variables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SELECTED = 'namespace=~"$namespace"'
W = "$__rate_interval"
COLUMNS, HEIGHT = 3, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel; `queries` are pairs of an expression and a legend."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


def quantiles(series: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """The median and the slowest twentieth of a histogram."""
    grouped, legend = (f"{by}, le", f" {{{{{by}}}}}") if by else ("le", "")
    rates = f"sum by ({grouped}) (rate({series}_bucket{{%}}[{W}]))"
    return tuple(
        (f"histogram_quantile({q}, {rates})", f"p{round(q * 100)}{legend}") for q in (0.5, 0.95)
    )


def rates(series: str, by: str, of: str = "rate") -> tuple[tuple[str, str], ...]:
    """How fast a counter rises (or by how much: `increase`), by one label."""
    return ((f"sum by ({by}) ({of}({series}{{%}}[{W}]))", f"{{{{{by}}}}}"),)


def over(series: str, by: str) -> tuple[tuple[str, str], ...]:
    """A gauge, summed by one label."""
    return ((f"sum by ({by}) ({series}{{%}})", f"{{{{{by}}}}}"),)


BUSY = 'echo_ray_generation_busy_seconds_total{stage="total",%}'
WAITING = (("echo_ray:sessions_waiting{%}", "waiting"),)
LATE = tuple((f"echo_ray:chunks_late:ratio_rate{w}{{%}}", w) for w in ("5m", "1h", "6h"))
LEAST_SLACK = "echo_ray_playout_slack_seconds{%} < Inf"

FLEET = (
    Panel(
        "Alerts that fire",
        "short",
        (
            (
                'count by (alertname) (ALERTS{alertstate="firing",alertname=~"EchoRay.*"})',
                "{{alertname}}",
            ),
        ),
    ),
    Panel("Chunks late", "percentunit", LATE),
    Panel("Least playout slack", "s", ((f"min({LEAST_SLACK})", "least"),)),
    Panel(
        "Viewers' stalls, seconds per second",
        "s",
        (
            (f"sum(rate(echo_ray_viewer_stall_seconds_total{{%}}[{W}]))", "waited"),
            (f"sum(rate(echo_ray_viewer_stalls_total{{%}}[{W}]))", "stalls per second"),
        ),
    ),
    Panel("Sessions by state", "short", over("echo_ray_sessions", "state")),
    Panel(
        "Sessions open and waiting",
        "short",
        (
            ("max(echo_ray_sessions_open{%})", "open"),
            *WAITING,
            ('sum(echo_ray_sessions_waiting{watched="true",%})', "waiting and watched"),
        ),
        "stat",
    ),
    Panel("Viewers", "short", over("echo_ray_viewers", "transport")),
    Panel(
        "Frames per second and session",
        "short",
        (
            (
                f"sum(rate(echo_ray_frames_generated_total{{%}}[{W}]))"
                ' / sum(echo_ray_sessions{state="running",%})',
                "frames",
            ),
        ),
    ),
    Panel("Free slots", "short", (("sum(echo_ray_session_slots{%})", "free"),)),
    Panel("Time to first chunk", "s", quantiles("echo_ray_time_to_first_chunk_seconds", "start")),
    Panel("From event to picture", "s", quantiles("echo_ray_event_to_frame_seconds")),
    Panel("Sessions not admitted", "short", rates("echo_ray_admission_rejections_total", "reason")),
    Panel("Requests by status", "reqps", rates("echo_ray_requests_total", "status")),
    Panel("Bytes sent", "Bps", rates("echo_ray_bytes_sent_total", "format")),
    Panel(
        "Processes",
        "short",
        (("count by (role, version) (echo_ray_build_info{%})", "{{role}} {{version}}"),),
    ),
)
REPLICA = (
    Panel(
        "Real-time factor (below 1 keeps up)",
        "short",
        (("echo_ray:realtime_factor:rate5m{%}", "{{instance}}"),),
    ),
    Panel(
        "Slowest replicas",
        "short",
        (("topk(5, echo_ray:realtime_factor:rate5m{%})", "{{instance}}"),),
    ),
    Panel(
        "Device time used",
        "percentunit",
        ((f"sum by (instance) (rate({BUSY}[{W}]))", "{{instance}}"),),
    ),
    Panel(
        "Chunk time by stage",
        "s",
        (
            (
                f"sum by (stage) (rate(echo_ray_chunk_latency_seconds_sum{{%}}[{W}])) / "
                f"sum by (stage) (rate(echo_ray_chunk_latency_seconds_count{{%}}[{W}]))",
                "{{stage}}",
            ),
        ),
    ),
    Panel("Chunk time", "s", quantiles("echo_ray_chunk_latency_seconds", "stage")),
    Panel(
        "Real-time factor of chunks",
        "short",
        (
            (
                f"sum by (le) (increase(echo_ray_chunk_realtime_factor_ratio_bucket{{%}}[{W}]))",
                "{{le}}",
            ),
        ),
        "heatmap",
    ),
    Panel(
        "Video made, seconds per second",
        "short",
        rates("echo_ray_video_seconds_generated_total", "instance"),
    ),
    Panel(
        "Speed of the latest chunk, frames per second",
        "short",
        (("echo_ray_frames_per_second{%} > 0", "{{instance}}"),),
    ),
    Panel("Playout slack", "s", ((LEAST_SLACK, "{{instance}}"),)),
    Panel(
        "Chunks late",
        "short",
        (
            (
                f'sum by (instance) (rate(echo_ray_chunks_total{{on_time="false",%}}[{W}]))',
                "{{instance}}",
            ),
            *rates("echo_ray_stalls_total", "instance"),
        ),
    ),
    Panel("How late, seconds per second", "s", rates("echo_ray_stall_seconds_total", "instance")),
    Panel(
        "Sessions and pulls",
        "short",
        (
            *over("echo_ray_sessions", "instance"),
            ("sum by (instance) (echo_ray_readers{%})", "pulls {{instance}}"),
        ),
    ),
    Panel("Encoding", "s", quantiles("echo_ray_encode_seconds", "format")),
    Panel("Memory of the states", "bytes", over("echo_ray_state_bytes", "instance")),
    Panel(
        "Memory of the engine",
        "bytes",
        (("sum by (instance, kind) (echo_ray_device_memory_bytes{%})", "{{kind}} {{instance}}"),),
    ),
    Panel("Engine failures", "short", rates("echo_ray_engine_failures_total", "instance")),
    Panel(
        "Kernels that fell back to plain PyTorch, calls",
        "short",
        (
            (
                f"sum by (instance, kernel) (rate(echo_ray_kernel_fallbacks_total{{%}}[{W}]))",
                "{{kernel}} {{instance}}",
            ),
        ),
    ),
)
RECOVERY = (
    Panel("Sessions waiting for a replica", "short", WAITING),
    Panel("Failovers", "short", rates("echo_ray_failovers_total", "cause", "increase")),
    Panel("Failover time", "s", quantiles("echo_ray_failover_seconds")),
    Panel("Gap between two owners", "s", quantiles("echo_ray_handover_gap_seconds", "cause")),
    Panel("Resumes", "short", rates("echo_ray_session_resumes_total", "outcome", "increase")),
    Panel("Resume time", "s", quantiles("echo_ray_resume_duration_seconds")),
    Panel("Replayed chunks", "short", rates("echo_ray_replayed_chunks_total", "instance")),
    Panel("Moves", "short", rates("echo_ray_migrations_total", "outcome", "increase")),
    Panel(
        "Drains, and what they parked",
        "short",
        (
            *rates("echo_ray_drains_total", "reason", "increase"),
            (f"sum(increase(echo_ray_sessions_parked_total{{%}}[{W}]))", "parked"),
        ),
    ),
    Panel(
        "Snapshot age",
        "s",
        (
            (
                "time() - min by (instance) (echo_ray_oldest_snapshot_timestamp_seconds{%} < Inf)",
                "{{instance}}",
            ),
        ),
    ),
    Panel("Snapshots", "short", rates("echo_ray_snapshots_total", "outcome", "increase")),
    Panel(
        "Snapshot write and read time", "s", quantiles("echo_ray_snapshot_duration_seconds", "op")
    ),
    Panel("Snapshot size", "bytes", quantiles("echo_ray_snapshot_size_bytes")),
    Panel(
        "Store time by tier",
        "s",
        (
            (
                f"histogram_quantile(0.95, sum by (tier, op, le) "
                f"(rate(echo_ray_snapshot_store_seconds_bucket{{%}}[{W}])))",
                "p95 {{tier}} {{op}}",
            ),
        ),
    ),
    Panel(
        "Store calls by tier",
        "short",
        (
            (
                f"sum by (tier, op, outcome) (rate(echo_ray_snapshot_store_calls_total{{%}}[{W}]))",
                "{{tier}} {{op}} {{outcome}}",
            ),
        ),
    ),
    Panel(
        "Store bytes by tier",
        "Bps",
        (
            (
                f"sum by (tier, op) (rate(echo_ray_snapshot_store_bytes_total{{%}}[{W}]))",
                "{{tier}} {{op}}",
            ),
        ),
    ),
    Panel(
        "Between the tiers",
        "short",
        (
            *rates("echo_ray_snapshot_tier_events_total", "event", "increase"),
            ("sum(echo_ray_snapshot_debt{%})", "debt"),
        ),
    ),
    Panel("Store errors", "short", rates("echo_ray_store_errors_total", "op")),
    Panel(
        "Leases lost and writes fenced",
        "short",
        (
            *rates("echo_ray_leases_lost_total", "reason", "increase"),
            (f"sum(increase(echo_ray_fenced_writes_total{{%}}[{W}]))", "fenced"),
        ),
    ),
    Panel(
        "Segments made again that differ",
        "short",
        rates("echo_ray_digest_mismatches_total", "instance", "increase"),
    ),
    Panel(
        "Brought back after Redis lost everything",
        "short",
        rates("echo_ray_sessions_restored_total", "outcome", "increase"),
    ),
)
DRIFT = (
    Panel("Score", "short", quantiles("echo_ray_drift_score")),
    Panel(
        "Scores",
        "short",
        ((f"sum by (le) (increase(echo_ray_drift_score_bucket{{%}}[{W}]))", "{{le}}"),),
        "heatmap",
    ),
    Panel(
        "Chunks with a score over 3",
        "percentunit",
        (
            (
                f'1 - sum(rate(echo_ray_drift_score_bucket{{le="3.0",%}}[{W}])) / '
                f"sum(rate(echo_ray_drift_score_count{{%}}[{W}]))",
                "over 3",
            ),
        ),
    ),
    Panel("Flags", "short", rates("echo_ray_drift_flags_total", "flag")),
    Panel(
        "Parts",
        "short",
        (
            (
                f"sum by (part) (rate(echo_ray_drift_parts_total{{%}}[{W}])) / on () group_left () "
                f"sum(rate(echo_ray_chunks_total{{%}}[{W}]))",
                "{{part}}",
            ),
        ),
    ),
)
DASHBOARDS = {
    "fleet": ("Echo Ray: fleet", "Is every stream playing?", FLEET),
    "replica": ("Echo Ray: replica", "Where does chunk time go?", REPLICA),
    "recovery": ("Echo Ray: recovery", "What died, what came back, how fast.", RECOVERY),
    "drift": ("Echo Ray: drift", "How far have streams moved from how they began?", DRIFT),
}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def rendered(name: str) -> str:
    """The dashboard as the file that Grafana reads."""
    title, description, panels = DASHBOARDS[name]
    whole = {
        "uid": f"echo-ray-{name}",
        "id": None,
        "title": title,
        "description": description,
        "tags": ["echo-ray"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _namespace()]},
        "panels": [_panel(n, panel) for n, panel in enumerate(panels)],
    }
    return json.dumps(whole, indent=1) + "\n"


def _panel(n: int, panel: Panel) -> dict[str, Any]:
    width = 24 // COLUMNS
    place = {"x": n % COLUMNS * width, "y": n // COLUMNS * HEIGHT, "w": width, "h": HEIGHT}
    form = "heatmap" if panel.kind == "heatmap" else "time_series"
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": expr.replace("%", SELECTED),
            "legendFormat": legend,
            "format": form,
        }
        for i, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        "id": n + 1,
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": targets,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _namespace() -> dict[str, Any]:
    return {
        "name": "namespace",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(echo_ray_build_info, namespace)",
        "includeAll": True,
        # Also for series without a namespace, on one machine.
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(rendered(name), encoding="utf-8")


if __name__ == "__main__":
    main()
