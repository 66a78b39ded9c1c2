"""The route that makes viewer tokens: short-lived leave to watch one session."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field

from echo_ray.config_access import AccessSection
from echo_ray.errors import ConflictError
from echo_ray.serve.access import visit_of
from echo_ray.serve.schemas import REFUSALS, Request

LONGEST_S = 86400.0


class ViewerTokenRequest(Request):
    ttl_s: float | None = Field(
        None,
        ge=1,
        le=LONGEST_S,
        description="seconds until it runs out; access.viewer_token_s if missing, and at most that",
    )


class ViewerTokenView(BaseModel):
    token: str = Field(description="as a bearer token, or as `?token=` of the watching routes")
    session: str
    expires_at: float


def access_routes(section: AccessSection) -> APIRouter:
    """The routes that hand out tokens."""
    routes = APIRouter(responses=REFUSALS, tags=["access"])

    @routes.post("/v1/sessions/{session_id}/viewer-tokens", status_code=201)
    async def make_viewer_token(
        session_id: str, request: HttpRequest, body: ViewerTokenRequest | None = None
    ) -> ViewerTokenView:
        """A token that lets somebody watch this session, and nothing else, for a while."""
        visit = visit_of(request.scope)
        tenant = visit.principal.tenant
        if tenant is None:
            raise ConflictError(
                "access is off (access.enabled): anybody may watch, no token needed"
            )
        asked_s = body.ttl_s if body and body.ttl_s is not None else section.viewer_token_s
        ttl_s = min(asked_s, section.viewer_token_s)
        token, until = visit.access.viewers.mint(session_id, tenant, visit.principal.name, ttl_s)
        return ViewerTokenView(token=token, session=session_id, expires_at=until)

    return routes
