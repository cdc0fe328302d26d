"""Cleans captions as Open-Sora-Plan v1.2 does before they reach mT5, and holds its prompt templates.

The rules are those of the caption cleaner that DeepFloyd IF and PixArt use; unlike those, Chinese is kept.
ftfy (broken encodings) and beautifulsoup4 (HTML) are used where installed; without them only the plain rules apply.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Any
from urllib.parse import unquote_plus

from ...limits.texts import checked_prompt

log = logging.getLogger("efficient_vdit")

TEMPLATES = {
    "a": "(masterpiece), (best quality), (ultra-detailed), {}.",
    "b": (
        "(masterpiece), (best quality), (ultra-detailed), (unwatermarked), {}. emotional, harmonious, vignette, 4k epic detailed, "
        "shot on kodak, 35mm photo, sharp focus, high budget, cinemascope, moody, epic, gorgeous"
    ),
    "c": "(masterpiece), (best quality), (ultra-detailed), (unwatermarked), {}",
}
NEGATIVE_PROMPT = (
    "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

_URLS = (
    r"\b((?:https?:(?:\/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))",
    r"\b((?:www:(?:\/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))",
)
_LONGEST_URL = 2048  # what browsers take; the patterns' time grows with its square
_URL_MARK = re.compile(r"(?:https?|www):|[.](?:com|co|ru|net|org|edu|gov|it)")
# CJK symbols and extensions, but not the unified ideographs 4e00-9fff.
_CJK_SYMBOLS = r"[\u31c0-\u31ef]+|[\u31f0-\u31ff]+|[\u3200-\u32ff]+|[\u3300-\u33ff]+|[\u3400-\u4dbf]+|[\u4dc0-\u4dff]+"
_DASHES = r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+"
_PUNCTUATION = re.compile(r"[" + re.escape("#®•©™&@·º½¾¿¡§~") + r"\)\(\]\[\}\{\|\\\/\*]{1,}")

_FILE_ENDING = re.compile(r"\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)")


def _without_file_name(word: re.Match[str]) -> str:
    """What follows the last ``name.png`` in a word: the reference's ``\\S+\\.(?:png|...)``, which tries every letter of a
    word as its beginning, in one walk."""
    ends = [m.end() for m in _FILE_ENDING.finditer(word[0]) if m.start() > 0]
    return word[0][ends[-1] :] if ends else word[0]


# In this order: each takes what the ones before have left. Whatever the text, a rule walks it a few times at most.
_FILE_NAMES = (r"\S+", _without_file_name)
_RULES: tuple[tuple[str, Any], ...] = (
    (r"@[\w\d]+\b", ""),
    (_CJK_SYMBOLS, ""),
    (_DASHES, "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    _FILE_NAMES,
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (_PUNCTUATION.pattern, " "),
    (r"\s+\.\s+", " "),
)
_LATE_RULES: tuple[tuple[str, str], ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", r": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
)
_MOST_TAGS = 200  # a caption has a few; the parser's time grows with the square of those left open
_warned: set[str] = set()


def clean_caption(text: str) -> str:
    """One pass of the cleaner over ``text``. The reference runs it twice over prompt and negative prompt."""
    text = unquote_plus(checked_prompt(str(text))).strip().lower().replace("<person>", "person")
    text = re.sub(r"\S+", _without_urls, text)
    text = _without_html(text)
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    if len(re.findall(r"(?:\-|\_)", text)) > 3:
        text = re.sub(r"(?:\-|\_)", " ", text)
    text = html.unescape(html.unescape(_with_mended_encoding(text)))
    for pattern, replacement in _LATE_RULES:
        text = re.sub(pattern, replacement, text)
    # The reference drops what strip() gives here, so that a space at an edge keeps these rules from the text; so does this.
    text = re.sub(r"^[\"\']([\w\W]+)[\"\']$", r"\1", text)
    text = re.sub(r"^[\'\_,\-\:;]", r"", text)
    text = re.sub(r"[\'\_,\-\:\-\+]$", r"", text)
    return re.sub(r"^\.\S+$", "", text).strip()


def _without_urls(word: re.Match[str]) -> str:
    """The URLs' patterns try every letter as a beginning, so only words that can hold one are given to them."""
    text = word[0]
    if len(text) > _LONGEST_URL:
        return text
    for pattern in _URLS:
        if _URL_MARK.search(text):
            text = re.sub(pattern, "", text)
    return text


def _without_html(text: str) -> str:
    try:
        from bs4 import BeautifulSoup
        from bs4.exceptions import ParserRejectedMarkup
    except ImportError:
        _warn_once("beautifulsoup4", "HTML tags in prompts are kept")
        return text
    if ("<" not in text and "&" not in text) or text.count("<") > _MOST_TAGS:
        return text
    try:
        return BeautifulSoup(text, features="html.parser").text
    except ParserRejectedMarkup:  # such as "<![": no HTML, so a text
        return text


def _with_mended_encoding(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        _warn_once("ftfy", "wrongly decoded characters in prompts are kept")
        return text
    return ftfy.fix_text(text)


def _warn_once(package: str, effect: str) -> None:
    if package not in _warned:
        _warned.add(package)
        log.info("%s is not installed: %s. Plain prompts are not affected.", package, effect)
