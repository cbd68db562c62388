"""A signature holds for the files that were signed, by the key that signed them, and for nothing else."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from toy_pack import make_pack

from ftw.errors import FTWError, PackError
from ftw.map.manifest import write_manifest
from ftw.map.pack import load_pack
from ftw.map.signing import SIGNATURE, sign_pack, verify_signature

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private key and its public one, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(key.private_bytes(*form))
    spki = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(key.public_key().public_bytes(*spki))
    return private, public


def test_a_signed_pack_verifies_by_its_key_and_by_no_other(tmp_path: Path):
    folder = make_pack(whole=False).save(tmp_path / "pack")
    private, public = make_keys(tmp_path, "mine")
    with pytest.raises(PackError, match="nobody signed it"):
        verify_signature(folder, public)
    sign_pack(folder, private)
    verify_signature(folder, public)
    assert load_pack(folder).names
    with pytest.raises(PackError, match="do not trust it"):
        verify_signature(folder, make_keys(tmp_path, "other")[1])
    with pytest.raises(FTWError, match="no key"):
        sign_pack(folder, tmp_path / "none.pem")
    (folder / "layer1" / "results.json").write_text("{}")
    with pytest.raises(PackError, match=r"results\.json"):
        verify_signature(folder, public)
    write_manifest(folder)  # an attacker writes fitting hashes
    with pytest.raises(PackError, match="do not trust it"):
        verify_signature(folder, public)
    (folder / SIGNATURE).write_text("{}")
    with pytest.raises(PackError, match="do not trust it"):
        verify_signature(folder, public)
