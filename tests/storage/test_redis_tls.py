"""TLS to the server: certificates that a test's own authority signed, through a real handshake."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fakes import FakeClock
from redis_server import RedisProcess, Wire
from stored import owned, produce

from echo_ray.errors import StoreUnavailable
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer


@dataclass
class Authority:
    """Makes certificates, and writes them where they are asked for."""

    folder: Path

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("test authority")
        self._write("ca", self._name, self._key, authority=True)
        self.ca_file = str(self.folder / "ca.pem")

    def issue(self, name: str, host: str = "127.0.0.1") -> tuple[str, str]:
        """Files of a certificate for `host` and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        self._write(name, _name(name), key, host=host)
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")

    def _write(
        self,
        file: str,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        authority: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        own = self._key.public_key()
        alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(alternative, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), False)
        )
        signed = builder.sign(self._key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        (self.folder / f"{file}.pem").write_bytes(signed.public_bytes(pem))
        raw = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.folder / f"{file}.key").write_bytes(raw)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def wire(
    redis_server: RedisProcess, authority: Authority, request: pytest.FixtureRequest
) -> Iterator[Wire]:
    """The server behind TLS; the marker's argument is the host its certificate is for."""
    host, ask_client = getattr(request, "param", ("127.0.0.1", False))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server", host))
    if ask_client:
        context.load_verify_locations(authority.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    made = Wire(redis_server.port, context)
    yield made
    made.close()


def there(wire: Wire, **options: str) -> RedisServer:
    return RedisServer(url=f"rediss://127.0.0.1:{wire.port}/0", timeout_s=10, **options)  # type: ignore[arg-type]


def works(server: RedisServer) -> None:
    directory = RedisDirectory(server, FakeClock(), prefix=f"tls-{server.url.rsplit(':')[-1][:5]}")
    produce(directory, owned(directory), 0)
    assert directory.get("s1").next_index == 1
    directory.close()


def test_a_server_with_a_certificate_of_the_authority_is_trusted(
    wire: Wire, authority: Authority
) -> None:
    works(there(wire, ca_file=authority.ca_file))


def test_a_server_nobody_vouches_for_is_refused(
    wire: Wire, authority: Authority, tmp_path: Path
) -> None:
    for options in ({}, {"ca_file": Authority(tmp_path).ca_file}):
        with pytest.raises(StoreUnavailable, match=r"check rediss:// and storage\.redis\.ca_file"):
            works(there(wire, **options))


@pytest.mark.parametrize("wire", [("10.1.2.3", False)], indirect=True)
def test_a_certificate_for_another_host_is_refused(wire: Wire, authority: Authority) -> None:
    with pytest.raises(StoreUnavailable, match="certificate"):
        works(there(wire, ca_file=authority.ca_file))


@pytest.mark.parametrize("wire", [("127.0.0.1", True)], indirect=True)
def test_a_server_that_asks_for_a_certificate_gets_ours(wire: Wire, authority: Authority) -> None:
    with pytest.raises(StoreUnavailable):
        works(there(wire, ca_file=authority.ca_file))
    cert_file, key_file = authority.issue("client")
    works(there(wire, ca_file=authority.ca_file, cert_file=cert_file, key_file=key_file))


def test_a_server_without_tls_is_named(redis_server: RedisProcess, authority: Authority) -> None:
    url = f"rediss://127.0.0.1:{redis_server.port}/0"
    server = RedisServer(url=url, ca_file=authority.ca_file, timeout_s=2)
    with pytest.raises(StoreUnavailable, match=f"{redis_server.port}"):
        works(server)


def test_a_file_that_is_not_there_is_named(wire: Wire) -> None:
    with pytest.raises(StoreUnavailable, match=r"storage\.redis"):
        works(there(wire, ca_file="/nowhere/ca.pem"))
