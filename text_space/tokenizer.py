"""From text to words, the same in training, in inference and for a query typed later.

The order is the authors':

1. The first sentences of a text.
2. Their words in lower case, without markup, punctuation, stop words and short words.
3. Of these the words that Doc2Vec knows, between a start and an end token.

No script is transliterated. Chinese is segmented with rjieba. Japanese, Thai, Lao, Khmer and Burmese are written
without blanks too, and have no segmenter here: their words are all overlapping pairs of characters.

The libraries that only some texts need (nltk, rjieba, stop-words) are imported where they are used.
"""

import functools
import html
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.schema import Text
from pipeline.work import Work
from text_space.english import ENGLISH_STOP_WORDS

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktLanguageVars

SPECIAL_WORDS = ("<pad>", "<start>", "<end>")
"""The first three entries of every vocabulary. No text contains them, because words have neither < nor >."""
PAD, START, END = range(3)

RULED = ("zh", "ja")
"""Languages in which 。 and the like always end a sentence, so that Punkt has nothing to learn."""
UNSEGMENTED = ("ja", "th", "lo", "km", "my")
"""Languages written without blanks that have no segmenter here."""
SHORT_WORDS = ("zh", "ko", *UNSEGMENTED)
"""Languages with words of one or two characters, where `text.min_word_length: null` means 1 and not 3."""

_HIDDEN = regex.compile(r"<!--|<(script|style)\b[^<>]*>", regex.IGNORECASE)
_HIDDEN_ENDS = {
    kind: regex.compile(end, regex.IGNORECASE)
    for kind, end in (("comment", "-->"), ("script", r"</script\s*>"), ("style", r"</style\s*>"))
}
_TAG = regex.compile(r"</?[a-z][^<>]*>|<[!?][^<>]*>", regex.IGNORECASE)
# Sorting n marks on one letter takes n² steps. UAX 15 allows 30 in text that is sent in pieces.
_STACKED = regex.compile(r"(\p{M}{30})\p{M}+")
# Soft hyphens, byte order marks, and marks that turn a digit or symbol into an emoji.
_INVISIBLE = regex.compile(r"[\u00ad\u2060\ufeff\ufe00-\ufe0f\U000e0100-\U000e01ef\p{Me}]")
# A run of letters, digits and their marks. Joiners inside belong to it (Persian, Malayalam). So do apostrophes until
# stop words are dropped: "won't" is one, "won" is not.
_RUN = r"[\p{L}\p{N}][\p{L}\p{N}\p{Mn}\p{Mc}]*"
_RUN_WITH_JOINERS = rf"{_RUN}(?:[\u200c\u200d]{_RUN})*"
_WORD = regex.compile(rf"{_RUN_WITH_JOINERS}(?:['’]{_RUN_WITH_JOINERS})*")
_UNSPACED_SCRIPT = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")

# A blank line ends a sentence, as behind a headline without a full stop. A single line break may only wrap a line.
_BLANK_LINE = regex.compile(r"\n\s*\n")
_RULED_SENTENCE = regex.compile(r"[^。！？；…｡!?\n]*(?:[。！？；…｡!?]+[”’」』）》】〉\"')\]]*|\n|$)")
# Punkt's own three, then Devanagari, Arabic, Urdu, Armenian, Ethiopic, Burmese, Khmer, Tibetan, Chinese.
_SENTENCE_ENDS = (".", "?", "!", "।", "॥", "؟", "۔", "։", "።", "၊", "။", "។", "།", "。", "！", "？")

_LAST_BLANK = regex.compile(r"(?r)\s")

PUNKT_CHARACTERS = 5_000_000
"""Characters that Punkt is trained on. They contain the usual abbreviations, and a megabyte takes 2.4 s."""
PIECE, LONGEST_SENTENCE = 2_000, 32_000
"""Characters that Punkt splits at a time, at first and at most. A longer sentence is cut.

NLTK ends a match after five seconds of wall time. 32,000 characters take Punkt half a second at most.
"""
_LONGEST_LINE = 100_000  # characters that the trainer's regular expression gets at a time
_LONG_LINE = regex.compile(rf"([^\n]{{{_LONGEST_LINE}}}\S{{,1000}})\s*")
_PUNKT_PART = 500_000  # characters whose tokens the trainer has in memory at a time


def primary_language(language: str) -> str:
    """ISO 639-1 code without region or script: `zh` for `zh-Hans` and `ZH_cn`."""
    return language.replace("_", "-").split("-")[0].lower()


def strip_markup(text: str) -> str:
    """`text` without HTML entities (escaped once or twice), comments, scripts, styles and tags."""
    text = html.unescape(html.unescape(text))
    return _TAG.sub(" ", _shown(text))


def _shown(text: str) -> str:
    """`text` without comments, scripts and styles. One that never ends stays.

    A single regular expression would search the rest of the text for the end of every beginning, in n² steps.
    """
    kept, at, endless = [], 0, set()
    for found in _HIDDEN.finditer(text):
        kind = "comment" if found[1] is None else "script" if len(found[1]) == 6 else "style"
        if found.start() < at or kind in endless:
            continue
        if end := _HIDDEN_ENDS[kind].search(text, found.end()):
            kept.append(text[at : found.start()])
            at = end.end()
        else:
            endless.add(kind)
    return " ".join([*kept, text[at:]])


def stop_words(language: str) -> frozenset[str]:
    """Stop words of a language, in lower case and with ' as apostrophe. Empty where no list is known."""
    if language == "en":
        return ENGLISH_STOP_WORDS
    from stop_words import LANGUAGE_MAPPING, get_stop_words

    listed = get_stop_words(language) if language in LANGUAGE_MAPPING else []
    return frozenset(_normalise(word).replace("’", "'") for word in listed)


def _normalise(text: str) -> str:
    """One spelling for what looks the same (full-width letters, ligatures, composed accents), in lower case."""
    if not text.isascii():
        text = _STACKED.sub(r"\1", text)
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).lower()


# Sentences


def _language_variables() -> "PunktLanguageVars":
    from nltk.tokenize.punkt import PunktLanguageVars

    class LanguageVariables(PunktLanguageVars):
        sent_end_chars = _SENTENCE_ENDS

    return LanguageVariables()


def train_punkt(texts: Iterable[str], language: str) -> dict[str, Any]:
    """Learn from raw texts where sentences end. Returns the content of `punkt.json`, which `Tokenizer` takes.

    Its keys are `language` and, unless that is one of RULED, `abbreviations` and `sentence_starters` (lists of str),
    `collocations` (list of pairs) and `orthographic_context` (bits by word). All are sorted.
    """
    language = primary_language(language)
    if language in RULED:
        return {"language": language}
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer(lang_vars=_language_variables())
    part: list[str] = []
    length = total = 0
    for text in texts:
        part.append(_LONG_LINE.sub(r"\1\n", strip_markup(text)))
        length += len(part[-1])
        if length >= _PUNKT_PART:
            trainer.train("\n\n".join(part), finalize=False)
            total, length, part = total + length, 0, []
            if total >= PUNKT_CHARACTERS:
                break
    trainer.train("\n\n".join(part), finalize=False)
    learnt = trainer.get_params()
    return {
        "language": language,
        "abbreviations": sorted(learnt.abbrev_types),
        "sentence_starters": sorted(learnt.sent_starters),
        "collocations": sorted(map(list, learnt.collocations)),
        "orthographic_context": dict(sorted(learnt.ortho_context.items())),
    }


def _punkt_splitter(parameters: dict[str, Any]) -> Callable[[str], Iterator[str]]:
    """A function from a paragraph to its sentences, lazily, by parameters that `train_punkt` returned."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    learnt = PunktParameters()
    learnt.abbrev_types.update(parameters.get("abbreviations", []))
    learnt.sent_starters.update(parameters.get("sentence_starters", []))
    learnt.collocations.update(map(tuple, parameters.get("collocations", [])))
    learnt.ortho_context.update(parameters.get("orthographic_context", {}))
    punkt = PunktSentenceTokenizer(learnt, lang_vars=_language_variables())
    return functools.partial(_in_pieces, punkt.span_tokenize)


def _in_pieces(split: Callable[[str], Iterator[tuple[int, int]]], text: str) -> Iterator[str]:
    """The sentences of `text` that may have a word, lazily. `split` gives the spans of a piece's sentences.

    They are those of the whole text where none is longer than LONGEST_SENTENCE. A piece ends at a blank, and its last
    sentence, which may go on, begins the next piece. The work grows with the text, and not with its square.
    """
    start, size = 0, PIECE
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text) and (blank := _LAST_BLANK.search(text, start + 1, end + 1)):
            end = blank.start()
        piece = text[start:end]
        spans = list(split(piece)) if _WORD.search(piece) else []
        if end < len(text) and len(spans) == 1 and size < LONGEST_SENTENCE:
            size *= 2
            continue
        following = end
        if end < len(text) and len(spans) > 1:
            following = start + spans.pop()[0]
        yield from (piece[first:last] for first, last in spans)
        start, size = following, PIECE


# Words


class Tokenizer:
    """Texts of one dataset to words.

    language: `dataset.language`. punkt: what `train_punkt` returned, used where `text.max_sentences` is set.
    """

    def __init__(self, settings: Text, language: str, punkt: dict[str, Any]) -> None:
        self.language = primary_language(language)
        self.max_sentences = settings.max_sentences
        self.min_length = settings.min_word_length or (1 if self.language in SHORT_WORDS else 3)
        self.stop_words = stop_words(self.language) if settings.stop_words else frozenset()
        self._punkt = punkt
        self._split: Callable[[str], Iterator[str]] | None = None

    def sentences(self, text: str, limit: int | None = None) -> list[str]:
        """The first `limit` sentences of `text` that have a word (by default all), without markup."""
        found = (part.strip() for part in self._parts(strip_markup(text)) if _WORD.search(part))
        return list(itertools.islice(found, limit))

    def _parts(self, text: str) -> Iterator[str]:
        if self.language in RULED:
            return (match[0] for match in _RULED_SENTENCE.finditer(text))
        if self._split is None:
            self._split = _punkt_splitter(self._punkt)
        return itertools.chain.from_iterable(map(self._split, _BLANK_LINE.split(text)))

    def words(self, text: str) -> list[str]:
        """The words of `text` that are kept, in order."""
        limit = self.max_sentences
        text = strip_markup(text) if limit is None else " ".join(self.sentences(text, limit))
        return [
            word
            for candidate in self._candidates(_normalise(text))
            if candidate not in self.stop_words
            for word in candidate.split("'")
            if len(word) >= self.min_length and word not in self.stop_words
        ]

    def _candidates(self, text: str) -> Iterator[str]:
        """Runs of letters and digits, apostrophes (as ') within them."""
        if self.language == "zh":
            import rjieba

            text = " ".join(rjieba.cut(text))
        for word in _WORD.findall(text):
            if self.language in UNSEGMENTED and _UNSPACED_SCRIPT.search(word):
                characters = regex.findall(r"\X", word)  # with their marks
                yield from map("".join, itertools.pairwise(characters)) if characters[1:] else [word]
            else:
                yield word.replace("’", "'")


def load_tokenizer(work: Path, settings: Text, language: str) -> Tokenizer:
    """The tokenizer that step 1 trained in WORK. Raises UserError where `punkt.json` is missing or broken."""
    return Tokenizer(settings, language, read_json(Work(work).punkt))


# Vocabulary


def read_vocabulary(path: Path) -> dict[str, int]:
    """The number of each word in `vocabulary.txt`. Raises UserError where it is missing or no vocabulary."""
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it and run train_doc2vec.py again") from None
    if tuple(words[: len(SPECIAL_WORDS)]) != SPECIAL_WORDS:
        raise UserError(
            f"{path} does not begin with {' '.join(SPECIAL_WORDS)}; remove it and run train_doc2vec.py again"
        )
    return {word: number for number, word in enumerate(words)}


def to_indices(words: Iterable[str], vocabulary: dict[str, int]) -> list[int]:
    """Numbers of the known words, between <start> and <end>. Empty without a known word."""
    known = [vocabulary[word] for word in words if word in vocabulary]
    return [START, *known, END] if known else []
