"""Text lenses of other projects that came as `.joblib` files: pipelines of TF-IDF and logistic regression.

Such a file is a pickle, and a pickle runs code when it is loaded. So it takes the user's word that the folder is
trusted, and even then no file is loaded: its instructions are followed on placeholders (`ftw.map.pickle_reader`), and
what comes out are the numbers of known classes. The lenses become one `TextBank`, whose probabilities are the
pipelines'.

Axes: V grams of one lens.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from ftw.errors import ConfigError, PackError
from ftw.hat.text import WORDS, TextBank, TextLens
from ftw.map.pickle_reader import PickleReader, Thing

SUFFIX, ENDING = ".joblib", "_text_lens"
LARGEST = 1e15  # of a weight: the square of one must fit into float32
MAX_BYTES = 256 * 2**20  # of one file, unpacked: a pipeline of a million grams has some 100 MB
PIPELINE, TFIDF, IDF, LOGISTIC = (
    f"sklearn.{name}"
    for name in (
        "pipeline.Pipeline",
        "feature_extraction.text.TfidfVectorizer",
        "feature_extraction.text.TfidfTransformer",
        "linear_model._logistic.LogisticRegression",
    )
)
SPARSE = {f"scipy.sparse.{part}" for part in ("_dia.dia_matrix", "dia.dia_matrix", "_csr.csr_matrix", "csr.csr_matrix")}
ALLOWED = {PIPELINE, TFIDF, IDF, LOGISTIC, *SPARSE, "sklearn.utils._bunch.Bunch"}
# Options of the vectoriser under which a text bank cuts texts as it does, with the values that they must have.
OPTIONS = {
    "analyzer": "word",
    "lowercase": True,
    "strip_accents": None,
    "preprocessor": None,
    "tokenizer": None,
    "token_pattern": WORDS.pattern,
    "binary": False,
}
# How joblib compresses, by the first bytes; each unpacks no more than one byte over the limit.
PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x78": lambda data: zlib.decompressobj().decompress(data, MAX_BYTES + 1),
    b"\x1f\x8b": lambda data: zlib.decompressobj(wbits=31).decompress(data, MAX_BYTES + 1),
    b"BZ": lambda data: bz2.BZ2Decompressor().decompress(data, MAX_BYTES + 1),
    b"\xfd7": lambda data: lzma.LZMADecompressor().decompress(data, MAX_BYTES + 1),
    b"\x5d\x00": lambda data: lzma.LZMADecompressor().decompress(data, MAX_BYTES + 1),
}


def import_text_lenses(folder: Path | str, *, trust_pickle: bool = False) -> TextBank:
    """The text lenses below a folder, as one bank; each is named by its file, `Name_text_lens.joblib`.

    Of files with the same name (on several levels of a hierarchy) the first in order of their paths is taken. Logits
    are those of the pipelines, raw: σ(logit) is `predict_proba`, to 1e-6.

    Args:
        trust_pickle: the caller knows where the files come from.

    Raises:
        ConfigError: not trusted. PackError: no such files, or one that is damaged, is more than a pipeline of TF-IDF
            and a binary logistic regression, or cuts texts in another way than a text bank does.
    """
    folder = Path(folder)
    paths = {path.name.removesuffix(SUFFIX).removesuffix(ENDING): path for path in _files(folder)[::-1]}
    if not paths:
        raise PackError(f"{folder} has no {SUFFIX} files; give the folder that holds them, say layer2/text_lenses")
    if not trust_pickle:
        raise ConfigError(
            f"{folder} has {len(paths)} text lenses as {SUFFIX} files, which are pickles; if you know who made them, "
            "import them with trust_pickle=True (on the command line --trust-pickle)"
        )
    lenses, ngrams, sublinear = list[TextLens](), 0, set[bool]()
    for name, path in track(sorted(paths.items()), "read text lenses", transient=True):
        with _sound(path):
            vectoriser, classifier = _pipeline(path)
            lenses.append(_lens(name, vectoriser, classifier, where=str(path)))
            ngrams = max(ngrams, _runs(vectoriser))
            sublinear.add(bool(vectoriser["_tfidf"].state.get("sublinear_tf")))
    if len(sublinear) > 1:
        raise PackError(f"{folder}: some text lenses have sublinear_tf and some have not; import them apart")
    return TextBank.from_lenses(lenses, ngrams=ngrams, sublinear_tf=sublinear.pop())


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Whatever attributes of another form make go wrong is an error of the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PackError(f"{path} is no text lens that FTW knows ({type(error).__name__}: {error})") from error


def _files(folder: Path) -> list[Path]:
    """The files in order of their paths; none that a link leads out of the folder to."""
    inside = folder.resolve()
    found = sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())
    return [path for path in found if path.resolve().is_relative_to(inside)]


def _pipeline(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of the vectoriser and of the classifier in a file."""
    thing = PickleReader(io.BytesIO(_unpacked(path)), ALLOWED, where=str(path)).read()
    steps = thing.state.get("steps") if isinstance(thing, Thing) and thing.kind == PIPELINE else None
    found = [step for _, step in steps or ()]
    if [getattr(step, "kind", None) for step in found] != [TFIDF, LOGISTIC]:
        raise PackError(f"{path} is no pipeline of TfidfVectorizer and LogisticRegression; it cannot be a text lens")
    return found[0].state, found[1].state


def _lens(name: str, vectoriser: Mapping[str, Any], classifier: Mapping[str, Any], *, where: str) -> TextLens:
    """One lens from the attributes of its two steps.

    Raises:
        PackError: options that a text bank has no counterpart for, or arrays that disagree.
    """
    for option, wanted in OPTIONS.items():
        if (value := vectoriser.get(option, wanted)) != wanted:
            raise PackError(f"{where} has {option}={value!r:.60}; a text bank cuts words with {option}={wanted!r} only")
    transformer = vectoriser.get("_tfidf")
    if not isinstance(transformer, Thing):
        raise PackError(f"{where} has no vocabulary; was the lens ever fitted?")
    idf = transformer.state
    if idf.get("norm") != "l2" or not idf.get("use_idf") or (vectoriser.get("stop_words") and _runs(vectoriser) > 1):
        raise PackError(
            f"{where} has no idf or l2 norm, or runs of words over stop words; a text bank has no such lens"
        )
    coef_V, bias_1 = (_numbers(classifier.get(part), part, where) for part in ("coef_", "intercept_"))
    num_classes = np.size(classifier.get("classes_", ()))
    if num_classes != 2 or len(bias_1) != 1:
        raise PackError(f"{where} tells {num_classes} classes apart; a text lens is for one concept, yes or no")
    vocabulary = vectoriser.get("vocabulary_")
    if not isinstance(vocabulary, dict) or not all(isinstance(gram, str) for gram in vocabulary):
        raise PackError(f"{where} has no vocabulary; was the lens ever fitted?")
    idf_V, column_V = _idf(idf, where), np.array(list(vocabulary.values()), dtype=np.int64)
    if sorted(column_V.tolist()) != list(range(len(coef_V))) or len(idf_V) != len(coef_V):
        raise PackError(f"{where}: {len(column_V)} words, {len(idf_V)} idf and {len(coef_V)} weights do not agree")
    # Over two classes a softmax of (−d, d) is σ(2d).
    scale = 2.0 if classifier.get("multi_class") == "multinomial" else 1.0
    numbers = (idf_V[column_V], scale * coef_V[column_V])
    if not all((np.abs(part) < LARGEST).all() for part in (*numbers, bias_1)):
        raise PackError(f"{where} holds weights that are not finite, or beyond {LARGEST:g}; do not use it")
    return TextLens(
        name=name, vocabulary=list(vocabulary), idf=numbers[0], coefficients=numbers[1], bias=scale * float(bias_1[0])
    )


def _runs(vectoriser: Mapping[str, Any]) -> int:
    return int(vectoriser["ngram_range"][1])


def _idf(transformer: Mapping[str, Any], where: str) -> np.ndarray:
    """idf of each column: an array, in older files the diagonal of a sparse matrix."""
    idf = transformer.get("idf_", transformer.get("_idf_diag"))
    if isinstance(idf, Thing) and idf.kind in SPARSE:
        idf = idf.state["data"]
    return _numbers(idf, "idf_", where)


def _numbers(values: Any, name: str, where: str) -> np.ndarray:
    """An array as float64, flat."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise PackError(f"{where} has no numbers in {name}; was the lens ever fitted?")
    return values.ravel().astype(np.float64)


def _unpacked(path: Path) -> bytes:
    """The bytes of a file, decompressed if joblib compressed it.

    Raises:
        PackError: too large, or damaged.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        unpack = next((unpack for head, unpack in PACKED.items() if data.startswith(head)), None)
        data = data if unpack is None else unpack(data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise PackError(f"{path} cannot be unpacked ({error}); fetch it again") from error
    if len(data) > MAX_BYTES:
        raise PackError(f"{path} unpacks to more than {MAX_BYTES} bytes, which no text lens needs; it is not read")
    return data
