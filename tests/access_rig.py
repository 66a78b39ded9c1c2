"""Tokens of two tenants, their secrets, and a router rig that asks for them."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from forking_rig import BLOB
from router_rig import CONFIG
from stored import new, ref

from echo_ray.clock import SystemClock
from echo_ray.config import EchoConfig
from echo_ray.config_access import AccessSection, QuotaSection
from echo_ray.serve.access_files import Secret
from echo_ray.serve.access_tokens import ViewerTokens
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionState

SECRET = "viewer-secret-of-more-than-32-characters"
INSIDE = "replica-secret-of-more-than-32-characters"
TOKENS = {
    name: f"{name}-token-0123456789abcdef"
    for name in ("user", "watcher", "admin", "stranger", "expired", "both")
}
ROWS = [
    {"name": "user", "tenant": "acme", "roles": ["user"], "token": TOKENS["user"]},
    {
        "name": "watcher",
        "tenant": "acme",
        "roles": ["viewer"],
        "sha256": hashlib.sha256(TOKENS["watcher"].encode()).hexdigest(),
    },
    {"name": "admin", "tenant": "ops", "roles": ["admin"], "token": TOKENS["admin"]},
    {"name": "stranger", "tenant": "initech", "roles": ["user"], "token": TOKENS["stranger"]},
    {"name": "both", "tenant": "acme", "roles": ["user", "admin"], "token": TOKENS["both"]},
]
EXPIRED = {"name": "late", "tenant": "acme", "roles": ["user"], "token": TOKENS["expired"]}


def write_tokens(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps({"tokens": rows}))


def section(folder: Path, **changes: Any) -> AccessSection:
    """Access as `deployments/cluster.yaml` has it, with files in `folder`."""
    tokens, viewer, inside = (folder / name for name in ("tokens", "viewer", "inside"))
    # JSON has no dates, YAML has.
    rows = json.dumps({"tokens": [*ROWS, {**EXPIRED, "expires": "DAY"}]})
    tokens.write_text(rows.replace('"DAY"', "2020-01-31"))
    viewer.write_text(SECRET)
    inside.write_text(INSIDE)
    return AccessSection(
        enabled=True,
        tokens_file=str(tokens),
        viewer_secret_file=str(viewer),
        replica_secret_file=str(inside),
        **{"quota": QuotaSection(creates_per_minute=10_000), **changes},
    )


def config(folder: Path, **changes: Any) -> EchoConfig:
    return replace(CONFIG, access=section(folder, **changes))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def viewer_token(
    folder: Path, session: str = "s1", tenant: str = "acme", ttl_s: float = 60.0
) -> str:
    secret = Secret("access.viewer_secret", None, str(folder / "viewer"), SystemClock())
    return ViewerTokens(secret, SystemClock()).mint(session, tenant, "user", ttl_s)[0]


def plant(rig: Any, session_id: str = "s1", tenant: str = "acme") -> None:
    """A paused session of thirty chunks with a snapshot."""
    record = new(
        session_id,
        model="fake",
        next_index=30,
        sealed=30,
        fingerprint="fake/1/cpu",
        tenant=tenant,
        state=SessionState.PAUSED,
        created_at=time.time(),
    )
    rig.directory.restore(Past(record=record, snapshots=[ref("p24", 24, session=session_id)]))
    rig.snapshots.put(session_id, "p24", BLOB)
