"""Lines of a result file in which the LLM did something else than transcribe, and why.

score.py gives its rate with and without them, as WeST does (https://github.com/wenet-e2e/west). Every plain error that
such a filter takes for a hallucination flatters the second figure: it would rather miss one, the first figure always
stands beside the second, and each line left out is listed with its reason:

chat      Refusals and assistant talk in six languages, unless the reference says something close to it. An apology
          counts only when it goes on about audio, transcripts, requests and the like.
echo      The instruction of the prompt or a token of the chat template, unless the reference says it.
loop      The same words over and over (characters in Chinese, Japanese and Thai; letters within a word), far more often
          than in the reference. Radford et al. 2022, arXiv:2212.04356, 4.5; Barański et al. 2025, arXiv:2501.11378.
run-on    The transcript, and after it more than as much again: the LLM did not stop.
too long  More text than anyone could say in the time, while the reference fits. The limits are more than twice the mean
          rates of read speech, 5.2 to 7.8 syllables a second: Pellegrino et al. 2011, Language 87(3).
Fluent text that was never spoken (Koenecke et al. 2024, arXiv:2402.08021) is none of these: it stays in both.
"""

import re
import unicodedata

from rapidfuzz import fuzz  # comes with jiwer, which aligns with it

# Sets of characters, for the brackets of a regular expression.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
UNSPACED = f"{HAN}{KANA}\u0e00-\u0e7f"  # and Thai: no spaces between words
SYLLABIC = f"{HAN}{KANA}\uac00-\ud7a3"  # and Hangul: about a syllable each
TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # a word; a character in Chinese, Japanese and Thai

MAX_LETTERS_PER_SECOND = 50  # without whitespace; 400 English words a minute are about 30
GRACE_SECONDS = 1.0  # segment times are often cut a little short
LOOP = re.compile(r"(.+?)\1{3,}")  # four times in a row, or more
LOOP_EXTRA = 8, 20  # a loop repeats as many words, or letters of a word, beyond what the reference repeats
RUN_ON_TOKENS = 12  # a shorter tail is a plain error
SPOKEN_LIKENESS = 80  # of 100: chat as like the reference as this is speech with a word misheard

# CHAT and ECHO are matched against plain text: lower case, no punctuation, no apostrophes. Languages stand in the order
# English, German, French, Spanish, Chinese, Japanese. The words that follow a phrase tell whether the reference has it.
AUDIO = r"(?:trans[ck]ri|l?audio|speech|recording|spoken|sprache\b|aufnahme|l?enregistrement|parole|grabaci|voz\b)\w*"
HANZI = "(?:[转轉][录錄写寫]|[语語]音|音[频頻声]|[录錄録]音|[识識][别別]|起こし)"  # AUDIO in Chinese and Japanese
HELP = r"(?:provide|assist|fulfill|clarify|context|request|understand|confusion|help (?:you|with)|helfen|aider|ayudar)"
CHAT = re.compile(  # at the beginning; from any word on; in Chinese and Japanese, which no common letter begins
    r"^(?:(?:(?:oh )?(?:im|i am) (?:\w+ )?sorry|sorry|i apologi[sz]e|my apologies|(?:es )?tut mir (?:\w+ )?leid"
    rf"|entschuldigung|(?:je suis )?(?:\w+ )?désolée?|lo (?:siento|lamento))\b.{{0,80}}?\b(?:{AUDIO}|{HELP}\w*)"
    rf"|(?:sure|certainly|of course|absolutely|natürlich|bien sûr|claro|por supuesto)\b.{{0,40}}\b(?:{AUDIO}|assist)\b)"
    r"|\b(?:(?:as an?|als(?: eine?)?|ich bin eine?|en tant que?|como(?: una?)?|soy una?) ?(?:(?:large|ai|ki) )*(?:"
    r"ai|ki|ia|language model|artificial intelligence|sprachmodell|modèle de langage|modelo de lenguaje)\b(?: \w+){0,3}"
    rf"|(?:no|keine?|aucune?|ningún) (?:\w+ )?{AUDIO} (?:\w+ ){{0,3}}?(?:to trans|d[eé]te[ck]t|provid|attach|erkannt"
    r"|vorhanden|fourni|in (?:the|this|your) (?:\w+ )?(?:audio|recording|file|clip))\w*"
    rf"|(?:to|cannot|cant|can not|dont) (?:transcribe|(?:hear|process|listen to) (?:\w+ ){{0,3}}?{AUDIO})"
    r"|kann .{0,30}?(?:nicht transkribieren|audiodateien)|ne peux pas (?:\w+ )?(?:transcrire|écouter les fichiers)"
    r"|no puedo (?:\w+ )?(?:transcribir|(?:procesar|escuchar) (?:\w+ ){0,2}?audio)"
    r"|(?:please (?:provide|upload|share|send)|bitte (?:laden|stellen|senden)|veuillez (?:fournir|envoyer)"
    rf"|por favor (?:proporcion|env[ií]|sub|compart)\w+) (?:\w+ ){{0,4}}?(?:text\b|{AUDIO})"
    rf"|transcript(?:ion)? of (?:the|this|your) (?:\w+ )?{AUDIO} (?:is|reads)\b"
    r"|(?:here is|heres|this is|below is|hier ist|voici|aquí está) (?:\w+ ){1,3}?trans[ck]ri\w*(?: \w+){0,3}"
    r"|(?:how (?:can|may) i (?:assist|help) you|kann ich (?:ihnen|dir) helfen|puis je vous aider|puedo ayudar\w*)\b)"
    rf"|(?![\0-\u2fff])(?:^我?(?:很|非常|十分)?(?:抱歉|[对對]不起).{{0,20}}?(?:[无無]法|提供|{HANZI})"
    rf"|^(?:大変)?(?:申し訳|すみません).{{0,20}}?(?:提供|手伝い|{HANZI})|^(?:好的|[当當]然|はい|承知|もちろん).{{0,12}}?{HANZI}"
    r"|作[为為].{0,8}?(?:[语語]言模型|ai|智能助[手理])|言語モデルとして|[没沒]有[检檢][测測]到(?:[语語]音|音[频頻])"
    rf"|[请請][您你]?[先再]?(?:提供|上[传傳]|[发發]送).{{0,8}}?(?:{HANZI}|文本)|{HANZI}.{{0,16}}?(?:できません|ください)"
    rf"|(?:(?:以下|下面|[这這])是|(?:以下|こちら)[はが]).{{0,8}}?{HANZI}.{{0,4}}?(?:[结結]果|[内內]容|文[本字]))"
)
ECHO = re.compile(
    r"\b(?:im_start|im_end|endoftext|begin_of_text|end_of_text|eot_id|start_of_turn|end_of_turn"
    rf"|trans[ck]ri\w+ (?:sie )?(?:(?:the|this|die|das|diese|la|le|cet|cette|el|este) )?(?:following )?{AUDIO})"
    rf"|[请請][将將把]?.{{0,4}}?{HANZI}.{{0,4}}?{HANZI}|音声を(?:文字|書き)起こ"
)


def hallucination(reference: str, hypothesis: str, duration_seconds: float | None = None) -> str | None:
    """Why the hypothesis is no attempt at a transcript, or None. The rules stand at the top of this file."""
    if hypothesis == reference:
        return None
    plain_hypothesis, plain_reference = plain_text(hypothesis), plain_text(reference)
    for kind, pattern in (("chat", CHAT), ("echo", ECHO)):
        phrase = pattern.search(plain_hypothesis)
        if phrase and not is_spoken(phrase[0], plain_reference, pattern):
            return f'{kind}: "{phrase[0]:.60}"'
    tokens, reference_tokens = TOKEN.findall(plain_hypothesis), TOKEN.findall(plain_reference)
    if reason := find_loop(tokens, reference_tokens) or find_run_on(tokens, reference_tokens):
        return reason
    if duration_seconds is not None and least_seconds(hypothesis) > duration_seconds >= least_seconds(reference):
        return f"too long: {len(''.join(hypothesis.split())):,} characters in {duration_seconds:.2f} s"
    return None


def plain_text(text: str) -> str:
    """Lower case, no punctuation, symbols or apostrophes; spaces only in scripts that have them between words."""
    text = re.sub("['’‘`]", "", unicodedata.normalize("NFKC", text).casefold())
    text = re.sub(r"[^\w\s]", lambda match: " " if unicodedata.category(match[0])[0] in "PSC" else match[0], text)
    return re.sub(f"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])", "", " ".join(text.split()))


def is_spoken(phrase: str, text: str, pattern: re.Pattern) -> bool:
    """Whether `text` holds such talk itself, or a stretch that is much like `phrase`."""
    # partial_ratio looks for the shorter in the longer: it would find a text of one word in any phrase.
    likeness = fuzz.partial_ratio(phrase, text) if len(phrase) <= len(text) else fuzz.ratio(phrase, text)
    return likeness >= SPOKEN_LIKENESS or pattern.search(text) is not None


def find_loop(tokens: list[str], spoken: list[str]) -> str | None:
    """The n-gram that the hypothesis repeats over and over, and the reference does not, as a reason; or None."""
    codes = {token: chr(code) for code, token in enumerate([*tokens, *spoken], 0x4E00)}  # a character for a word
    texts = [("".join(map(codes.get, tokens)), "".join(map(codes.get, spoken)), LOOP_EXTRA[0])]
    texts += [(word, "".join(spoken), LOOP_EXTRA[1]) for word in tokens if len(word) > LOOP_EXTRA[1]]
    for text, reference, too_many in texts:
        for loop in LOOP.finditer(text):
            n, times = len(loop[1]), len(loop[0]) // len(loop[1])
            spoken_runs = re.finditer(r"(.+?)\1\1+", reference)  # of anything: na na na for la la la is an error
            if n * (times - max((len(run[0]) // len(run[1]) for run in spoken_runs), default=1)) >= too_many:
                units = loop[1] if text in tokens else " ".join(tokens[loop.start() : loop.start() + n])
                return f'loop: "{plain_text(units):.60}" {times} times in a row'
    return None


def find_run_on(tokens: list[str], spoken: list[str]) -> str | None:
    """What follows a transcript that is whole, as a reason; or None."""
    head, tail = tokens[: len(spoken)], tokens[len(spoken) :]
    if len(head) > 2 and len(tail) >= max(RUN_ON_TOKENS, len(head)) and fuzz.ratio(head, spoken) >= SPOKEN_LIKENESS:
        return f'run-on: {len(tail)} tokens after the transcript: "{plain_text(" ".join(tail)):.60}"'
    return None


def least_seconds(text: str) -> float:
    """Text that can be said has a segment as long as this, or longer."""
    num_letters = len("".join(text.split())) + len(re.findall(f"[{SYLLABIC}]", text))  # a syllable counts for two
    return num_letters / MAX_LETTERS_PER_SECOND - GRACE_SECONDS
