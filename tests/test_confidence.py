"""Log-probabilities, confidences and alternatives: the model's own, of the text that was written."""

import math

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, noise
from trials import EIGHT_CLIPS, records

from confidence import words_with_confidence
from dataset import collate
from manifest import Hypothesis
from model import SpeechLLM

SEARCH = {"max_new_tokens": 12, "num_beams": 3}


def decode(model: SpeechLLM, batch_size: int = 16, **options) -> list[Hypothesis]:
    """The hypotheses of eight clips, in their order."""
    batches = model.decode(model.make_dataset(records(EIGHT_CLIPS)), batch_size=batch_size, **SEARCH | options)
    return sorted(sum(batches, []), key=lambda hypothesis: hypothesis.index)


def forward_log_probability(model: SpeechLLM, example: dict, answer: list[int]) -> float:
    """Of an answer to one example alone, from the logits of all positions of `forward`, without labels."""
    batch = collate([example], with_targets=False)
    ids = torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1)
    audio = {name: batch[name] for name in ("input_features", "feature_lengths")}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits[0]
    log_probs = logits[-len(answer) - 1 : -1].log_softmax(dim=1)
    return log_probs[range(len(answer)), answer].sum().item()


def answers_of(model: SpeechLLM, example: dict, **options) -> list[list[int]]:
    """Ids of the answers to one example alone, each with its end token, if it has one."""
    batch, ends = collate([example], with_targets=False), set(model.llm.generation_config.eos_token_id)
    answers = []
    for ids in model.generate(**model.tensors_of(batch), **options).tolist():
        end = next((n for n, token in enumerate(ids) if token in ends), len(ids))
        answers.append(ids[: end + 1])
    return answers


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_log_probability_is_that_of_a_forward_pass_over_the_same_text(recogniser, num_beams):
    examples = list(recogniser.make_dataset(records(EIGHT_CLIPS)))
    search = {"num_beams": num_beams, "max_new_tokens": 5}
    hypotheses = decode(recogniser, **search, confidence=True)
    assert {hypothesis.problem is None for hypothesis in hypotheses} == {True, False}  # some end, some are cut off
    for example, hypothesis in zip(examples, hypotheses, strict=True):
        (answer,) = answers_of(recogniser, example, **search)
        wanted = forward_log_probability(recogniser, example, answer)
        assert hypothesis.log_probability == pytest.approx(wanted, abs=2e-4)  # of which 5e-5 are the rounding
        assert hypothesis.confidence == pytest.approx(math.exp(wanted / len(answer)), abs=1e-4)


def test_the_log_probability_is_the_score_that_beam_search_had_itself(recogniser):
    """No beam is taken for another: transformers adds up the score of each beam while it searches."""
    for example, hypothesis in zip(
        recogniser.make_dataset(records(EIGHT_CLIPS)), decode(recogniser, nbest=3, length_penalty=0.0), strict=True
    ):
        batch = recogniser.tensors_of(collate([example], with_targets=False))
        options = {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 3}
        result = recogniser.generate(**batch, **SEARCH, **options, length_penalty=0.0)
        ours = [hypothesis.log_probability, *(a["log_probability"] for a in hypothesis.alternatives)]
        np.testing.assert_allclose(ours, result.sequences_scores, atol=2e-4)
        assert ours == sorted(ours, reverse=True)


def test_the_first_of_the_nbest_is_the_hypothesis_without_them(recogniser):
    alone, with_others = decode(recogniser), decode(recogniser, nbest=3)
    assert [h.text for h in alone] == [h.text for h in with_others]
    assert [h.problem for h in alone] == [h.problem for h in with_others]
    assert {len(h.alternatives) for h in with_others} == {2}
    others = [{a["text"] for a in h.alternatives} - {h.text} for h in with_others]
    assert all(others)  # other texts


def test_numbers_and_alternatives_of_a_clip_are_the_same_alone_and_in_a_batch(recogniser):
    options = {"nbest": 2, "confidence": True}
    for alone, together in zip(decode(recogniser, 1, **options), decode(recogniser, **options), strict=True):
        assert (alone.text, alone.problem) == (together.text, together.problem)
        assert alone.log_probability == pytest.approx(together.log_probability, abs=3e-4)
        assert [w["word"] for w in alone.words] == [w["word"] for w in together.words]
        confidences = [[w["confidence"] for w in h.words] for h in (alone, together)]
        np.testing.assert_allclose(*confidences, atol=3e-4)
        assert [a["text"] for a in alone.alternatives] == [a["text"] for a in together.alternatives]


def test_penalties_change_the_text_but_not_of_what_the_numbers_are(recogniser):
    examples, penalty = list(recogniser.make_dataset(records(EIGHT_CLIPS))), {"no_repeat_ngram_size": 1, "num_beams": 1}
    plain, changed = decode(recogniser, num_beams=1), decode(recogniser, **penalty, confidence=True)
    assert [h.text for h in plain] != [h.text for h in changed]
    for example, hypothesis in zip(examples, changed, strict=True):
        (answer,) = answers_of(recogniser, example, **penalty, max_new_tokens=12)
        wanted = forward_log_probability(recogniser, example, answer)
        assert hypothesis.log_probability == pytest.approx(wanted, abs=2e-4)


def test_nothing_is_added_that_was_not_asked_for(recogniser):
    for hypothesis in decode(recogniser):
        assert hypothesis == Hypothesis(hypothesis.index, hypothesis.text, hypothesis.problem)
    assert {(h.words, h.confidence) for h in decode(recogniser, nbest=2)} == {(None, None)}
    assert {h.alternatives for h in decode(recogniser, confidence=True)} == {None}


def test_a_clip_that_cannot_be_read_has_no_confidence(recogniser):
    two = records((1.0, 1.0))
    two[1]["wav"] = np.full(16000, np.nan)
    dataset = recogniser.make_dataset(two, on_bad="keep")
    (hypotheses,) = recogniser.decode(dataset, nbest=2, confidence=True, **SEARCH)
    readable, unreadable = sorted(hypotheses, key=lambda hypothesis: hypothesis.index)
    assert 0 < readable.confidence < 1 and unreadable.problem
    assert unreadable == Hypothesis(1, "", unreadable.problem)


# Words


@pytest.fixture(scope="module")
def words():
    """words(ids, probabilities) -> {word: confidence}, with the tokenizer that is returned too."""
    tokenizer = make_tokenizer()

    def of_tokens(ids: list[int], probabilities: list[float]) -> list[tuple[str, float]]:
        found = words_with_confidence(ids, [math.log(p) for p in probabilities], tokenizer)
        return [(word["word"], word["confidence"]) for word in found]

    return tokenizer, of_tokens


def test_the_confidence_of_a_word_is_the_product_of_those_of_its_tokens(words):
    tokenizer, of_tokens = words
    ids = [tokenizer.encode(part, add_special_tokens=False) for part in ("hello", " zq", " world")]
    assert len(ids[1]) > 1  # a word that the tokenizer does not know
    probabilities = [[0.9] * len(ids[0]), [0.5] * len(ids[1]), [0.7] * len(ids[2])]
    wanted = [(word, p[0] ** len(p)) for word, p in zip(("hello", "zq", "world"), probabilities, strict=True)]
    found = of_tokens(sum(ids, []), sum(probabilities, []))
    assert [word for word, _ in found] == [word for word, _ in wanted]
    np.testing.assert_allclose([c for _, c in found], [c for _, c in wanted], atol=1e-4)


def test_a_character_of_several_tokens_and_a_chinese_one_count_as_wholes(words):
    """Three bytes each, of which the tokenizer makes tokens; the first holds the space too, or stands alone."""
    tokenizer, of_tokens = words
    ids = tokenizer.encode("é 好人", add_special_tokens=False)
    assert len(ids) >= 2 + 6
    found = of_tokens(ids, [0.9] * len(ids))
    assert [word for word, _ in found] == ["é", "好", "人"]
    assert found[1][1] == pytest.approx(0.9**4, abs=1e-4)  # with the space
    assert found[2][1] == pytest.approx(0.9**3, abs=1e-4)


def test_a_token_with_parts_of_two_words_counts_for_both():
    """Tokens that are written out."""

    class Letters:
        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(row) for row in rows]

    found = words_with_confidence(["ab", " c", "d", "e"], [math.log(p) for p in (0.5, 0.8, 0.9, 0.9)], Letters())
    assert found == [{"word": "ab", "confidence": 0.5}, {"word": "cde", "confidence": 0.648}]
    found = words_with_confidence(["a", "b c", "好人"], [math.log(p) for p in (0.5, 0.8, 0.9)], Letters())
    assert [(w["word"], w["confidence"]) for w in found] == [("ab", 0.4), ("c", 0.8), ("好", 0.9), ("人", 0.9)]


def test_words_and_end_together_have_the_probability_of_the_line(recogniser):
    ends = recogniser.llm.generation_config.eos_token_id
    for example, hypothesis in zip(
        recogniser.make_dataset(records(EIGHT_CLIPS)), decode(recogniser, confidence=True), strict=True
    ):
        (answer,) = answers_of(recogniser, example, **SEARCH)
        assert answer[-1] in ends
        end = forward_log_probability(recogniser, example, answer)
        end -= forward_log_probability(recogniser, example, answer[:-1]) if answer[:-1] else 0
        product = math.prod(word["confidence"] for word in hypothesis.words) * math.exp(end)
        assert product == pytest.approx(math.exp(hypothesis.log_probability), rel=0.02, abs=1e-4)


def test_an_empty_transcript_has_no_words(words):
    assert words[1]([], []) == []
    assert words[1](words[0].encode(" ", add_special_tokens=False), [0.5]) == []


def test_longer_lines_are_not_less_sure_by_their_length_alone(recogniser):
    """The line's confidence is a mean over tokens: it lies between the least and the most likely of them."""
    clip = noise(1.0)
    dataset = recogniser.make_dataset([{"wav": clip, "where": "a:1"}], with_targets=False)
    for max_new_tokens in (2, 12):
        ((hypothesis,),) = recogniser.decode(dataset, num_beams=1, max_new_tokens=max_new_tokens, confidence=True)
        assert hypothesis.confidence >= math.exp(hypothesis.log_probability)
