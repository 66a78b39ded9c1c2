"""Snapshot blobs as objects of an S3-compatible store: `PREFIX/sessions/SESSION/SNAPSHOT`.

The ids of snapshots carry the epoch they were made under and those of clips their digest, so no two
writers ever mean different bytes by one name. Conditional writes guard what remains: a request that
was given up, by this process or by an owner that has been fenced since, and that arrives late. It
finds another version than it expected and changes nothing.

Credentials come from the usual chain of boto3: environment, profile, workload identity, role.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from botocore.exceptions import ClientError

from echo_ray.errors import InvalidRequestError, StoreCorrupt, StoreUnavailable
from echo_ray.session import control_log
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage import s3_client
from echo_ray.storage.blob_names import check_ids, check_size
from echo_ray.storage.one_tier import OneTier
from echo_ray.storage.s3_calls import Deadline, S3Calls
from echo_ray.storage.s3_errors import (
    FAILURES,
    RIGHTS,
    Place,
    absent,
    denied,
    lost_race,
    meaning,
)
from echo_ray.storage.s3_upload import CHECKSUM, Uploader

_BATCH = 1000
_PIECE_BYTES = 2**20


class S3Snapshots(OneTier):
    """A `SweptStore` in the bucket `bucket`, safe for any number of threads and processes.

    `endpoint` names a server other than AWS, `path_style` puts the bucket into the path instead of
    the host name (MinIO, Ceph). `encryption` is one of `ENCRYPTIONS`. Every call is over after
    `timeout_s`, whatever the network does. Turn `conditional_writes` off for servers without them.
    Blobs of `multipart_threshold_bytes` and more go in parts, `threads` requests at a time.

    Making one sends nothing; `check` does. Raises `ConfigError` for arguments that cannot be.
    """

    name = "s3"

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "echo-ray",
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool = False,
        profile: str | None = None,
        encryption: str = "none",
        kms_key_id: str | None = None,
        conditional_writes: bool = True,
        limit_bytes: int = 2**30,
        multipart_threshold_bytes: int = 32 * 2**20,
        part_bytes: int = 8 * 2**20,
        threads: int = 8,
        timeout_s: float = 30.0,
    ) -> None:
        s3_client.check_place(bucket, prefix, endpoint)
        s3_client.check_sizes(
            limit_bytes=limit_bytes,
            multipart_threshold_bytes=multipart_threshold_bytes,
            part_bytes=part_bytes,
            threads=threads,
            timeout_s=timeout_s,
        )
        self._bucket = bucket
        self._prefix = prefix
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._place = Place(bucket, endpoint or f"AWS, region {region or 'by default'}")
        encrypted = s3_client.encryption_arguments(encryption, kms_key_id)
        self._client = s3_client.connect(
            endpoint=endpoint,
            region=region,
            path_style=path_style,
            profile=profile,
            threads=threads,
            timeout_s=timeout_s,
        )
        self._calls = S3Calls(self._place, threads=threads, timeout_s=timeout_s)
        self._uploader = Uploader(
            client=self._client,
            calls=self._calls,
            bucket=bucket,
            encryption=encrypted,
            conditional_writes=conditional_writes,
            multipart_threshold_bytes=multipart_threshold_bytes,
            part_bytes=part_bytes,
        )

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        check_ids(session_id, snapshot_id)
        check_size(snapshot_id, len(blob), self._limit_bytes)
        with self._translated("write", _named(session_id, snapshot_id)):
            self._uploader.write(
                self._key(session_id, snapshot_id), blob, Deadline(self._timeout_s)
            )

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        """Raises `SnapshotNotFound`; `StoreCorrupt` if the bytes are not those that were put."""
        check_ids(session_id, snapshot_id)
        named = _named(session_id, snapshot_id)
        deadline = Deadline(self._timeout_s)
        read = partial(self._read, self._key(session_id, snapshot_id), snapshot_id, deadline)
        with self._translated("read", named):
            try:
                blob, checksum = self._calls.run(read, deadline)
            except ClientError as error:
                if absent(error):
                    raise control_log.snapshot_not_found(session_id, snapshot_id) from error
                raise
        found = hashlib.sha256(blob).hexdigest()
        if found != checksum:
            raise StoreCorrupt(
                f"{named} in {self._place} is damaged: its {len(blob)} bytes have SHA-256 {found}, "
                f"its metadata entry {CHECKSUM!r} says {checksum!r}; write it again from a copy, "
                "with that entry, or delete it"
            )
        return blob

    def delete(self, session_id: str, snapshot_id: str) -> None:
        check_ids(session_id, snapshot_id)
        with self._translated("delete", _named(session_id, snapshot_id)):
            self._remove(self._key(session_id, snapshot_id), Deadline(self._timeout_s))

    def delete_session(self, session_id: str) -> None:
        check_ids(session_id)
        deadline = Deadline(self._timeout_s)
        named = f"the snapshots of session {session_id!r}"
        keys: list[str] = []
        with self._translated("list", named):
            for page in self._pages(self._folder(session_id), deadline):
                keys.extend(item["Key"] for item in page)
        with self._translated("delete", named):
            for start in range(0, len(keys), _BATCH):
                batch = partial(self._delete_batch, keys[start : start + _BATCH])
                self._calls.run(batch, deadline)

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        """All blobs, or those of one session, by key. Other objects of the bucket are passed over.

        Each page of 1000 may take `timeout_s`.
        """
        if session_id is not None:
            check_ids(session_id)
        root = self._folder()
        with self._translated("list", "the snapshots"):
            for page in self._pages(self._folder(session_id), None):
                for item in page:
                    session, _, snapshot = item["Key"][len(root) :].partition("/")
                    try:
                        check_ids(session, snapshot)
                    except InvalidRequestError:
                        continue
                    yield StoredBlob(
                        session_id=session,
                        snapshot_id=snapshot,
                        size_bytes=item["Size"],
                        stored_at=item["LastModified"].timestamp(),
                    )

    def check(self) -> None:
        """Prove with a probe object that the credentials may write, read, list and delete.

        Raises `StoreUnavailable` that names every right that is missing, or what else is wrong.
        """
        deadline = Deadline(self._timeout_s)
        key = f"{self._prefix}/check/{uuid.uuid4().hex}"
        probe = uuid.uuid4().bytes
        steps = {
            "write": partial(self._uploader.write, key, probe, deadline),
            "read": partial(self._probe_read, key, probe, deadline),
            "list": partial(self._probe_list, key, deadline),
            "delete": partial(self._remove, key, deadline),
        }
        missing = []
        for action, step in steps.items():
            with self._translated(action, "a probe object"):
                try:
                    step()
                except ClientError as error:
                    if not denied(error):
                        raise
                    missing.append(action)
            if action == "write" and not missing:
                self._probe_condition(key, deadline)
        if missing:
            rights = " and ".join(f"{action} ({RIGHTS[action]})" for action in missing)
            raise StoreUnavailable(
                f"the credentials may not {rights} under {self._prefix!r} in {self._place}; grant "
                "the rights to the identity of this process"
            )

    def close(self) -> None:
        """Let go of connections; requests under way end by themselves."""
        self._calls.close()
        self._client.close()

    def _probe_read(self, key: str, probe: bytes, deadline: Deadline) -> None:
        try:
            found, _ = self._calls.run(partial(self._read, key, "check", deadline), deadline)
        except ClientError as error:
            # Without the right to write there is nothing to read; being told so is a right too.
            if absent(error):
                return
            raise
        if found != probe:
            raise StoreUnavailable(
                f"{self._place} answers with other bytes than were written a moment before; it "
                "must be strongly consistent, and nothing may cache or change objects"
            )

    def _probe_list(self, key: str, deadline: Deadline) -> None:
        listing = partial(self._client.list_objects_v2, Bucket=self._bucket, Prefix=key, MaxKeys=1)
        self._calls.run(listing, deadline)

    def _probe_condition(self, key: str, deadline: Deadline) -> None:
        if not self._uploader.conditional_writes:
            return
        again = partial(
            self._client.put_object, Bucket=self._bucket, Key=key, Body=b"", IfNoneMatch="*"
        )
        with self._translated("write", "a probe object"):
            try:
                self._calls.run(again, deadline)
            except ClientError as error:
                if lost_race(error):
                    return
                raise
        raise StoreUnavailable(
            f"{self._place} ignores conditional writes (If-None-Match); update the server, or turn "
            "conditional_writes off"
        )

    def _read(self, key: str, snapshot_id: str, deadline: Deadline) -> tuple[bytes, str | None]:
        answer = self._client.get_object(Bucket=self._bucket, Key=key)
        blob = bytearray()
        with closing(answer["Body"]) as body:
            while piece := body.read(_PIECE_BYTES):
                blob += piece
                check_size(snapshot_id, len(blob), self._limit_bytes)
                if deadline.left() <= 0:
                    raise self._calls.late()
        return bytes(blob), answer["Metadata"].get(CHECKSUM)

    def _remove(self, key: str, deadline: Deadline) -> None:
        request = partial(self._client.delete_object, Bucket=self._bucket, Key=key)
        try:
            self._calls.run(request, deadline)
        except ClientError as error:
            if not absent(error):
                raise

    def _pages(self, prefix: str, deadline: Deadline | None) -> Iterator[Sequence[Any]]:
        asked = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": _BATCH}
        while True:
            listing = partial(self._client.list_objects_v2, **asked)
            answer = self._calls.run(listing, deadline or Deadline(self._timeout_s))
            yield answer.get("Contents", [])
            if not answer.get("IsTruncated"):
                return
            asked["ContinuationToken"] = answer["NextContinuationToken"]

    def _delete_batch(self, keys: Sequence[str]) -> None:
        answer = self._client.delete_objects(
            Bucket=self._bucket,
            Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
        )
        for failed in answer.get("Errors", []):
            # The request as a whole counts as done; make the first failure in it one of its own.
            status = 403 if failed.get("Code") == "AccessDenied" else 500
            told: Any = {"Error": failed, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise ClientError(told, "DeleteObjects")

    def _folder(self, session_id: str | None = None) -> str:
        root = f"{self._prefix}/sessions/"
        return root if session_id is None else f"{root}{session_id}/"

    def _key(self, session_id: str, snapshot_id: str) -> str:
        return f"{self._folder(session_id)}{snapshot_id}"

    @contextmanager
    def _translated(self, action: str, what: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise meaning(error, action, what, self._place) from error


def _named(session_id: str, snapshot_id: str) -> str:
    return f"snapshot {snapshot_id!r} of session {session_id!r}"
