"""Who vouches for a pack: a signature over its manifest, which holds the hash of every other file.

A hash shows that files are whole, not who wrote them. The OpenSSF's `model-signing` writes and checks the signature
(pip install "ftw-lenses[sign]") with an elliptic-curve key pair in PEM files, of which you must know otherwise whose it
is. A pack of which some levels were fetched is verified like a whole one.
"""

from pathlib import Path
from types import ModuleType

from ftw.errors import FTWError, PackError
from ftw.map.manifest import NAME
from ftw.map.verified import verify_pack

SIGNATURE = "MANIFEST.sig"


def sign_pack(folder: Path, private_key: Path) -> Path:
    """Sign a lens pack with a private key; the signature's file, which belongs to the pack.

    Raises:
        PackError: the pack is damaged. FTWError: no such key, or model-signing is not installed.
    """
    verify_pack(folder)
    signing = _library().signing
    target = folder / SIGNATURE
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=_key(private_key))
        config.sign(folder / NAME, target)
    except (ValueError, TypeError, OSError) as error:
        raise FTWError(
            f"cannot sign with {private_key}: {error}; give a private key of an elliptic curve (PEM)"
        ) from error
    return target


def verify_signature(folder: Path, public_key: Path) -> None:
    """Check that a pack is the one that the owner of a key signed.

    Raises:
        PackError: it is not signed, by another key, or was changed since. FTWError: no such key, or no model-signing.
    """
    if not (folder / SIGNATURE).is_file():
        raise PackError(f"pack {folder} has no {SIGNATURE}: nobody signed it, or the signature was taken away")
    verifying = _library().verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=_key(public_key))
        config.verify(folder / NAME, folder / SIGNATURE)
    except Exception as error:  # the library raises several kinds for a signature that does not fit
        raise PackError(
            f"the signature of pack {folder} is not one of {public_key} over these files ({error}); do not trust it"
        ) from error
    verify_pack(folder)


def _key(path: Path) -> Path:
    if not path.is_file():
        raise FTWError(f"there is no key {path}; make one with: openssl ecparam -name prime256v1 -genkey -noout")
    return path


def _library() -> ModuleType:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise FTWError('signatures need model-signing; install it with: pip install "ftw-lenses[sign]"') from error
    return model_signing
