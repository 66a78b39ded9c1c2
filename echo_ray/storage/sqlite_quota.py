"""What each tenant has, in a SQLite directory: counted in the transaction that adds a session."""

from __future__ import annotations

import sqlite3

from echo_ray.session.access import CREATE_WINDOW_S, Quota, Usage, check_quota
from echo_ray.session.records import Pace, SessionRecord, SessionState

# A table of its own, since a session that was deleted was created all the same. Databases of older
# releases have none, and those releases leave it alone.
_CREATES = "CREATE TABLE IF NOT EXISTS creates (tenant TEXT NOT NULL, at REAL NOT NULL)"
# A scan inside SQLite, of one machine's sessions, and only when one is added.
_OPEN = """SELECT count(*), total(json_extract(body, '$.pace') = ?) FROM sessions
    WHERE state != ? AND coalesce(json_extract(body, '$.tenant'), '') = ?"""


def take(db: sqlite3.Connection, record: SessionRecord, quota: Quota, now: float) -> None:
    """Count one more session of the record's tenant, in the caller's transaction.

    Raises `QuotaExceeded`.
    """
    db.execute(_CREATES)
    db.execute("DELETE FROM creates WHERE at <= ?", (now - CREATE_WINDOW_S,))
    of_tenant = (Pace.REALTIME.value, SessionState.CLOSED.value, record.tenant)
    sessions, realtime = db.execute(_OPEN, of_tenant).fetchone()
    sql = "SELECT count(*), coalesce(min(at), 0) FROM creates WHERE tenant = ?"
    creates, oldest = db.execute(sql, (record.tenant,)).fetchone()
    usage = Usage(
        sessions=int(sessions), realtime=int(realtime), creates=int(creates), oldest_create=oldest
    )
    check_quota(quota, usage, record, now)
    db.execute("INSERT INTO creates (tenant, at) VALUES (?, ?)", (record.tenant, now))
