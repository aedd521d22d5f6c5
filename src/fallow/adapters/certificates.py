"""Certificates for the broker where the operator brings none: an authority of our own, and a server's certificate that it signs."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fallow.adapters.files import make_folder, write_private
from fallow.model.errors import BadSetting, StartFailed

AUTHORITY_DAYS = 3_652
SERVER_DAYS = 397
"""The longest that common clients take from a public authority; ours follows it."""
RENEW_DAYS = 30
"""A certificate with less than this left is made anew at the next start."""
BACKDATED = datetime.timedelta(hours=1)
"""Clocks that are late by less than this take a new certificate at once."""
HOSTS_MAX = 64


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A server's certificate, with those above it, and its key: two PEM files."""

    certificate: Path
    key: Path


def kept_certificate(folder: Path, hosts: Sequence[str], *, now: datetime.datetime | None = None) -> TlsFiles:
    """A certificate for these names and addresses, signed by the folder's own authority; both are made or renewed as needed.

    Raises BadSetting for a host that is neither a name nor an address, StartFailed if the files can't be read or written.
    """
    if not 0 < len(hosts) <= HOSTS_MAX:
        raise BadSetting(f"a certificate is for 1 to {HOSTS_MAX} hosts; {len(hosts)} were given")
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    folder = make_folder(folder)
    names = [_name(host) for host in sorted(set(hosts))]
    authority, authority_key = _authority(folder, now)
    files = TlsFiles(certificate=folder / "server.pem", key=folder / "server.key")
    if files.certificate.exists() and files.key.exists() and _still_fits(_certificate(files.certificate), authority, names, now):
        return files
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fallow broker")])
    usage = _usage(digital_signature=True)
    made = (
        _builder(subject, authority.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    write_private(files.key, _key_pem(key))
    write_private(files.certificate, _pem(made) + _pem(authority))
    return files


def ca_pem(folder: Path) -> str:
    """The authority's certificate, which clients are given; raises StartFailed if there is none yet."""
    return _text(folder / "authority.pem")


def _authority(folder: Path, now: datetime.datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The folder's authority. It is renewed with its key kept only when it runs out, since all who trust it must be told."""
    path, key_path = folder / "authority.pem", folder / "authority.key"
    if path.exists() and key_path.exists():
        kept, kept_key = _certificate(path), _key(key_path)
        if kept.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS) and kept.public_key() == kept_key.public_key():
            return kept, kept_key
    key = _key(key_path) if key_path.exists() else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fallow authority of this hub")])
    made = (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(key_path, _key_pem(key))
    write_private(path, _pem(made))
    return made, key


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now - BACKDATED + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not host.isascii() or not host or any(char in host for char in " /:@\t\n"):
        raise BadSetting(f"{host[:80]!r} is no host that a certificate can name: an address or a name in ASCII is expected")
    return x509.DNSName(host)


def _still_fits(kept: x509.Certificate, authority: x509.Certificate, names: Sequence[x509.GeneralName], now: datetime.datetime) -> bool:
    """Whether a certificate is for exactly these names, signed by this authority, and good for a while."""
    named = kept.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if kept.not_valid_after_utc - now < datetime.timedelta(days=RENEW_DAYS) or list(named) != list(names):
        return False
    try:
        kept.verify_directly_issued_by(authority)
    except Exception:  # noqa: BLE001  (whatever is wrong with it, it doesn't fit)
        return False
    return True


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_text(path).encode())
    except ValueError:
        raise StartFailed(f"{path} is no certificate; remove it, and a new one is made") from None


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_text(path).encode(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StartFailed(f"{path} is no key of ours; remove it, and a new one is made")
    return key


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise StartFailed(f"could not read {path}: {error.strerror}") from None


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption()).decode()
