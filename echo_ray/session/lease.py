"""An owner's view of its lease, by its own monotonic clock.

The store's deadline is `store time of the renewal + ttl`. The owner cannot read the store's clock,
but it knows when it sent the renewal, which was earlier; counting from there it always stops
before the store would let anybody else in. A process that was stopped and wakes up sees the time
that passed and finds its lease gone before it writes anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from echo_ray.session.records import Lease

GUARD = 0.1
"""Part of the ttl that an owner gives up, for clocks that do not run equally fast."""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """What the owner may still assume about one lease."""

    lease: Lease
    ttl_s: float
    sent_s: float
    """Own monotonic time just before the last successful claim or renewal was sent."""

    @property
    def valid_until_s(self) -> float:
        return self.sent_s + self.ttl_s * (1.0 - GUARD)

    def valid(self, now_s: float) -> bool:
        """Whether the owner may write at `now_s`."""
        return now_s < self.valid_until_s

    def renewed(self, sent_s: float) -> LeaseView:
        """The view after a renewal that was sent at `sent_s`; an older answer changes nothing."""
        return replace(self, sent_s=max(sent_s, self.sent_s))

    def renew_at_s(self, every_s: float) -> float:
        """When the next renewal should be sent."""
        return self.sent_s + every_s
