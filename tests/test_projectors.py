"""What every projector promises, the default one too."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from errors import InputError
from model import Conv1dProjector, SpeechLLMConfig
from projectors import PROJECTORS

LENGTHS = [23, 1, 20, 9, 5, 14, 4]  # frames: with and without a tail, and shorter than the stride
EVERY_PROJECTOR = {"conv1d": Conv1dProjector, **PROJECTORS}
EVERY = pytest.mark.parametrize("name", EVERY_PROJECTOR)


def build(name: str, **options) -> torch.nn.Module:
    """A small projector, 8 wide to 6 wide; its weights are always the same, and no bias or norm is idle."""
    torch.manual_seed(0)
    config = SpeechLLMConfig(**{"projector": name, "projector_hidden_size": 128} | options)
    projector = EVERY_PROJECTOR[name](8, 6, config)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return projector


def clips(lengths: list[int] = LENGTHS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 8, generator=generator) for length in lengths]


def embed(projector, frames: list[torch.Tensor], padding: float = 0.0) -> list[torch.Tensor]:
    """The valid embeddings of clips that are projected in one batch."""
    lengths = torch.tensor([len(clip) for clip in frames])
    embeddings = projector(pad_sequence(frames, batch_first=True, padding_value=padding), lengths)
    return [row[:count] for row, count in zip(embeddings, projector.output_lengths(lengths), strict=True)]


# Sizes


@pytest.mark.parametrize(
    ("llm_size", "encoder_size", "millions"),
    [
        (4096, 384, "9.46"),  # LLaMA 3 8B, Whisper tiny
        (4096, 768, "12.32"),  # LLaMA 3 8B, Whisper small
        (4096, 1280, "18.32"),  # LLaMA 3 8B, Whisper large
        (896, 1280, "12.07"),  # Qwen2 0.5B, Whisper large
        (1536, 1280, "13.32"),  # Qwen2 1.5B, Whisper large
        (3584, 1280, "17.32"),  # Qwen2 7B, Whisper large
        (1536, 384, "4.5"),  # Qwen2 1.5B, Whisper tiny
        (1536, 768, "7.3"),  # Qwen2 1.5B, Whisper small
    ],
)
def test_the_default_projector_has_the_size_that_published_results_name(llm_size, encoder_size, millions):
    with torch.device("meta"):
        projector = Conv1dProjector(encoder_size, llm_size, SpeechLLMConfig())
    num_millions = sum(p.numel() for p in projector.parameters()) / 2**20
    assert f"{num_millions:.{len(millions.partition('.')[2])}f}" == millions


def test_the_default_projector_has_the_tensors_of_published_checkpoints():
    projector = Conv1dProjector(8, 6, SpeechLLMConfig())
    assert {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()} == {
        "conv.weight": (8, 8, 5),
        "conv.bias": (8,),
        "linear1.weight": (2048, 8),
        "linear1.bias": (2048,),
        "linear2.weight": (6, 2048),
        "linear2.bias": (6,),
    }


# Lengths


@EVERY
@pytest.mark.parametrize("stride", [1, 5])
def test_there_are_as_many_embeddings_as_output_lengths_says(name, stride):
    projector = build(name, projector_stride=stride)
    for frames in clips([stride, stride + 1, 23, 24]):
        embeddings = projector(frames[None], torch.tensor([len(frames)]))
        assert embeddings.shape == (1, projector.output_lengths(len(frames)), 6)


@EVERY
@pytest.mark.parametrize("stride", [1, 5])
def test_output_lengths_are_the_same_for_a_number_and_a_tensor(name, stride):
    projector = build(name, projector_stride=stride)
    numbers = [projector.output_lengths(length) for length in range(50)]
    assert all(type(number) is int for number in numbers)
    assert projector.output_lengths(torch.arange(50)).tolist() == numbers
    up = stride - 1 if name == "qformer" else 0  # its last window may be partly padding; the others drop a tail
    assert numbers == [(length + up) // stride for length in range(50)]


# Padding


@EVERY
def test_an_embedding_is_the_same_alone_and_in_a_batch(name):
    projector, frames = build(name), clips()
    for clip, together in zip(frames, embed(projector, frames), strict=True):
        if len(together):
            torch.testing.assert_close(together, embed(projector, [clip])[0], atol=1e-5, rtol=1e-5)


@EVERY
def test_what_stands_in_the_padding_changes_nothing(name):
    projector, frames = build(name), clips()
    zeros, noise = embed(projector, frames), embed(projector, frames, padding=1e4)
    torch.testing.assert_close(noise, zeros, atol=1e-5, rtol=1e-5)


@EVERY
def test_a_gradient_is_the_sum_of_those_of_each_clip_alone(name):
    projector, frames = build(name), clips()
    sum(row.square().sum() for row in embed(projector, frames, padding=7.0)).backward()
    together = {key: p.grad.clone() for key, p in projector.named_parameters()}
    projector.zero_grad()
    for clip in frames:
        if projector.output_lengths(len(clip)):
            embed(projector, [clip])[0].square().sum().backward()
    for key, parameter in projector.named_parameters():
        torch.testing.assert_close(together[key], parameter.grad, atol=1e-3, rtol=1e-4, msg=lambda m, key=key: key + m)


@EVERY
def test_a_clip_without_frames_harms_no_other(name):
    projector, frames = build(name), [*clips([11, 20]), torch.zeros(0, 8)]
    *others, nothing = embed(projector, frames)
    assert len(nothing) == 0
    torch.testing.assert_close(others, embed(projector, frames[:2]), atol=1e-5, rtol=1e-5)
    sum(row.sum() for row in others).backward()
    assert all(p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("name", ["conv1d", "linear", "mlp", "qformer"])
def test_an_embedding_sees_its_own_frames_and_no_others(name):
    """All but the Conformer, which is there to look further."""
    projector, (frames,) = build(name, projector_stride=4), clips([23])
    changed = frames.clone()
    changed[8:12] += 1
    differs = (embed(projector, [changed])[0] - embed(projector, [frames])[0]).abs().amax(1) > 1e-6
    assert differs.tolist() == [n == 2 for n in range(projector.output_lengths(23))]


@EVERY
def test_every_frame_counts_and_so_does_the_order_of_the_frames_of_an_embedding(name):
    projector, (frames,) = build(name), clips([20])
    embeddings = embed(projector, [frames])[0]
    swapped = frames[[0, 1, 2, 3, 4, 5, 6, 8, 7, 9, *range(10, 20)]]
    assert (embed(projector, [swapped])[0] - embeddings).abs().max() > 1e-4
    for n in range(20):
        changed = frames.clone()
        changed[n] += 1
        assert (embed(projector, [changed])[0] - embeddings).abs().max() > 1e-4


def test_the_q_former_reads_a_tail_that_is_shorter_than_the_stride():
    projector, (frames,) = build("qformer"), clips([23])
    differs = (embed(projector, [frames])[0] - embed(projector, [frames[:22]])[0]).abs().amax(1) > 1e-4
    assert differs.tolist() == [False, False, False, False, True]


# Training


@EVERY
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_gradient_reaches_every_parameter(name, num_layers):
    projector = build(name, projector_num_layers=num_layers)
    sum(row.square().sum() for row in embed(projector, clips())).backward()
    idle = [key for key, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    assert all(p.grad.isfinite().all() for p in projector.parameters())


@EVERY
def test_training_and_evaluation_compute_the_same_every_time(name):
    projector, frames = build(name), clips()
    trained = embed(projector.train(), frames)
    assert all(a.equal(b) for a, b in zip(trained, embed(projector, frames), strict=True))
    torch.testing.assert_close(embed(projector.eval(), frames), trained)


@EVERY
def test_the_weights_are_fp32_and_frames_of_any_type_are_cast_to_theirs(name):
    projector, frames = build(name), clips()
    assert {p.dtype for p in projector.parameters()} == {torch.float32}
    rounded = [clip.bfloat16() for clip in frames]
    expected = embed(projector, [clip.float() for clip in rounded])
    assert all(a.equal(b) for a, b in zip(embed(projector, rounded), expected, strict=True))
    assert embed(projector.bfloat16(), frames)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embed(build(name), frames)[0].float(), expected[0], atol=0.2, rtol=0.1)


@EVERY
def test_nothing_but_parameters_is_in_a_checkpoint(name):
    projector = build(name)
    assert set(projector.state_dict()) == {key for key, _ in projector.named_parameters()}


# Settings


@EVERY
def test_each_setting_changes_the_projector(name):
    def sizes(**options) -> dict:
        return {key: p.shape for key, p in build(name, **options).named_parameters()}

    assert sizes(projector_hidden_size=64) != sizes()
    assert sizes(projector_stride=3) != sizes()
    assert (sizes(projector_num_layers=3) != sizes()) == (name in ("mlp", "conformer", "qformer"))
    frames = clips()
    relu, silu = (embed(build(name, projector_activation=activation), frames)[0] for activation in ("relu", "silu"))
    assert (relu - silu).abs().max() > 1e-4


@pytest.mark.parametrize("setting", ["projector_stride", "projector_hidden_size", "projector_num_layers"])
def test_a_setting_below_1_is_an_error(setting):
    with pytest.raises(InputError, match=f"{setting} is 0; wanted 1 or more"):
        SpeechLLMConfig(**{setting: 0})


def test_an_unknown_activation_is_an_error_that_names_those_there_are():
    with pytest.raises(InputError, match=r"projector_activation is rely; wanted one of gelu, .* relu, .* silu"):
        SpeechLLMConfig(projector_activation="rely")


@pytest.mark.parametrize(("hidden_size", "millions"), [(512, 12), (2048, 193)])
def test_two_conformer_layers_have_the_size_that_their_description_says(hidden_size, millions):
    with torch.device("meta"):
        layers = build("conformer", projector_hidden_size=hidden_size).conformer
    assert round(sum(p.numel() for p in layers.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", ["conformer", "qformer"])
def test_a_width_that_attention_heads_cannot_share_is_an_error(name):
    with pytest.raises(InputError, match="--projector_hidden_size 200: wanted a multiple of 64"):
        build(name, projector_hidden_size=200)
    assert embed(build(name, projector_hidden_size=32), clips())[0].shape[1] == 6  # a single head
