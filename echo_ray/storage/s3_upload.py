"""Writing one object to S3: in one request or in parts, whole or not there.

A write says what it expects to find: nothing, or the very version it replaces. So a request that
was given up and is carried out late never covers anything written after it.
"""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from botocore.exceptions import ClientError

from echo_ray.errors import StoreUnavailable
from echo_ray.storage.s3_calls import Deadline, S3Calls
from echo_ray.storage.s3_errors import FAILURES, absent, lost_race

CHECKSUM = "sha256"
"""Name of the metadata entry that holds the hexadecimal SHA-256 of an object's bytes."""
_RACES = 3
_ABORT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploader:
    """Writes objects into one bucket."""

    client: Any
    calls: S3Calls
    bucket: str
    encryption: dict[str, Any]
    """Arguments of every request that begins an object."""
    conditional_writes: bool
    multipart_threshold_bytes: int
    part_bytes: int

    def write(self, key: str, blob: bytes, deadline: Deadline) -> None:
        """Make `blob` the object's bytes. Raises what S3 raises, and `StoreUnavailable`."""
        if not self.conditional_writes:
            self._write(key, blob, {}, deadline)
            return
        expected = {"IfNoneMatch": "*"}
        for _ in range(_RACES):
            try:
                self._write(key, blob, expected, deadline)
                return
            except ClientError as error:
                replaced_is_gone = "IfMatch" in expected and absent(error)
                if not lost_race(error) and not replaced_is_gone:
                    raise
            version = self._version(key, deadline)
            expected = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        raise StoreUnavailable(
            f"object {key!r} was changed by others during each of {_RACES} tries; try again",
            retry_after_s=1,
        )

    def _write(self, key: str, blob: bytes, expected: dict[str, str], deadline: Deadline) -> None:
        first: dict[str, Any] = {
            "Bucket": self.bucket,
            "Key": key,
            "Metadata": {CHECKSUM: hashlib.sha256(blob).hexdigest()},
            **self.encryption,
        }
        if len(blob) >= self.multipart_threshold_bytes:
            self._write_parts(first, blob, expected, deadline)
            return
        request = partial(
            self.client.put_object, Body=blob, ChecksumSHA256=_sha256(blob), **first, **expected
        )
        self.calls.run(request, deadline)

    def _write_parts(
        self, first: dict[str, Any], blob: bytes, expected: dict[str, str], deadline: Deadline
    ) -> None:
        begin = partial(self.client.create_multipart_upload, ChecksumAlgorithm="SHA256", **first)
        # What is left behind must still be cleared away before the whole call is late.
        work = Deadline(deadline.left() - min(_ABORT_S, deadline.left() / 4))
        upload = {
            "Bucket": self.bucket,
            "Key": first["Key"],
            "UploadId": self.calls.run(begin, work)["UploadId"],
        }
        running: list[Future[dict[str, Any]]] = []
        try:
            view = memoryview(blob)
            for number, start in enumerate(range(0, len(blob), self.part_bytes), 1):
                piece = view[start : start + self.part_bytes]
                send = partial(self._send_part, upload, number, piece)
                running.append(self.calls.start(send, work))
            parts = [self.calls.wait(part, work) for part in running]
            finish = partial(
                self.client.complete_multipart_upload,
                MultipartUpload={"Parts": parts},
                **upload,
                **expected,
            )
            self.calls.run(finish, work)
        except BaseException:
            work.cancel()
            self._abort(upload, running, deadline)
            raise

    def _send_part(self, upload: dict[str, Any], number: int, piece: memoryview) -> dict[str, Any]:
        body = bytes(piece)
        checksum = _sha256(body)
        answer = self.client.upload_part(
            PartNumber=number, Body=body, ChecksumSHA256=checksum, **upload
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

    def _abort(
        self, upload: dict[str, Any], running: list[Future[dict[str, Any]]], deadline: Deadline
    ) -> None:
        for part in running:
            part.cancel()
        # A part that arrives after the abort could lie in the bucket, unseen and paid for.
        wait(running, timeout=max(0.0, deadline.left() / 2))
        with suppress(StoreUnavailable, *FAILURES):
            self.calls.run(partial(self.client.abort_multipart_upload, **upload), deadline)

    def _version(self, key: str, deadline: Deadline) -> str | None:
        head = partial(self.client.head_object, Bucket=self.bucket, Key=key)
        try:
            version: str = self.calls.run(head, deadline)["ETag"]
        except ClientError as error:
            if absent(error):
                return None
            raise
        return version


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
