"""Who may do what, and how much of it: principals, roles, tenants and quotas, decided.

    token -> Principal           the shell (serve/access*.py) finds out who asks
    Principal, Need -> refusal   `check`; `sees` for one session
    Quota, Usage -> refusal      `check_quota`, under the lock or the script of each directory

A session of another tenant is refused in the words of a session that does not exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from echo_ray.config_access import AccessSection
from echo_ray.errors import Forbidden, QuotaExceeded, Unauthenticated
from echo_ray.session import control_log
from echo_ray.session.records import Pace, SessionRecord

CREATE_WINDOW_S = 60.0
"""Sessions that were created are counted over so long."""


class Role(StrEnum):
    """What a token is for."""

    VIEWER = "viewer"
    """Watches sessions of its tenant; one that goes in a URL, a single session."""
    USER = "user"
    """Does everything with the sessions of its tenant."""
    ADMIN = "admin"
    """Runs the service: the admin routes, and none of anybody's sessions."""


class Need(IntEnum):
    """What a route asks of whoever calls it."""

    NOTHING = 0
    """Open to all: probes, metrics, the page."""
    TOKEN = 1
    """Any token that holds."""
    WATCH = 2
    USE = 3
    ADMIN = 4


_MAY = {
    Need.NOTHING: frozenset(Role),
    Need.TOKEN: frozenset(Role),
    Need.WATCH: frozenset({Role.VIEWER, Role.USER}),
    Need.USE: frozenset({Role.USER}),
    Need.ADMIN: frozenset({Role.ADMIN}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Somebody whose token was found to hold."""

    name: str
    """For the audit log; never the token."""
    tenant: str | None
    """None: access is off, and all sessions are everybody's."""
    roles: frozenset[Role]
    session: str | None = None
    """The only session that a viewer token is for."""
    expires_at: float = math.inf
    """Wall time."""

    def may(self, need: Need) -> bool:
        return bool(self.roles & _MAY[need])


EVERYBODY = Principal(name="everybody", tenant=None, roles=frozenset(Role))
"""Whoever asks while access is off."""
NOBODY = Principal(name="nobody", tenant=None, roles=frozenset())
"""Whoever has shown no token yet while access is on."""


def check(principal: Principal | None, need: Need) -> None:
    """Refuse who may not: `Unauthenticated` without a token, `Forbidden` with the wrong one."""
    if need is Need.NOTHING:
        return
    if principal is None:
        raise Unauthenticated("no token; send the header Authorization: Bearer TOKEN")
    if not principal.may(need):
        allowed = " or ".join(sorted(_MAY[need]))
        has = ", ".join(sorted(principal.roles)) or "none"
        raise Forbidden(f"this needs a token with the role {allowed}; this one has: {has}")


def sees(principal: Principal, session_id: str, tenant: str) -> bool:
    """Whether a session of that tenant exists for this principal."""
    if principal.session is not None and principal.session != session_id:
        return False
    return principal.tenant is None or principal.tenant == tenant


def visible(principal: Principal, record: SessionRecord) -> SessionRecord:
    """The record. Raises `SessionNotFound` unless the principal may know of it."""
    if not sees(principal, record.id, record.tenant):
        raise control_log.not_found(record.id)
    return record


# Quotas


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What a tenant may have; None: as much as there is."""

    sessions: int | None = None
    realtime: int | None = None
    """Open sessions with `pace: realtime`. Paused ones count: watching one wakes it."""
    creates: int | None = None
    """New sessions in `CREATE_WINDOW_S`."""

    def instead(self) -> Quota:
        """For a session that takes the place of another of the tenant's."""
        return Quota(creates=self.creates)


def quota_of(section: AccessSection, tenant: str) -> Quota | None:
    """What the configuration gives a tenant; None while access is off."""
    if not section.enabled:
        return None
    own = next((q for q in section.quotas if q.tenant == tenant), None)

    def given(name: str) -> int:
        value: int | None = None if own is None else getattr(own, name)
        return int(getattr(section.quota, name)) if value is None else value

    return Quota(
        sessions=given("sessions"),
        realtime=given("realtime_sessions"),
        creates=given("creates_per_minute"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a tenant has."""

    sessions: int = 0
    realtime: int = 0
    creates: int = 0
    oldest_create: float = 0.0
    """When the oldest of those was made, on the clock of `now`."""


def check_quota(quota: Quota, usage: Usage, record: SessionRecord, now: float) -> None:
    """Refuse one more session, `record`. Raises `QuotaExceeded`."""
    if quota.creates is not None and usage.creates >= quota.creates:
        wait_s = max(1.0, usage.oldest_create + CREATE_WINDOW_S - now)
        raise QuotaExceeded(
            f"{usage.creates} sessions were created in the last {CREATE_WINDOW_S:.0f} s; the quota "
            f"is {quota.creates} (creates_per_minute): wait",
            param="creates_per_minute",
            retry_after_s=round(min(wait_s, CREATE_WINDOW_S), 1),
        )
    if quota.sessions is not None and usage.sessions >= quota.sessions:
        raise QuotaExceeded(
            f"{usage.sessions} sessions are open; the quota is {quota.sessions} (sessions): close "
            "or delete one",
            param="sessions",
        )
    realtime = record.pace is Pace.REALTIME
    if realtime and quota.realtime is not None and usage.realtime >= quota.realtime:
        raise QuotaExceeded(
            f"{usage.realtime} realtime sessions are open; the quota is {quota.realtime} "
            "(realtime_sessions): close one, or ask for pace max",
            param="realtime_sessions",
        )
