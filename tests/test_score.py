"""What score.py promises: the figures, the lines that it leaves out, and the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from score import Counts, InputError, choose_metric, hallucination, score

SCRIPT = Path(__file__).parent.parent / "score.py"
REFUSAL = "I apologize, but it appears that there is no speech to transcribe."


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data_path(tmp_path):
    """Three utterances; the first has 4 words, the second 2, the third 2."""
    texts = [("a.wav", "the cat sat down"), ("b.wav", "good morning"), ("c.wav", "thank you")]
    records = [{"wav": wav, "txt": txt, "duration": 2.0} for wav, txt in texts]
    return write_jsonl(tmp_path / "test.jsonl", records)


def write_txt(folder: Path, *hypotheses: str) -> Path:
    path = folder / "result.txt"
    path.write_text("".join(f"{hypothesis}\n" for hypothesis in hypotheses), encoding="utf-8", newline="")
    return path


# The figures


def test_errors_are_summed_over_the_corpus_before_they_are_divided():
    # 1 of 1 word wrong, 0 of 9: the mean of the lines' rates is 50 %, the corpus has 1 error in 10 words.
    result = score(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"])
    assert result.all.rate == 1 / 10
    assert result.summary() == "WER 10.00 / 10.00, 0 of 2 lines left out"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "substitutions", "deletions", "insertions"),
    [
        ("the cat sat", "the cat sat", 0, 0, 0),
        ("the cat sat", "the hat sat", 1, 0, 0),
        ("the cat sat", "the sat", 0, 1, 0),
        ("the cat sat", "the cat sat down", 0, 0, 1),
        ("a b c d e f", "x b d e f g", 1, 1, 1),
        ("the cat sat", "", 0, 3, 0),
        ("", "", 0, 0, 0),
        ("", "two words", 0, 0, 2),
    ],
)
def test_substitutions_deletions_and_insertions_are_told_apart(
    reference, hypothesis, substitutions, deletions, insertions
):
    expected = Counts(substitutions, deletions, insertions, len(reference.split()))
    assert score([reference], [hypothesis], metric="wer").all == expected


def test_an_empty_reference_adds_insertions_to_a_corpus():
    assert score(["a b c d", ""], ["a b c d", "x"]).all == Counts(0, 0, 1, 4)


@pytest.mark.parametrize(("references", "hypotheses"), [([], []), ([""], [""]), ([""], ["x"])])
def test_the_rate_of_a_corpus_without_a_single_reference_word_is_nan(references, hypotheses):
    result = score(references, hypotheses)
    assert math.isnan(result.all.rate)
    assert result.summary().startswith("WER nan / nan, ")


@pytest.mark.parametrize("space", ["  ", "\t", "\u3000", "\u00a0"])
def test_any_whitespace_separates_words(space):
    assert score([f"a{space}b"], ["a b"], metric="wer").all == Counts(0, 0, 0, 2)


def test_cer_ignores_whitespace():
    assert score(["ab cd"], [" a b\u3000cx "], metric="cer").all == Counts(1, 0, 0, 4)


def test_the_chinese_corpus_rate_is_the_hand_computed_one():
    result = score(["今天天气好", "你好"], ["今天天汽好", "你"])
    assert result.metric == "cer"
    assert result.all == Counts(substitutions=1, deletions=1, insertions=0, reference_length=7)
    assert result.summary() == "CER 28.57 / 28.57, 0 of 2 lines left out"


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("甚至出现交易几乎停滞的情况", "cer"),
        ("今日はいい天気ですね", "cer"),
        ("コンピューター", "cer"),
        ("สวัสดีครับ", "cer"),
        ("오늘은 날씨가 좋습니다", "wer"),
        ("good morning", "wer"),
        ("доброе утро", "wer"),
        ("शुभ प्रभात", "wer"),
        ("我用 wifi 上网看今天的新闻", "cer"),
        ("the city is called 北京 in chinese", "wer"),
        ("123 456", "wer"),
        ("", "wer"),
    ],
)
def test_cer_is_chosen_for_chinese_japanese_and_thai_and_not_for_korean(text, metric):
    assert choose_metric([text]) == metric
    assert score([text], [text]).metric == metric


def test_a_metric_that_is_asked_for_is_not_overruled():
    assert score(["你好"], ["你好"], metric="wer").all.reference_length == 1
    assert score(["good day"], ["good day"], metric="cer").all.reference_length == 7


@pytest.mark.parametrize(("normalizer", "errors"), [("none", 3), ("basic", 2), ("english", 0)])
def test_texts_pass_through_whispers_normalizers_first(normalizer, errors):
    result = score(["it is twenty colours"], ["It is 20 colors."], normalizer=normalizer)
    assert (result.all.errors, result.normalizer) == (errors, normalizer)


def test_a_reference_that_the_normalizer_empties_counts_no_words():
    assert score(["[noise]"], ["hello"], normalizer="basic").all == Counts(0, 0, 1, 0)


def test_the_normalizer_does_not_change_which_lines_are_left_out():
    references, hypotheses = ["the cat", "the cat", "no"], [REFUSAL, "the cat", "no " * 20]
    for normalizer in ("none", "basic", "english"):
        result = score(references, hypotheses, normalizer=normalizer)
        assert [index for index, _ in result.hallucinated] == [0, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"hypotheses": ["a", "b"]},
        {"hypotheses": ["a"], "durations": [1.0, 2.0]},
        {"hypotheses": ["a"], "metric": "ser"},
        {"hypotheses": ["a"], "normalizer": "french"},
    ],
)
def test_unequal_lengths_and_unknown_names_are_value_errors(arguments):
    with pytest.raises(ValueError, match="wanted"):
        score(["a"], **arguments)
    assert issubclass(InputError, ValueError)


# The lines that the second figure leaves out


def test_the_second_figure_leaves_hallucinated_lines_out_and_the_first_counts_them():
    result = score(["the cat sat down", "good morning"], ["the hat sat down", REFUSAL])
    assert result.all.errors == 1 + 12
    assert result.filtered == Counts(1, 0, 0, 4)
    assert [index for index, _ in result.hallucinated] == [1]
    assert result.summary() == "WER 216.67 / 25.00, 1 of 2 lines left out"


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
    ],
)
@pytest.mark.parametrize("reference", ["so they went up the hill and had a picnic", "明天开会", "i", ""])
def test_refusals_and_assistant_talk_are_left_out(reference, hypothesis):
    assert hallucination(reference, hypothesis).startswith("chat: ")


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
    ],
)
def test_fast_speech_and_speech_of_unknown_length_are_kept(hypothesis, seconds):
    assert hallucination("yes", hypothesis, seconds) is None


def test_a_text_is_not_too_long_where_the_reference_is_too():
    assert hallucination(LONG_CHINESE, f"{LONG_CHINESE}吗", 1.0) is None


def test_an_empty_hypothesis_and_plain_errors_are_kept():
    assert hallucination("the cat sat", "", 1.0) is None
    assert hallucination("the cat sat", "a hat is that", 1.0) is None


# The command line


def test_the_summary_comes_first_and_the_counts_follow(data_path, tmp_path):
    result_path = write_txt(tmp_path, "the hat sat", "good morning", REFUSAL)
    result = run("--data_path", data_path, "--result_path", result_path)
    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert lines[0] == "WER 175.00 / 33.33, 1 of 3 lines left out"
    assert "wer was chosen" in result.stdout
    assert lines[2].endswith(": errors 14: substitutions 3, deletions 1, insertions 10, reference length 8")
    assert lines[3].endswith(": errors 2: substitutions 1, deletions 1, insertions 0, reference length 6")


def test_each_line_left_out_is_listed_with_its_number_key_reason_and_text(data_path, tmp_path):
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, "", "", f"{REFUSAL} " * 5))
    line, text = result.stdout.splitlines()[4:6]
    assert line.startswith(f'left out: {data_path}:3 c: chat: "i apologize')
    assert text.strip().startswith(REFUSAL) and text.endswith("…") and len(text) < 100


def test_empty_lines_are_hypotheses(data_path, tmp_path):
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, "", "good morning", ""))
    assert result.stdout.startswith("WER 75.00 / 75.00, 0 of 3 lines left out\n")


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_text_file_is_cut_at_line_feeds_only(data_path, tmp_path, separator):
    hypotheses = [f"the cat{separator}sat down", "good morning\r", "thank you"]
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, *hypotheses))
    assert result.stdout.startswith("WER 0.00 / 0.00, 0 of 3 lines left out\n")


def test_the_last_line_may_lack_its_line_feed(data_path, tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("the cat sat down\ngood morning\nthank you")
    assert run("--data_path", data_path, "--result_path", path).stdout.startswith("WER 0.00 / 0.00")


def test_json_lines_are_matched_by_order_and_key(data_path, tmp_path):
    predictions = {"a": "the cat sat", "b": "good morning", "c": "thank you"}
    records = [{"key": k, "wav": f"{k}.wav", "txt": "unused", "pred": p} for k, p in predictions.items()]
    result = run("--data_path", data_path, "--result_path", write_jsonl(tmp_path / "result.jsonl", records))
    assert result.stdout.startswith("WER 12.50 / 12.50, 0 of 3 lines left out\n")


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"wav": "audio/b.flac", "txt": "hello"}, "b"),
        ({"wav": "audio/b.flac", "txt": "hello", "key": "utterance 7"}, "utterance 7"),
        ({"wav": "audio/b.flac", "txt": "hello", "key": 7}, 7),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "line2"),
    ],
)
def test_a_key_is_the_manifests_or_the_files_stem_or_for_messages_the_line(tmp_path, record, key):
    data_path = write_jsonl(tmp_path / "test.jsonl", [{"wav": "a.wav", "txt": "hello"}, record])
    predictions = [{"key": "a", "pred": "hello"}, {"key": key, "pred": "hello"}]
    result = run("--data_path", data_path, "--result_path", write_jsonl(tmp_path / "r.jsonl", predictions))
    assert result.stdout.startswith("WER 0.00 / 0.00, 0 of 2 lines left out\n")


def test_json_output_is_one_object_of_fractions(data_path, tmp_path):
    result_path = write_txt(tmp_path, "the hat sat", "good morning", REFUSAL)
    result = json.loads(run("--data_path", data_path, "--result_path", result_path, "--json").stdout)
    counts = {"substitutions": 1, "deletions": 1, "insertions": 0, "reference_length": 6, "rate": 2 / 6}
    assert result["filtered"] == counts
    assert result["all"]["rate"] == 14 / 8
    assert (result["metric"], result["normalizer"], result["num_lines"]) == ("wer", "none", 3)
    assert (result["num_not_scored"], result["num_unknown_durations"]) == (0, 0)
    assert [(line["place"], line["key"], line["pred"]) for line in result["hallucinated"]] == [
        (f"{data_path}:3", "c", REFUSAL)
    ]


def test_an_undefined_rate_is_null_in_json(tmp_path):
    data_path = write_jsonl(tmp_path / "test.jsonl", [{"wav": "silence.wav", "txt": ""}])
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, "hello"), "--json")
    assert json.loads(result.stdout)["all"]["rate"] is None


def test_metric_and_normalizer_are_options(tmp_path):
    data_path = write_jsonl(tmp_path / "test.jsonl", [{"wav": "a.wav", "txt": "ab cd"}])
    options = ("--metric", "cer", "--normalizer", "basic")
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, "AB, cx"), *options)
    assert result.stdout.startswith("CER 25.00 / 25.00, 0 of 1 lines left out\n")
    assert "was chosen" not in result.stdout


def test_lines_without_a_reference_are_counted_and_not_scored(tmp_path):
    question = {"role": "user", "content": "<audio>", "audio": ["d.wav"]}
    answer = {"role": "assistant", "content": "good day"}
    records = [
        {"wav": "a.wav"},
        {"wav": "b.wav", "txt": "hello"},
        {"messages": [question, answer]},
        {"messages": [question]},
    ]
    data_path = write_jsonl(tmp_path / "test.jsonl", records)
    result_path = write_txt(tmp_path, "x", "hello", "good night", "y")
    result = run("--data_path", data_path, "--result_path", result_path)
    assert result.stdout.startswith("WER 33.33 / 33.33, 0 of 2 lines left out\n")
    assert "not scored: 2 lines without a reference" in result.stdout


@pytest.mark.parametrize(
    ("times", "left_out"),
    [
        ({"duration": 1.0}, 1),
        ({"duration": 60}, 0),
        ({"start": 30.0, "end": 31.0}, 1),
        ({"start": 30.0, "end": 90.0}, 0),
        ({}, 1),  # the file has one second
        ({"wav": "missing.wav"}, 0),
        ({"wav": "broken.wav"}, 0),
    ],
)
def test_durations_come_from_the_manifest_or_from_the_audio(tmp_path, times, left_out):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "second.wav", [0.0] * 8000, 8000)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    data_path = write_jsonl(tmp_path / "test.jsonl", [{"wav": "audio/second.wav", "txt": "是", **times}])
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, LONG_CHINESE))
    assert f", {left_out} of 1 lines left out" in result.stdout
    assert ("duration unknown: 1 lines" in result.stdout) == ("wav" in times)


def test_help_is_quick_and_states_defaults():
    result = run("--help")
    assert result.returncode == 0
    for option in ("--data_path", "--result_path", "--metric", "--normalizer", "--json", "(default: none)"):
        assert option in result.stdout


def test_whisper_is_imported_only_for_its_normalizers():
    code = "import sys, score; score.score(['a'], ['b']); print({'whisper', 'torch'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert result.stdout == "set()\n"


GOOD = '{"wav": "a.wav", "txt": "hello"}\n'


@pytest.mark.parametrize(
    ("manifest", "name", "result", "message"),
    [
        (None, "result.txt", "hello\n", "test.jsonl: no such manifest"),
        (GOOD, "result.txt", None, "result.txt: no such result file"),
        ("", "result.txt", "", "test.jsonl: the manifest is empty"),
        ('{"wav": "a.wav"}\n', "result.txt", "hello\n", "none with a reference"),
        (GOOD + "{wav}\n", "result.txt", "hello\n", "test.jsonl:2: malformed JSON"),
        (GOOD + "\n", "result.txt", "hello\n", "test.jsonl:2: a blank line"),
        ("[1]\n", "result.txt", "hello\n", "test.jsonl:1: found b'[1]"),
        ('{"txt": "hello"}\n', "result.txt", "hello\n", "test.jsonl:1: missing ['wav']"),
        ('{"wav": "a.wav", "txt": 5}\n', "result.txt", "hello\n", "jsonl:1: 'txt' is 5; wanted a str"),
        ('{"wav": null, "txt": "x"}\n', "result.txt", "hello\n", "jsonl:1: missing ['wav']"),
        ('{"messages": ["hello"]}\n', "result.txt", "hello\n", "test.jsonl:1: hello in the conversation"),
        ('{"messages": [{"audio": 5}]}\n', "result.txt", "hello\n", "jsonl:1: {'audio': 5} in the conversation"),
        (
            '{"wav": "a.wav", "txt": "x", "duration": "2"}\n',
            "result.txt",
            "x\n",
            ":1: 'duration' is \"2\"; wanted seconds",
        ),
        ('{"wav": "a.wav", "txt": "x", "start": 2, "end": 1}\n', "result.txt", "x\n", ":1: start 2 and end 1"),
        (GOOD, "result.txt", "hello\nhello\n", "result.txt: found 2 lines; wanted 1"),
        (GOOD, "result.txt", "", "result.txt: found 0 lines; wanted 1"),
        (GOOD, "result.trn", "hello\n", "result.trn: no such result file; wanted a .txt or .jsonl"),
        (GOOD, "result.jsonl", "hello\n", "result.jsonl:1: wanted a JSON object"),
        (GOOD, "result.jsonl", '{"pred": "hello"}\n', "result.jsonl:1: wanted a JSON object with 'key'"),
        (GOOD, "result.jsonl", '{"key": "a"}\n', "result.jsonl:1: wanted a JSON object with 'key' and 'pred'"),
        (GOOD, "result.jsonl", '{"key": "b", "pred": "x"}\n', "result.jsonl:1: found key 'b'; wanted 'a'"),
        (GOOD, "result.jsonl", "", "result.jsonl: found 0 lines; wanted 1"),
        (GOOD, "result.jsonl", '{"key": "a", "pred": "x"}\n' * 2, "result.jsonl: found 2 lines; wanted 1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(tmp_path, manifest, name, result, message):
    for path, content in ((tmp_path / "test.jsonl", manifest), (tmp_path / name, result)):
        if content is not None:
            path.write_text(content)
    process = run("--data_path", tmp_path / "test.jsonl", "--result_path", tmp_path / name)
    assert (process.returncode, process.stdout) == (2, "")
    assert message in process.stderr and process.stderr.startswith(f"error: {tmp_path}")
    assert process.stderr.count("\n") == 1


def test_text_that_is_not_utf8_is_one_line_on_standard_error(data_path, tmp_path):
    path = tmp_path / "result.txt"
    path.write_bytes("caf\xe9\n\n\n".encode("latin-1"))
    process = run("--data_path", data_path, "--result_path", path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"error: {path}: cannot be read")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "ser"), "--metric"),
        (("--normalizer", "french"), "--normalizer"),
        (("--normaliser", "basic"), "--normaliser"),
        (("--norm", "basic"), "--norm"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(data_path, tmp_path, arguments, message):
    result = run("--data_path", data_path, "--result_path", write_txt(tmp_path, "", "", ""), *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr.splitlines()[-1]
