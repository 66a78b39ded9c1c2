"""What a failed S3 request means: whether to try it again, and the error of ours that says why.

Messages carry the server's code and text, the bucket, the endpoint and the remedy; never a key, a
signature or a body.
"""

from __future__ import annotations

from dataclasses import dataclass

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from echo_ray.errors import CapacityError, EchoError, StoreFull, StoreUnavailable

FAILURES = (BotoCoreError, ClientError, ResponseParserError, OSError, ValueError)
"""Everything that a request or the reading of its answer can raise (values: odd headers)."""

RIGHTS = {
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "delete": "s3:DeleteObject",
    "list": "s3:ListBucket",
}
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_PASSING = _BUSY | {"RequestTimeout", "OperationAborted", "BadDigest", "IncompleteBody"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_KEYS = {
    "InvalidAccessKeyId": "the access key is unknown there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the session token has run out",
    "InvalidToken": "the session token is not valid there",
    "TokenRefreshRequired": "the session token has run out",
}
_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the objects are, as messages name it."""

    bucket: str
    where: str
    """The endpoint, or the region of AWS."""

    def __str__(self) -> str:
        return f"bucket {self.bucket!r} at {self.where}"


def code_of(error: Exception) -> str:
    """The server's own code, e.g. `NoSuchKey`; empty if the server did not answer."""
    return str(error.response["Error"].get("Code", "")) if isinstance(error, ClientError) else ""


def status_of(error: Exception) -> int:
    """The HTTP status; 0 if the server did not answer."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def lost_race(error: Exception) -> bool:
    """Whether a conditional write was refused because the object is not as it was expected."""
    return status_of(error) == 412 or code_of(error) == "ConditionalRequestConflict"


def absent(error: Exception) -> bool:
    """Whether the object (and not the bucket) does not exist."""
    return status_of(error) == 404 and code_of(error) not in ("NoSuchBucket", "NoSuchUpload")


def denied(error: Exception) -> bool:
    """Whether known credentials lack a right; false for credentials that are wrong."""
    return status_of(error) == 403 and code_of(error) not in (_KEYS.keys() | _FULL)


def passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, ClientError):
        status, code = status_of(error), code_of(error)
        return code in _PASSING or status == 429 or (status >= 500 and status not in (501, 507))
    if isinstance(error, SSLError):
        return False
    return isinstance(
        error,
        HTTPClientError
        | IncompleteReadError
        | ResponseStreamingError
        | ConnectionError
        | TimeoutError,
    )


def meaning(error: Exception, action: str, what: str, place: Place) -> EchoError:
    """The error to raise for `error`, met when `action` (a key of `RIGHTS`) was done to `what`."""
    if isinstance(error, ClientError):
        return _answered(error, action, what, place)
    says = f"cannot {action} {what} in {place}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreUnavailable(
            f"{says}: no complete credentials were found; give the process an identity (workload "
            "identity, instance role), environment variables or a named profile"
        )
    if isinstance(error, SSLError):
        return StoreUnavailable(
            f"{says}: TLS failed ({error.kwargs.get('error', error)}); correct the endpoint's "
            "scheme or give its certificate authority in AWS_CA_BUNDLE"
        )
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return StoreUnavailable(
            f"{says}: no answer in time; see to the endpoint and the network", retry_after_s=_WAIT_S
        )
    if isinstance(error, EndpointConnectionError):
        return StoreUnavailable(
            f"{says}: the endpoint cannot be reached; see to its address, port and the network",
            retry_after_s=_WAIT_S,
        )
    if isinstance(error, ResponseParserError | ValueError):
        # Their text may repeat the answer.
        return StoreUnavailable(
            f"{says}: the answer is not that of an S3 server; correct the endpoint"
        )
    return StoreUnavailable(
        f"{says}: {type(error).__name__}: {error}; see to the endpoint and the network",
        retry_after_s=_WAIT_S,
    )


def _answered(error: ClientError, action: str, what: str, place: Place) -> EchoError:
    code, status = code_of(error), status_of(error)
    says = f"cannot {action} {what} in {place}"
    told = f"{status} {code}: {error.response['Error'].get('Message', '')}"
    if code in _FULL or status == 507:
        return StoreFull(f"{says}: it is full ({told}); raise its quota or delete old sessions")
    if code == "EntityTooLarge" or status == 413:
        return CapacityError(f"{says}: the server refuses its size ({told}); raise its limit")
    if code == "NoSuchBucket":
        return StoreUnavailable(
            f"{says}: the bucket does not exist; create it or correct the bucket's name ({told})"
        )
    if code in _REGION or status == 301:
        return StoreUnavailable(f"{says}: it lies in another region ({told}); correct the region")
    if code == "RequestTimeTooSkewed":
        return StoreUnavailable(f"{says}: this machine's clock is wrong ({told}); correct it")
    if code in _KEYS:
        return StoreUnavailable(
            f"{says}: {_KEYS[code]} ({status} {code}); correct the credentials of the process"
        )
    if denied(error):
        return StoreUnavailable(
            f"{says}: the credentials lack the right {RIGHTS[action]} ({told}); grant it, and "
            "s3:ListBucket, without which an object that is missing looks forbidden"
        )
    if status == 501:
        return StoreUnavailable(
            f"{says}: the server does not know how ({told}); turn off what it lacks "
            "(conditional writes, encryption)"
        )
    if code in _BUSY or status in (429, 503):
        return StoreUnavailable(
            f"{says}: the server asks to slow down ({told}), also after several tries; try later",
            retry_after_s=_WAIT_S,
        )
    if status >= 500:
        return StoreUnavailable(
            f"{says}: the server failed ({told}), also after several tries; see to it",
            retry_after_s=_WAIT_S,
        )
    return StoreUnavailable(f"{says}: refused ({told}); correct the settings of the store")
