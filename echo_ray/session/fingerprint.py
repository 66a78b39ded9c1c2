"""Whether an engine may go on with a session that another one made: by fingerprint and policy.

A fingerprint is `MODEL/IDENTITY/NUMERICS`. The first two say what is computed (preset with its
dtype, weights, code epoch); the last how it is rounded (kind of device, threads, libraries, whose
attention, precision).
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto

from echo_ray.errors import NoReplica

RETRY_UNFIT_S = 10.0


class ResumePolicy(StrEnum):
    """Who may go on with a session."""

    EXACT = "exact"
    """Only an engine that makes the same bits."""
    COMPATIBLE = "compatible"
    """Any engine of the same model; where it rounds otherwise, viewers get the mark."""


class NoFittingReplica(NoReplica):
    """Replicas run, but none that may go on with this session; it waits, and nothing is lost."""


class Fit(Enum):
    """How an engine stands to what made a session's last chunk."""

    SAME = auto()
    OTHER_NUMERICS = auto()
    OTHER_MODEL = auto()


def fit(made_by: str | None, engine: str) -> Fit:
    """How `engine` stands to `made_by` (None: nothing is made yet; empty: an older release)."""
    if not made_by or not engine or made_by == engine:
        return Fit.SAME
    same = model_of(made_by) == model_of(engine)
    return Fit.OTHER_NUMERICS if same else Fit.OTHER_MODEL


def allows(policy: ResumePolicy, found: Fit) -> bool:
    """Whether an engine that stands so may go on with the session."""
    return found is Fit.SAME or (found is Fit.OTHER_NUMERICS and policy is ResumePolicy.COMPATIBLE)


def model_of(fingerprint: str) -> str:
    """All of a fingerprint but the numerics."""
    return fingerprint.rsplit("/", 1)[0]


def unfit(made_by: str, engine: str) -> NoFittingReplica:
    """The refusal of an engine that may not go on with what `made_by` made."""
    if fit(made_by, engine) is Fit.OTHER_MODEL:
        why, remedy = "other weights or other code", "run the release that made it"
    else:
        differs = "another kind of device, other libraries or another precision"
        why = f"{differs}, and session.resume_policy is exact"
        remedy = "run one like it, or set compatible to go on with a mark"
    return NoFittingReplica(
        f"the session was made by {made_by}, here runs {engine}: {why}; it waits, nothing is lost: "
        f"{remedy}",
        retry_after_s=RETRY_UNFIT_S,
    )
