"""Lines of a result file in which the LLM did something else than transcribe, and why.

score.py gives its rate with and without them, as WeST does (https://github.com/wenet-e2e/west). Every plain error that
such a filter takes for a hallucination flatters the second figure: it would rather miss one, the first figure always
stands beside the second, and each line left out is listed with its reason:

chat      Refusals and assistant talk in English and Chinese, unless the reference says something close to it. An
          apology counts only when it goes on about audio, transcripts, requests and the like.
loop      The same words over and over (characters in Chinese, Japanese and Thai), far more often than in the
          reference. Radford et al. 2022, arXiv:2212.04356, section 4.5; Barański et al. 2025, arXiv:2501.11378.
too long  More text than anyone could say in the time, while the reference fits. The limits are more than twice the mean
          rates of read speech, 5.2 to 7.8 syllables a second: Pellegrino et al. 2011, Language 87(3).
Fluent text that was never spoken (Koenecke et al. 2024, arXiv:2402.08021) is none of these: it stays in both.
"""

import re
import unicodedata
from collections import Counter

from rapidfuzz import fuzz  # comes with jiwer, which aligns with it

# Sets of characters, for the brackets of a regular expression.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
UNSPACED = f"{HAN}{KANA}\u0e00-\u0e7f"  # and Thai: no spaces between words
SYLLABIC = f"{HAN}{KANA}\uac00-\ud7a3"  # and Hangul: about a syllable each

MAX_SYLLABIC_PER_SECOND = 25
MAX_LETTERS_PER_SECOND = 50  # without whitespace; 400 English words a minute are about 30
GRACE_SECONDS = 1.0  # segment times are often cut a little short
LOOP_REPEATS = 4  # an n-gram that stands fewer times than this in a row is no loop
LOOP_EXTRA_TOKENS = 8  # nor is one that repeats fewer tokens than this beyond what the reference repeats
SPOKEN_LIKENESS = 80  # of 100: chat as like the reference as this is speech with a word misheard

# CHAT is matched against plain text: lower case, no punctuation, no apostrophes.
TOPIC = (
    r"transcri|audio|speech|recording|spoken|provide|assist|fulfill|clarify|context|request|understand|confusion"
    r"|help\ (you|with)"
)
CHAT = re.compile(
    rf"""^(oh\ )?((im|i\ am)\ (\w+\ )?sorry|sorry|i\ apologi[sz]e|my\ apologies)\b.{{0,80}}?\b({TOPIC})\w*
    | \bas\ an?\ (ai|artificial\ intelligence|((large|ai)\ )*language\ model)\b(\ \w+){{0,3}}
    | \bno\ (\w+\ )?(speech|audio|spoken\ \w+)\ (to\ transcribe|((was|is)\ )?(detected|provided|attached))\b
    | \bno\ (\w+\ )?speech\ in\ (the|this|your)\ (\w+\ )?(audio|recording|file|clip)\b
    | \b(unable\ to|cannot|cant|dont)\ hear\ (\w+\ ){{1,3}}?(audio|recording|speech)\b
    | \btranscript(ion)?\ of\ (the|this|your)\ (\w+\ )?(speech|audio|recording)\ (is|reads)\b
    | \bplease\ (provide|upload|share|send)(\ \w+){{0,4}}?\ (audio|recording|speech|transcript\w*|text)\b
    | \b(here\ is|heres|this\ is|below\ is)\ (the|your|a)\ (\w+\ ){{0,2}}transcri(pt|bed)\w*(\ \w+){{0,3}}
    | ^(sure|certainly|of\ course|absolutely)\b.{{0,40}}?\b(transcri\w+|audio|assist)\b
    | \bi\ ?(m|am|cannot|cant|can\ not)\ ((unable|not\ able)\ to\ )?(transcribe|process\ (\w+\ )?audio)\b
    | \bhow\ (can|may)\ i\ (assist|help)\ you\b(\ \w+)?
    | ^我?(很|非常|十分)?(抱歉|[对對]不起).{{0,20}}?
        ([无無]法|[转轉][录錄写寫]|[语語]音|音[频頻]|[录錄]音|[识識][别別]|提供)
    | 作[为為].{{0,8}}?([语語]言模型|ai助手|智能助[手理])
    | [请請][您你]?[先再]?(提供|上[传傳]|[发發]送).{{0,8}}?(音[频頻]|[语語]音|[录錄]音|文本)
    | (以下|下面|[这這])是.{{0,8}}?
        ([转轉][录錄写寫]|[识識][别別]|音[频頻]|[语語]音).{{0,4}}?([结結]果|[内內]容|文[本字])
    | ^(好的|[当當]然).{{0,12}}?([转轉][录錄写寫]|音[频頻])""",
    re.VERBOSE,
)


def hallucination(reference: str, hypothesis: str, duration_seconds: float | None = None) -> str | None:
    """Why the hypothesis is no attempt at a transcript, or None. The rules stand at the top of this file."""
    if hypothesis == reference:
        return None
    plain_hypothesis = plain_text(hypothesis)  # as CHAT is written
    if (chat := CHAT.search(plain_hypothesis)) and not is_spoken(chat.group(), plain_text(reference)):
        return f'chat: "{shorten(chat.group(), 60)}"'
    if loop := find_loop(plain_hypothesis, reference):
        return loop
    limit = float("inf") if duration_seconds is None else duration_seconds + GRACE_SECONDS
    if least_seconds(hypothesis) > limit >= least_seconds(reference):
        return f"too long: {len(''.join(hypothesis.split())):,} characters in {duration_seconds:.2f} s"
    return None


def plain_text(text: str) -> str:
    """Lower case, no punctuation, symbols or apostrophes; spaces only in scripts that have them between words."""
    text = re.sub("['’‘`]", "", unicodedata.normalize("NFKC", text).casefold())
    text = re.sub(r"[^\w\s]", lambda match: " " if unicodedata.category(match[0])[0] in "PSC" else match[0], text)
    return re.sub(f"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])", "", " ".join(text.split()))


def is_spoken(phrase: str, text: str) -> bool:
    """Whether `text` holds assistant talk itself, or a stretch that is much like `phrase`."""
    # partial_ratio looks for the shorter in the longer: it would find a text of one word in any phrase.
    likeness = fuzz.partial_ratio(phrase, text) if len(phrase) <= len(text) else fuzz.ratio(phrase, text)
    return likeness >= SPOKEN_LIKENESS or CHAT.search(text) is not None


def find_loop(plain_hypothesis: str, reference: str) -> str | None:
    """The n-gram that the hypothesis repeats over and over, and the reference does not, as a reason; or None."""
    tokens = tokens_of(plain_hypothesis)
    if max(Counter(tokens).values(), default=0) < LOOP_REPEATS:
        return None  # most lines end here
    reference_tokens = tokens_of(plain_text(reference))
    for n in range(1, len(tokens) // LOOP_REPEATS + 1):
        num_repeated, last = longest_repetition(tokens, n)  # tokens; index of the last of them
        num_spoken, _ = longest_repetition(reference_tokens, n)  # somebody may have said it so often
        if num_repeated >= n * (LOOP_REPEATS - 1) and num_repeated - num_spoken >= LOOP_EXTRA_TOKENS:
            ngram = plain_text(" ".join(tokens[last - n + 1 : last + 1]))
            return f'loop: "{shorten(ngram, 60)}" {num_repeated // n + 1} times in a row'
    return None


def tokens_of(text: str) -> list[str]:
    """Words; characters in Chinese, Japanese and Thai."""
    return re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)


def longest_repetition(tokens: list[str], n: int) -> tuple[int, int]:
    """(length, last index) of the longest run of tokens like the one n before. no no no, n = 1: (2, 2)."""
    longest = run = last = 0
    for index in range(n, len(tokens)):
        run = run + 1 if tokens[index] == tokens[index - n] else 0
        if run > longest:
            longest, last = run, index
    return longest, last


def least_seconds(text: str) -> float:
    """The least time in which the text could be said."""
    num_syllabic = len(re.findall(f"[{SYLLABIC}]", text))
    num_letters = len("".join(text.split())) - num_syllabic  # of alphabets
    return num_syllabic / MAX_SYLLABIC_PER_SECOND + num_letters / MAX_LETTERS_PER_SECOND


def shorten(text: str, width: int) -> str:
    """The text on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
