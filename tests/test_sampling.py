"""Samples and penalties on repetition: reproducible, and no clip's depend on what else is decoded."""

import numpy as np
import pytest
import torch
from trials import EIGHT_CLIPS, records

import sampling
from manifest import DecodingOptions
from model import SpeechLLM

NEW = {"max_new_tokens": 16, "num_beams": 1}


def decode(model: SpeechLLM, batch_size: int = 16, positions=None, **options) -> list[str]:
    batches = model.decode(model.make_dataset(records(EIGHT_CLIPS)), positions, batch_size, **NEW | options)
    hypotheses = sorted(sum(batches, []), key=lambda hypothesis: hypothesis.index)
    return [" | ".join([h.text, *(other["text"] for other in h.alternatives or [])]) for h in hypotheses]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"do_sample": True, "top_p": 0.9, "nbest": 3}])
def test_the_samples_of_a_clip_are_the_same_alone_as_in_a_batch(recogniser, options):
    together = decode(recogniser, **options)
    assert decode(recogniser, 1, **options) == together
    assert decode(recogniser, 2, [6, 3, 1], **options) == [together[1], together[3], together[6]]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("penalty", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}])
def test_a_penalty_is_the_same_alone_as_in_a_batch(model, penalty, num_beams):
    """Whose prompts have more padding, the shorter the clip."""
    options = {"num_beams": num_beams, "max_new_tokens": 20}
    together = decode(model, **options, **penalty)
    assert decode(model, 1, **options, **penalty) == together != decode(model, **options)


def test_a_sample_depends_on_the_seed_and_on_nothing_else(recogniser):
    first = decode(recogniser, do_sample=True)
    torch.manual_seed(7)  # the random numbers of the process are not used
    assert decode(recogniser, do_sample=True) == first
    assert decode(recogniser, do_sample=True, num_beams=4) == first  # samples have no beams
    assert decode(recogniser, do_sample=True, seed=1) != first


def test_the_same_clip_is_drawn_otherwise_on_another_line(recogniser):
    rows = [dict(records((1.0,))[0], where=f"a:{n}") for n in range(8)]
    (hypotheses,) = recogniser.decode(recogniser.make_dataset(rows), do_sample=True, **NEW)
    assert len({hypothesis.text for hypothesis in hypotheses}) > 4


def test_the_first_of_several_samples_is_the_one_without_the_others(recogniser):
    several = [texts.split(" | ") for texts in decode(recogniser, do_sample=True, nbest=4)]
    assert [texts[0] for texts in several] == decode(recogniser, do_sample=True)
    assert all(len(set(texts)) > 1 for texts in several)


def test_the_likeliest_token_alone_is_greedy_search(recogniser):
    assert decode(recogniser, do_sample=True, top_p=1e-6) == decode(recogniser)


def test_a_low_temperature_keeps_to_likely_tokens(recogniser):
    greedy = decode(recogniser)
    same = [sum(map(str.__eq__, greedy, decode(recogniser, do_sample=True, temperature=t))) for t in (0.02, 2.0)]
    assert same[0] >= 6 and same[1] <= 3


def test_draws_have_the_frequencies_of_the_distribution():
    probabilities, count = torch.tensor([0.5, 0.0, 0.3, 0.2]), 20_000
    options = DecodingOptions(do_sample=True, max_new_tokens=1)
    *_, draw = sampling.keywords(options, range(count))["logits_processor"]
    scores = draw(torch.zeros(count, 0, dtype=torch.long), probabilities.log().expand(count, 4))
    assert ((scores == 0).sum(1) == 1).all() and ((scores == 0) | (scores == -torch.inf)).all()
    np.testing.assert_allclose((scores == 0).float().mean(0), probabilities, atol=0.012)  # 3.4 standard errors
    assert not (scores[:, 1] == 0).any()


def test_no_draw_is_a_token_without_probability():
    """A random number beyond all sums, as rounding can make them, stands for the last token that is left."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    scores = sampling.Draw(torch.ones(1, 1))(torch.zeros(1, 0, dtype=torch.long), logits)
    assert scores.tolist() == [[-torch.inf, 0.0, -torch.inf, -torch.inf]]


def test_the_random_numbers_of_a_clip_are_its_own():
    def randoms(indices: list[int], **options) -> np.ndarray:
        options = DecodingOptions(do_sample=True, max_new_tokens=50, **options)
        return sampling.keywords(options, indices)["logits_processor"][-1].randoms.numpy()

    both = randoms([3, 8], nbest=2)
    np.testing.assert_array_equal(randoms([8], nbest=2), both[2:])
    np.testing.assert_array_equal(randoms([8]), both[2:3])
    assert len(np.unique(both.round(6))) > 190
    assert both.min() >= 0 and both.max() < 1


def test_no_run_of_tokens_comes_twice(recogniser):
    """Of single tokens, which in this vocabulary are characters."""
    texts = decode(recogniser, no_repeat_ngram_size=1)
    hanzi = [[letter for letter in text if "\u4e00" <= letter <= "\u9fff"] for text in texts]
    assert sum(map(len, hanzi)) > 15
    assert all(len(letters) == len(set(letters)) for letters in hanzi)


def test_a_repetition_penalty_makes_repetitions_fewer(model):
    plain, penalised = (decode(model, repetition_penalty=penalty) for penalty in (1.0, 5.0))
    shares = [sum(len(set(text)) / len(text) for text in texts) / len(texts) for texts in (plain, penalised)]
    assert shares[0] < shares[1]  # of different letters in a text
