"""Detached Ed25519 signatures, in files that openssl reads too.

    FILE.sig        64 bytes
    FILE.pub.pem    the public key that verifies it; who holds the private one is not in it

`cryptography` is an optional extra, needed to sign and to check a signature.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from llmeraser_jax.deletion.findings import Finding

SIGNATURE_SUFFIX = ".sig"
PUBLIC_KEY_SUFFIX = ".pub.pem"


class SignatureError(ValueError):
    """A key that cannot be used."""


def load_private_key(path: str | os.PathLike[str]) -> Any:
    """An Ed25519 private key without a passphrase, in PEM (PKCS #8) or OpenSSH's format.

    Raises:
        FileNotFoundError: there is no such file.
        SignatureError: the file is no such key.
        ImportError: `cryptography` is missing.
    """
    content = Path(path).read_bytes()
    from_pem, from_ssh = _serialization("load_pem_private_key", "load_ssh_private_key")
    try:
        key = (from_ssh if b"OPENSSH PRIVATE KEY" in content else from_pem)(content, password=None)
    except (ValueError, TypeError) as error:
        reason = "has a passphrase" if "assword" in str(error) else "is no private key in PEM or OpenSSH's format"
        msg = f"{path} {reason}; `openssl genpkey -algorithm ed25519 -out KEY.pem` makes one."
        raise SignatureError(msg) from error
    if type(key).__name__ != "Ed25519PrivateKey":
        msg = f"{path} is no Ed25519 key; `openssl genpkey -algorithm ed25519 -out KEY.pem` makes one."
        raise SignatureError(msg)
    return key


def fingerprint(key: Any) -> str:
    """SHA-256 (hex) of the 32 bytes of a public key, or of a private key's public one."""
    public = key.public_key() if hasattr(key, "public_key") else key
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def sign_file(path: Path, key: Any) -> None:
    """Writes `path.sig` and `path.pub.pem` beside a file."""
    encoding, layout = _serialization("Encoding", "PublicFormat")
    public = key.public_key().public_bytes(encoding.PEM, layout.SubjectPublicKeyInfo)
    path.with_name(path.name + SIGNATURE_SUFFIX).write_bytes(key.sign(path.read_bytes()))
    path.with_name(path.name + PUBLIC_KEY_SUFFIX).write_bytes(public)


def check_signature(path: Path, public_key: str | os.PathLike[str] | None = None) -> Finding:
    """Whether a file is what was signed, and by which key.

    Args:
        path: the file; its signature and key lie beside it.
        public_key: a PEM file with the key that must have signed it; None takes any.

    Raises:
        SignatureError: `public_key` is no Ed25519 key.
        ImportError: `cryptography` is missing.
    """
    name = f"signature of {path.name}"
    signature = path.with_name(path.name + SIGNATURE_SUFFIX)
    beside = path.with_name(path.name + PUBLIC_KEY_SUFFIX)
    if not signature.is_file():
        return Finding(name, False, "it is not signed")
    given = load_public_key(Path(public_key)) if public_key is not None else None
    try:
        own = load_public_key(beside)
    except (FileNotFoundError, SignatureError) as error:
        if given is None:
            return Finding(name, False, f"the key that signed it cannot be read: {error}")
        own = given
    if given is not None and fingerprint(given) != fingerprint(own):
        wrong = f"it is signed with the key {fingerprint(own)[:16]}, and {public_key} is {fingerprint(given)[:16]}"
        return Finding(name, False, wrong)
    from cryptography.exceptions import InvalidSignature

    try:
        own.verify(signature.read_bytes(), path.read_bytes())
    except InvalidSignature:
        return Finding(name, False, f"the file is not what the key {fingerprint(own)[:16]} signed")
    whose = "" if given is not None else "; whose key that is, is not checked: give --public-key"
    return Finding(name, True, f"signed with the key {fingerprint(own)[:16]}{whose}")


def load_public_key(path: Path) -> Any:
    """An Ed25519 public key in PEM.

    Raises:
        FileNotFoundError: there is no such file.
        SignatureError: the file is no such key.
    """
    (from_pem,) = _serialization("load_pem_public_key")
    try:
        key = from_pem(path.read_bytes())
    except ValueError as error:
        msg = f"{path} is no public key in PEM."
        raise SignatureError(msg) from error
    if type(key).__name__ != "Ed25519PublicKey":
        msg = f"{path} is a {type(key).__name__}; an Ed25519 public key is needed."
        raise SignatureError(msg)
    return key


def _serialization(*names: str) -> tuple[Any, ...]:
    """Parts of `cryptography`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        msg = "Signatures need the package cryptography: pip install 'llmeraser-jax[certificate]'."
        raise ImportError(msg) from error
    return tuple(getattr(serialization, name) for name in names)
