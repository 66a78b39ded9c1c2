"""The section `access`: who may use the service, and how much of it. It holds no secret."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from echo_ray.config_rules import require

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TENANT_RULE = "1 to 64 letters, digits and . _ - and begins with a letter or digit"
ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Of signatures that only the issuer can make; a shared secret would let us forge them too."""
_ORIGIN = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_SAFE_URL = re.compile(r"https://[^\s@]+|http://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?/[^\s@]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class JwtSection:
    """Tokens that somebody else issues, checked with the keys that the issuer publishes."""

    jwks: str | None = None
    """Where the keys are: an `https://` address, or a file; None: no such tokens are taken."""
    issuer: str = ""
    audience: str = ""
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    tenant_claim: str = "tenant"
    roles_claim: str = "roles"
    leeway_s: float = 10.0
    """How far the issuer's clock may be off."""
    refresh_s: float = 300.0
    """Keys are fetched again after so long; an unknown key id fetches them at once."""

    def __post_init__(self) -> None:
        at = "access.jwt"
        if self.jwks is not None:
            require(bool(self.jwks), f"{at}.jwks", self.jwks, "name an address or a file")
            remote = "://" in self.jwks
            safe = not remote or _SAFE_URL.fullmatch(self.jwks) is not None
            require(safe, f"{at}.jwks", self.jwks, "https:// (http:// only on this machine)")
            require(bool(self.issuer), f"{at}.issuer", self.issuer, "name the issuer (claim iss)")
            named = bool(self.audience)
            require(named, f"{at}.audience", self.audience, "name this service (claim aud)")
        known = bool(self.algorithms) and all(a in ALGORITHMS for a in self.algorithms)
        require(known, f"{at}.algorithms", self.algorithms, f"some of {', '.join(ALGORITHMS)}")
        for name in ("tenant_claim", "roles_claim"):
            require(bool(getattr(self, name)), f"{at}.{name}", "", "name a claim")
        require(0 <= self.leeway_s <= 300, f"{at}.leeway_s", self.leeway_s, "0 to 300 seconds")
        fits = 10 <= self.refresh_s <= 86400
        require(fits, f"{at}.refresh_s", self.refresh_s, "10 to 86400 seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaSection:
    """What one tenant may have at a time."""

    sessions: int = 100
    """Open ones, paused or not."""
    realtime_sessions: int = 16
    """Open ones with `pace: realtime`: the GPU slots that the tenant can come to need."""
    creates_per_minute: int = 60

    def __post_init__(self) -> None:
        check_quota(self, "access.quota")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantQuota:
    """The quota of one tenant that is not the usual one; None: as `access.quota`."""

    tenant: str
    sessions: int | None = None
    realtime_sessions: int | None = None
    creates_per_minute: int | None = None

    def __post_init__(self) -> None:
        fits = TENANT.fullmatch(self.tenant) is not None
        require(fits, "access.quotas.tenant", self.tenant, TENANT_RULE)
        check_quota(self, "access.quotas")


def check_quota(quota: QuotaSection | TenantQuota, at: str) -> None:
    """Raise `ConfigError` for a number that no quota can be."""
    for name in ("sessions", "realtime_sessions", "creates_per_minute"):
        value = getattr(quota, name)
        fits = value is None or 0 <= value <= 10**9
        require(fits, f"{at}.{name}", value, "0 to 1000000000")


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessSection:
    """Tokens, tenants and their quotas. Off: whoever reaches the port may do everything."""

    enabled: bool = False
    tokens_file: str | None = None
    """Tokens with their tenants and roles (docs/operations.md); read again when it changes."""
    jwt: JwtSection = field(default_factory=JwtSection)
    viewer_secret_env: str | None = None
    """Name of the variable that holds the secret of viewer tokens, the ones that go in a URL."""
    viewer_secret_file: str | None = None
    """The file that holds it, read again when it changes; one secret a line, the first signs."""
    viewer_token_s: float = 300.0
    """How long a viewer token holds if nothing shorter is asked for."""
    replica_secret_env: str | None = None
    """Name of the variable that holds what routers show to replicas."""
    replica_secret_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    """Pages of these origins may call the service from a browser: `https://app.example.com`."""
    quota: QuotaSection = field(default_factory=QuotaSection)
    quotas: tuple[TenantQuota, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.cors_origins:
            known = _ORIGIN.fullmatch(origin) is not None
            require(known, "access.cors_origins", origin, "scheme://host[:port], no path and no *")
        fits = 10 <= self.viewer_token_s <= 86400
        require(fits, "access.viewer_token_s", self.viewer_token_s, "10 to 86400 seconds")
        for kind in ("viewer", "replica"):
            env, file = (getattr(self, f"{kind}_secret_{where}") for where in ("env", "file"))
            key = f"access.{kind}_secret_file"
            require(env is None or file is None, key, file, f"not beside {kind}_secret_env")
        names = [q.tenant for q in self.quotas]
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, "access.quotas", twice, "one entry for each tenant")
        if self.enabled:
            self._check_complete()

    def _check_complete(self) -> None:
        """With access on, nothing that lets people in may be left to chance."""
        some = self.tokens_file is not None or self.jwt.jwks is not None
        require(some, "access.enabled", True, "name access.tokens_file or access.jwt.jwks")
        for kind in ("viewer", "replica"):
            named = getattr(self, f"{kind}_secret_env") or getattr(self, f"{kind}_secret_file")
            key = f"access.{kind}_secret_env"
            require(bool(named), key, None, f"name a variable, or {kind}_secret_file")
