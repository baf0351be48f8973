"""What hallucination.py promises: which lines are no attempt at a transcript, and the reason for each."""

import random
import re
from pydoc_data.topics import topics

import pytest

from hallucination import hallucination
from report import shorten

REFUSAL = "I apologize, but it appears that there is no speech to transcribe."


@pytest.mark.parametrize(
    "hypothesis",
    [
        REFUSAL,
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, I didn’t catch that. Could you please provide more context?",
        "Sorry, I cannot transcribe this recording.",
        "As an AI language model, I cannot listen to sounds.",
        "Please provide the audio.",
        "Please upload the audio file so I can help.",
        "Sure! Here is the transcription: the meeting is over",
        "Here's the transcript of the audio:",
        "I'm unable to process the audio.",
        "Hello! How can I assist you today?",
        "Hello! How can I help you today?",
        "no speech detected",
        "There is no speech in the audio.",
        "It seems there is no audio attached",
        "I'm unable to hear the audio",
        "I don't hear anything in the recording",
        "The transcription of the speech is: hello",
        "Sorry, I can't help with that.",
        "I apologize for the confusion.",
        "对不起，我无法识别这段语音。",
        "抱歉，没有可以转录的内容。",
        "對不起，我無法轉錄這段音頻。",
        "作为一个人工智能语言模型，我没有听觉。",
        "请提供音频文件。",
        "以下是转录结果：会议结束了",
        "好的，这段音频的内容是",
        "没有检测到语音。",
        "Unfortunately I cannot listen to audio files.",
        "Ich bin ein Sprachmodell und kann keine Audiodateien anhören.",
        "Malheureusement, je ne peux pas écouter les fichiers audio.",
        "Lamentablemente no puedo procesar el audio.",
        "Soy un modelo de lenguaje y no puedo oír.",
        "作为AI，我无法收听音频。",
        "Es tut mir leid, aber ich kann diese Aufnahme nicht transkribieren.",
        "Entschuldigung, ich kann Ihnen dabei nicht helfen.",
        "Als KI-Sprachmodell kann ich keine Töne hören.",
        "Bitte laden Sie die Audiodatei hoch.",
        "Hier ist die Transkription: die Sitzung ist beendet",
        "Es wurde keine Sprache erkannt.",
        "Wie kann ich Ihnen helfen?",
        "Je suis désolé, mais je ne peux pas transcrire cet enregistrement.",
        "Désolé, je ne peux pas vous aider.",
        "En tant que modèle de langage, je n'entends rien.",
        "En tant qu'IA, je n'ai pas d'oreilles.",
        "Veuillez fournir le fichier audio.",
        "Voici la transcription : la séance est levée",
        "Comment puis-je vous aider ?",
        "Lo siento, pero no puedo transcribir este audio.",
        "Como modelo de lenguaje, no puedo oír nada.",
        "Por favor, proporcione el archivo de audio.",
        "Aquí está la transcripción: la reunión ha terminado",
        "¡Claro! La transcripción del audio es la siguiente",
        "¿En qué puedo ayudarte hoy?",
        "申し訳ありませんが、音声を文字起こしすることはできません。",
        "AI言語モデルとして、音を聞くことはできません。",
        "音声ファイルをアップロードしてください。",
        "以下は文字起こしの結果です。会議は終わりました",
        "はい、音声の内容は次のとおりです。",
    ],
)
@pytest.mark.parametrize("reference", ["so they went up the hill and had a picnic", "明天开会", "i", ""])
def test_refusals_and_assistant_talk_are_left_out(reference, hypothesis):
    assert hallucination(reference, hypothesis).startswith("chat: ")


@pytest.mark.parametrize(
    "hypothesis",
    [
        "Transcribe the speech",
        "transcribe the speech the cat sat",
        "<|im_end|>\n<|im_start|>assistant\n",
        "the cat sat<|endoftext|>",
        "Please transcribe the following audio into text.",
        "Transcribe speech to text.",
        "Transkribieren Sie die Aufnahme.",
        "Transcrivez cet enregistrement.",
        "Transcribe el audio.",
        "请转写下面的语音",
        "请将以下音频转写成文字",
        "音声を文字起こししてください。",
    ],
)
@pytest.mark.parametrize("reference", ["so they went up the hill and had a picnic", "明天开会", ""])
def test_the_prompt_written_out_is_left_out(reference, hypothesis):
    assert hallucination(reference, hypothesis).startswith(("echo: ", "chat: "))


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("she had to transcribe the recording by hand", "she had to transcribe the recording by hands"),
        ("we transcribed the speeches", "we transcribe the speeches"),
        ("请转写下面的语音", "请转写下面语音"),
    ],
)
def test_an_instruction_that_was_spoken_is_kept(reference, hypothesis):
    assert hallucination(reference, hypothesis) is None


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("i apologize for the delay", "I apologize for the delay."),
        ("I'M SORRY I CANNOT PROVIDE THAT", "I'm sorry, I can not provide that."),
        ("i apologise i do not understand", "I apologize, I don't understand"),
        ("as an ai language model it is good", "As an AI language model it is bad."),
        ("please provide the audio and wait", "Please provide the audio and weight."),
        ("对不起我无法接受", "对不起，我无法接收"),
        ("对 不 起 我 无 法 接 受", "对不起我无法接收"),
    ],
)
def test_what_was_truly_spoken_is_kept(reference, hypothesis):
    assert hallucination(reference, hypothesis) is None


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("how may i assist your", "how may i assist you"),
        ("how can i help hugh", "how can i help you"),
        ("sorry i can not help which that", "sorry i cannot help with that"),
        ("please provide the order", "please provide the audio"),
        ("i am so worry i request a room", "i'm sorry i request a room"),
        ("包起我不能提供", "抱歉我不能提供"),
    ],
)
def test_a_word_misheard_as_assistant_talk_is_kept(reference, hypothesis):
    assert hallucination(reference, hypothesis) is None


@pytest.mark.parametrize("hypothesis", ["i'm sorry", "sorry about that", "i apologize for this", "对不起"])
def test_an_apology_alone_is_kept_though_nobody_spoke_it(hypothesis):
    assert hallucination("so they went up the hill", hypothesis) is None


@pytest.mark.parametrize(
    ("hypothesis", "ngram", "times"),
    [
        ("the cat " + "no " * 30, "no", 30),
        ("Thank you. " * 6, "thank you", 6),
        ("and so the story went on for years " * 4, "and so the story went on for years", 4),
        ("and then we and then we and then we and then we and then", "and then we", 5),
        ("的" * 20, "的", 20),
        ("谢谢 大家。" * 5, "谢谢大家", 5),
        ("ありがとう" * 4, "ありがとう", 4),
        ("ครับ" * 5, "ครับ", 5),
        ("아니 " * 10, "아니", 10),
    ],
)
def test_loops_of_words_or_of_characters_are_left_out(hypothesis, ngram, times):
    for reference in ("the cat sat on the mat", "今天天气很好", ""):
        reason = hallucination(reference, hypothesis)
        assert reason.startswith("loop: ") and reason.endswith(" times in a row")
    if ngram != "and then we":  # cut off within its fifth repetition
        assert reason == f'loop: "{ngram}" {times} times in a row'


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("no no no", "no no no no no"),
        ("no no no no no no no no no no no no", "no no no no no no no no no no no no no no"),
        ("ha " * 20, "ha " * 12),
        ("it is a very long word " * 6, "it was a very long word or two " * 6),
        ("la la la la la la la la la la la la", "na na na na na na na na na na na na"),
        ("row row row your boat", "row row row row your boat"),
        ("哈哈哈哈哈哈", "哈哈哈哈哈哈哈哈"),
        ("好好好", "好好好好好"),
        ("the more the more the merrier", "the more the more the more the merrier"),
        ("what did you say", "what did you say what did you say"),
        ("the man the dog the cat the bird the fish", "the men the dogs the cats the birds the fish"),
    ],
)
def test_repetition_that_was_spoken_or_is_short_is_kept(reference, hypothesis):
    assert hallucination(reference, hypothesis) is None


@pytest.mark.parametrize(
    ("hypothesis", "ngram", "times"),
    [
        ("well " + "a" * 40, "a", 40),
        ("so " + "ha" * 16 + " he said", "ha", 16),
        ("0" * 60, "0", 60),
        ("да" * 20, "да", 20),
    ],
)
def test_a_loop_of_letters_within_a_word_is_left_out(hypothesis, ngram, times):
    assert hallucination("well he laughed", hypothesis) == f'loop: "{ngram}" {times} times in a row'


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("he laughed", "hahahahahaha"),
        ("ha " * 16, "ha" * 16),
        ("he said a million", "he said 1000000"),
        ("rechtsschutzversicherungsgesellschaften", "rechtsschutzversicherungs gesellschaften"),
        ("donaudampfschifffahrt", "donaudampfschifffahrtselektrizitätenhauptbetriebswerk"),
    ],
)
def test_laughter_large_numbers_and_long_words_are_kept(reference, hypothesis):
    assert hallucination(reference, hypothesis) is None


TAIL = "and then we walked along the river until the sun went down behind the hills"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "num_tokens"),
    [
        ("the cat sat on the mat", f"The cat sat on the mat. {TAIL}", 15),
        ("the cat sat on the old mat", f"the cat sat on the mat {TAIL}", 14),
        ("今天天气很好", "今天天气很好我们一起去公园散步吧然后回家吃晚饭", 17),
    ],
)
def test_a_whole_transcript_that_goes_on_and_on_is_left_out(reference, hypothesis, num_tokens):
    assert hallucination(reference, hypothesis).startswith(f"run-on: {num_tokens} tokens after the transcript: ")


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("the cat sat on the mat", "the cat sat on the mat and then it slept"),  # a few words
        (f"the cat sat on the mat {TAIL}", f"the cat sat on the mat {TAIL} {TAIL}"),  # less than as much again
        ("good morning everyone", f"a dog ran off {TAIL}"),  # the beginning is not the transcript
        ("yes", f"yes {TAIL}"),  # one word says nothing
        ("", TAIL),  # text from nothing: a figure of its own
    ],
)
def test_a_short_tail_and_other_wrong_text_are_kept(reference, hypothesis):
    assert hallucination(reference, hypothesis) is None


def long_sentences() -> list[str]:
    """Real sentences of 20 words and more: the reference manual of Python, which comes with every Python."""
    paragraphs = [" ".join(text.split()) for topic in topics.values() for text in topic.split("\n\n")]
    sentences = [sentence for text in paragraphs for sentence in re.split(r"(?<=[.!?])\s+", text)]
    return sorted({sentence for sentence in sentences if len(sentence.split()) >= 20})


def misheard(sentence: str, generator: random.Random) -> str:
    """The sentence with one word in ten replaced by another of it, and one in twenty missing."""
    words = sentence.split()
    spoilt = [generator.choice(words) if generator.random() < 0.1 else word for word in words]
    return " ".join(word for word in spoilt if generator.random() > 0.05)


def test_real_long_sentences_raise_no_false_alarm_misheard_a_little_or_altogether():
    sentences, generator = long_sentences(), random.Random(0)
    assert len(sentences) > 500
    seconds = [len(sentence) / 13 for sentence in sentences]  # letters a second of read speech
    pairs = [(sentence, misheard(sentence, generator)) for sentence in sentences]
    pairs += zip(sentences, sentences[1:] + sentences[:1], strict=True)  # a sentence for another
    reasons = [hallucination(*pair, duration) for pair, duration in zip(pairs, seconds * 2, strict=True)]
    assert not [reason for reason in reasons if reason and not reason.startswith("too long")]
    assert not any(reasons[: len(sentences)])


LONG_ENGLISH = "it was the best of times and it may well have been the worst of them all so people say " * 3
LONG_CHINESE = "甚至出现交易几乎停滞的情况一二线城市虽然也处于调整中" * 2  # 52 characters


@pytest.mark.parametrize(
    ("hypothesis", "seconds"),
    [(LONG_ENGLISH, 2.0), (LONG_CHINESE, 1.0), ("내일 오전에 회의가 있으니 준비해 주세요 " * 3, 0.5)],
)
def test_text_that_nobody_could_say_in_the_time_is_left_out(hypothesis, seconds):
    length = len("".join(hypothesis.split()))
    assert hallucination("yes", hypothesis, seconds) == f"too long: {length} characters in {seconds:.2f} s"


@pytest.mark.parametrize(
    ("hypothesis", "seconds"),
    [
        (LONG_ENGLISH, 60 * len(LONG_ENGLISH.split()) / 400),  # 400 words a minute
        (LONG_CHINESE, len(LONG_CHINESE) / 10),  # 10 syllables a second
        ("thank you very much", 0.3),  # a segment cut too short
        ("", 0.0),
        (LONG_CHINESE, None),
        (LONG_CHINESE, float("nan")),
    ],
)
def test_fast_speech_and_speech_of_unknown_length_are_kept(hypothesis, seconds):
    assert hallucination("yes", hypothesis, seconds) is None


def test_a_text_is_not_too_long_where_the_reference_is_too():
    assert hallucination(LONG_CHINESE, f"{LONG_CHINESE}吗", 1.0) is None


def test_an_empty_hypothesis_and_plain_errors_are_kept():
    assert hallucination("the cat sat", "", 1.0) is None
    assert hallucination("the cat sat", "a hat is that", 1.0) is None


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [("the cat", 7, "the cat"), ("the cat sat", 7, "the ca…"), (" the\ncat  sat ", 11, "the cat sat"), ("", 3, "")],
)
def test_a_text_is_shown_on_one_line_of_a_given_width(text, width, short):
    assert shorten(text, width) == short
