"""What encoders.py promises, of every family: frames without a trace of the padding, exact lengths, layers, errors."""

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import whisper
from families import (
    ENCODERS,
    LLMS,
    make_parakeet,
    make_w2v_bert,
    make_wave_encoder,
    make_whisper_hf,
    make_whisper_openai,
)
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from encoders import OPENAI_NAMES, SpeechEncoder, extract, load_encoder, rename
from manifest import SAMPLE_RATE, InputError

RELATIVES = {  # of the families, with what each of them has of its own
    "wav2vec2_adapter": partial(
        make_wave_encoder, name="Wav2Vec2", large=True, add_adapter=True, num_adapter_layers=2, output_hidden_size=24
    ),
    "w2v_bert_adapter": partial(
        make_w2v_bert, add_adapter=True, num_adapter_layers=2, use_intermediate_ffn_before_adapter=True
    ),
    "wav2vec2_conformer": partial(make_wave_encoder, name="Wav2Vec2Conformer", conv_depthwise_kernel_size=7),
    "hubert_batch_norm": partial(make_wave_encoder, name="Hubert", conv_pos_batch_norm=True),
    "unispeech": partial(make_wave_encoder, name="UniSpeech"),
    "unispeech_sat": partial(make_wave_encoder, name="UniSpeechSat", large=True),
    "data2vec": partial(make_wave_encoder, name="Data2VecAudio"),
    "parakeet_rnnt": partial(make_parakeet, name="ParakeetForRNNT", vocab_size=65, blank_token_id=64),
    "parakeet_tdt": partial(make_parakeet, name="ParakeetForTDT", vocab_size=65, blank_token_id=64),
}
FAMILIES, EVERYTHING = list(ENCODERS), [*ENCODERS, *RELATIVES]
SECONDS = [0.1, 5, 0.45, 1.01, 2.5]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness goes up and down, so that no two stretches of it are alike."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (random.normal(0, 0.1, len(time)) * np.sin(time * random.uniform(3, 9)) ** 2).astype(np.float32)


def batch_of(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


def alone(encoder: SpeechEncoder, features: Tensor) -> Tensor:
    """Frames (T, D) of one clip."""
    with torch.no_grad():
        return encoder(features[None], torch.tensor([len(features)]))[0]


def clips_for(encoder: SpeechEncoder) -> list[Tensor]:
    """What the encoder takes of five clips of very different length."""
    return [extract(encoder.feature_extractor, noise(seconds, seed)) for seed, seconds in enumerate(SECONDS)]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory) -> Callable[[str], Path]:
    """path_of(name): the checkpoint of a family, built when it is first asked for."""
    folder, built = tmp_path_factory.mktemp("encoders"), {}

    def build(name: str) -> Path:
        if name not in built:
            built[name] = (ENCODERS | RELATIVES)[name](folder / name)
        return built[name]

    return build


@pytest.fixture(scope="module")
def encoder_of(path_of) -> Callable[[str], SpeechEncoder]:
    """encoder_of(name): an encoder that tests share, and do not change."""
    loaded = {}

    def load(name: str) -> SpeechEncoder:
        if name not in loaded:
            loaded[name] = load_encoder(str(path_of(name)))
        return loaded[name]

    return load


def reference(path: Path, features: Tensor) -> tuple[Tensor, ...]:
    """hidden_states and last_hidden_state of a clip, as the unchanged model of transformers gives them, unmasked."""
    model = transformers.AutoModel.from_pretrained(path).eval()
    model = model.encoder if model.config.model_type in ("whisper", "canary") or "parakeet" in str(path) else model
    features = features.T if model.config.model_type == "whisper" else features
    with torch.no_grad():
        output = model(features[None], output_hidden_states=True)
    return *(state[0] for state in output.hidden_states), output.last_hidden_state[0]


# Padding and lengths


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_clip_has_the_same_frames_alone_and_in_a_batch(encoder_of, name):
    encoder = encoder_of(name)
    clips = clips_for(encoder)
    with torch.no_grad():
        together = encoder(*batch_of(clips))
    assert together.shape[2] == encoder.output_size
    for clip, row in zip(clips, together, strict=True):
        frames = alone(encoder, clip)
        assert len(frames) == encoder.output_lengths(len(clip)) > 0
        torch.testing.assert_close(row[: len(frames)], frames, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", EVERYTHING)
def test_gradients_reach_a_clip_to_its_ends_and_no_other_clip(encoder_of, name):
    encoder = encoder_of(name)
    features, lengths = batch_of(clips_for(encoder))
    frames = encoder(features.requires_grad_(), lengths)
    frames[2, : encoder.output_lengths(lengths)[2]].square().sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.flatten(1).any(1).tolist() == [False, False, True, False, False]
    stride = lengths[2] // encoder.output_lengths(lengths)[2]
    assert features.grad[2, 0].any() and features.grad[2, lengths[2] - 2 * stride : lengths[2]].any()


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_clip_too_short_for_a_frame_does_no_harm_to_its_batch(encoder_of, name):
    encoder = encoder_of(name)
    takes_samples = encoder.input_name == "input_values"
    clip = clips_for(encoder)[3]
    for other in (clip, clip[: 500 if takes_samples else 2]):  # the last has one frame
        lengths = torch.tensor([0, len(other), 250 if takes_samples else 0])
        assert encoder.output_lengths(lengths).tolist() == [0, encoder.output_lengths(len(other)), 0]
        with torch.no_grad():
            frames = encoder(torch.stack([other * 0, other, other * 0]), lengths)
        assert frames.isfinite().all()
        expected = alone(encoder, other)
        torch.testing.assert_close(frames[1, : len(expected)], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_number_of_frames_is_known_beforehand(encoder_of, name):
    encoder = encoder_of(name)
    clip = clips_for(encoder)[1]
    lengths = [*range(1, 40), 123, 200, 249]
    if encoder.input_name == "input_values":
        lengths = [400, 719, 720, 721, *range(800, 2400, 79), 7999, 8000, 16001, 40000]
    told = encoder.output_lengths(torch.tensor(lengths))
    assert told.dtype == torch.long
    assert told.tolist() == [len(alone(encoder, clip[:length])) for length in lengths]
    assert told.tolist() == [encoder.output_lengths(length) for length in lengths]
    assert encoder.output_lengths(torch.tensor(lengths[-1])) == told[-1]
    assert [encoder.output_lengths(length) for length in (0, -5, -100000)] == [0, 0, 0]


def test_the_real_frame_rates(encoder_of):
    per_second = {"whisper_hf": 50, "wav2vec2_base": 50, "w2v_bert": 50, "parakeet": 12.5, "canary": 12.5}
    for name, rate in per_second.items():
        encoder = encoder_of(name)
        assert encoder.output_lengths(len(clips_for(encoder)[1])) == pytest.approx(5 * rate, abs=1), name


# The same as the originals


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "whisper_openai"])
def test_frames_are_those_of_transformers_for_a_clip_alone(path_of, encoder_of, name):
    encoder = encoder_of(name)
    clip = extract(encoder.feature_extractor, noise(1.3), pad_to_30s=encoder.is_whisper)
    torch.testing.assert_close(alone(encoder, clip), reference(path_of(name), clip)[-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("seconds", [30, 7.77, 0.1])
def test_whispers_frames_are_those_of_openai_at_any_length(path_of, encoder_of, seconds):
    encoder, own = encoder_of("whisper_openai"), whisper.load_model(path_of("whisper_openai")).encoder
    features = extract(encoder.feature_extractor, noise(seconds))
    frames = alone(encoder, features)
    own.positional_embedding = own.positional_embedding[: len(frames)]  # else it wants 30 s
    with torch.no_grad():
        torch.testing.assert_close(frames, own(features.T[None])[0], atol=1e-5, rtol=0)


def test_whispers_weights_can_be_named_as_openai_does_again(path_of):
    own = whisper.load_model(path_of("whisper_openai")).encoder.state_dict()
    renamed = rename(own, OPENAI_NAMES)
    assert renamed.keys() == load_encoder(path_of("whisper_openai")).model.state_dict().keys()
    assert list(rename(renamed, [pair[::-1] for pair in OPENAI_NAMES])) == list(own)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.03, 3.21, 31])
def test_whispers_features_are_those_of_openai(num_mels, seconds):
    extractor, samples = transformers.WhisperFeatureExtractor(num_mels), noise(seconds)
    for pad, own in ((False, samples), (True, samples if seconds > 30 else whisper.pad_or_trim(samples))):
        features = extract(extractor, samples, pad_to_30s=pad)
        torch.testing.assert_close(features, whisper.log_mel_spectrogram(own, num_mels).T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [make_whisper_openai, make_whisper_hf])
def test_the_number_of_mel_bins_is_read_from_the_checkpoint(tmp_path, make):
    encoder = load_encoder(str(make(tmp_path / "whisper", num_mels=128)))
    assert alone(encoder, extract(encoder.feature_extractor, noise(1))).shape == (50, 32)


# Features


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_of_the_clip_alone_and_cut_by_the_extractors_own_mask(encoder_of, name):
    extractor = pickle.loads(pickle.dumps(encoder_of(name).feature_extractor))  # as on its way to a worker
    samples = noise(1.234)
    features = extract(extractor, samples)
    if encoder_of(name).input_name == "input_values":
        assert features.shape == samples.shape
        expected = (samples - samples.mean()) / samples.std() if extractor.do_normalize else samples
        np.testing.assert_allclose(features, expected, atol=1e-3)
    else:
        frames, bins = {"w2v_bert": (60, 160), "canary": (123, 128)}.get(name, (123, 80))
        assert features.shape == (frames, bins)
    assert features.dtype == torch.float32 and features.isfinite().all()
    shortest = extract(extractor, samples[:400])
    assert len(shortest) == 0 or shortest.isfinite().all()


# Layers


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "whisper_openai"])
def test_a_layers_output_is_the_hidden_state_of_transformers(path_of, encoder_of, name):
    clip = extract(encoder_of(name).feature_extractor, noise(1.3), pad_to_30s=encoder_of(name).is_whisper)
    states = reference(path_of(name), clip)[:-1]
    assert len(states) == 4
    for layer in (1, 2, 3):
        encoder = load_encoder(str(path_of(name)), layer=layer)
        torch.testing.assert_close(alone(encoder, clip), states[layer], atol=2e-5, rtol=0)
        assert encoder.model.config.num_hidden_layers == layer and encoder.output_size == 32
        assert encoder.output_lengths(len(clip)) == len(states[layer])


def test_layers_of_an_openai_whisper_are_those_of_its_copy(path_of, tmp_path):
    load_encoder(str(path_of("whisper_openai"))).save_pretrained(tmp_path)
    for layer in (1, 2, 3):
        ours, copy = (load_encoder(str(path), layer=layer) for path in (path_of("whisper_openai"), tmp_path))
        clip = extract(ours.feature_extractor, noise(1.3))
        assert alone(ours, clip).equal(alone(copy, clip))


@pytest.mark.parametrize("name", ["whisper_openai", "whisper_hf", "wavlm_base", "canary"])
@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_is_not_there_is_refused_with_the_range(path_of, name, layer):
    with pytest.raises(InputError, match=rf"^encoder layer {layer}: wanted 1 \.\.\. 3, or none") as error:
        load_encoder(str(path_of(name)), layer=layer)
    assert "\n" not in str(error.value)


# Weights


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_encoder_is_frozen_and_in_eval_mode_and_holds_nothing_but_itself(encoder_of, name):
    encoder = encoder_of(name)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    names = dict(encoder.named_parameters())
    assert not [n for n in names if "decoder" in n or "head" in n or not n.startswith("model.")]


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("layer", [None, 2, 3])
def test_an_encoder_comes_back_from_its_folder_to_the_bit(path_of, tmp_path, name, layer):
    encoder = load_encoder(str(path_of(name)), layer=layer)
    encoder.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == encoder.model.state_dict().keys()
    clip = clips_for(encoder)[3]
    for again in (load_encoder(str(tmp_path)), load_encoder(str(tmp_path), layer=layer)):
        assert extract(again.feature_extractor, noise(SECONDS[3], 3)).equal(clip)
        assert alone(again, clip).equal(alone(encoder, clip))


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_encoder_runs_in_bf16(path_of, encoder_of, tmp_path, name):
    encoder = load_encoder(str(path_of(name)), dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    clips = clips_for(encoder)
    with torch.no_grad():
        frames, exact = encoder(*batch_of(clips)), encoder_of(name)(*batch_of(clips))
    assert frames.dtype == torch.bfloat16
    count = encoder.output_lengths(len(clips[1]))
    assert (frames[1, :count] - exact[1, :count]).float().norm() / exact[1, :count].norm() < 0.1
    encoder.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).model.dtype == torch.bfloat16  # the checkpoint's own, unless told otherwise


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_in_an_encoder_learns_with_and_without_gradient_checkpointing(path_of, name):
    encoder = load_encoder(str(path_of(name)))
    clips = clips_for(encoder)
    inject_adapter_in_model(
        LoraConfig(target_modules=r".*layers.*(fc1|linear1|ffn1.*dense|intermediate_dense)"), encoder.model
    )
    encoder.requires_grad_(False)
    trained = [p for n, p in encoder.named_parameters() if "lora_" in n]
    for number, p in enumerate(trained):
        p.requires_grad_().data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))

    def gradients() -> list[Tensor]:
        frames, lengths = encoder(*batch_of(clips)), encoder.output_lengths(batch_of(clips)[1])
        sum(row[:length].square().mean() for row, length in zip(frames, lengths, strict=True)).backward()
        found = [p.grad for p in trained]
        encoder.zero_grad()
        return found

    plain = gradients()
    model = encoder.model  # two names of one thing in two versions of transformers
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in encoder.modules():  # as SpeechLLM does: checkpoints are made in training mode, dropout is not wanted
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
    assert len(trained) >= 6
    for ours, expected in zip(gradients(), plain, strict=True):
        assert expected.abs().sum() > 0 and expected.isfinite().all()
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_mode_brings_dropout_and_no_other_chance(path_of, name):
    encoder = load_encoder(str(path_of(name)))
    clips, quiet = clips_for(encoder), None
    for module in [encoder, *encoder.modules()]:
        module.training = True
        for option, value in vars(module).items():
            if "dropout" in option and isinstance(value, float):
                setattr(module, option, 0.0)
        if isinstance(module, (torch.nn.Dropout, torch.nn.modules.batchnorm._BatchNorm)):
            module.training = False
    for _ in range(3):
        frames = encoder(*batch_of(clips))
        quiet = frames if quiet is None else quiet
        assert frames.equal(quiet)


@pytest.mark.parametrize("name", ["wav2vec2_base", "wavlm_large", "data2vec"])
def test_convolutions_over_samples_need_no_gradients_while_layers_learn(path_of, name):
    encoder = load_encoder(str(path_of(name))).train()
    encoder.model.encoder.layers.requires_grad_(True)
    found = []
    encoder.model.feature_extractor.register_forward_hook(lambda *call: found.append(call[-1].requires_grad))
    assert encoder(*batch_of(clips_for(encoder))).requires_grad and found == [False]


# Wrong input


def without(path: Path, file: str) -> None:
    (path / file).unlink()


def truncated(path: Path, file: str) -> None:
    (path / file).write_bytes((path / file).read_bytes()[:-1000])


def edited(path: Path, file: str, **changes) -> None:
    (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | changes))


def robbed(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def cropped(path: Path, count: int) -> None:
    weights = load_file(path / "model.safetensors")
    weights |= {name: w[:count].clone() for name, w in weights.items() if "layers.1." in name and w.ndim}
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["whisper_hf", "wav2vec2_base", "w2v_bert", "canary"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (partial(without, file="preprocessor_config.json"), "preprocessor_config.json"),
        (partial(without, file="model.safetensors"), "model.safetensors"),
        (partial(without, file="config.json"), "config.json"),
        (partial(truncated, file="model.safetensors"), "SafetensorError: .*incomplete"),
        (partial(truncated, file="config.json"), "not a valid JSON"),
        (partial(edited, file="config.json", model_type="lstm"), "model type `lstm`"),
        (partial(edited, file="preprocessor_config.json", sampling_rate=8000), "8000 Hz audio; wanted 16000 Hz"),
        (robbed, r"weights .* are missing: \S*layers\.1\.\S* and \d+ more"),
        (partial(cropped, count=1), r"layers\.1\.\S* is \(1,.*\), wanted \(\d\d.*\) by its config.json"),
        (partial(cropped, count=0), r"layers\.1\.\S* is \(0,.*tensors of size 0"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_refused_in_one_line(path_of, tmp_path, name, spoil, reason):
    folder = shutil.copytree(path_of(name), tmp_path / "folder")
    spoil(folder)
    with pytest.raises(InputError, match=f"^{folder}: .*{reason}") as error:
        load_encoder(str(folder))
    assert "\n" not in str(error.value)


def test_a_counter_that_nothing_uses_may_be_missing(path_of, tmp_path):
    folder = shutil.copytree(path_of("parakeet"), tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    load_encoder(str(folder))


def test_weights_of_another_architecture_that_find_no_place_are_told(path_of, tmp_path):
    folder = shutil.copytree(path_of("hubert_large"), tmp_path / "folder")
    shutil.copy(path_of("wavlm_large") / "model.safetensors", folder)
    with pytest.warns(UserWarning, match=r"HubertModel has no place for encoder\.layers\.0\.attention\.gru_rel"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, r"wanted a name or \.pt file of openai-whisper, or a folder or Hub name"),
        (b"", "EOFError"),
        (b"no weights at all", "cannot load a speech encoder"),
        ([1, 2], "cannot load a speech encoder"),
        ({"model": {}}, "KeyError: 'dims'"),
        ({"dims": {"n_mels": 80}, "model_state_dict": {}}, "TypeError"),
        (Path, "weights_only|Weights only"),
    ],
)
def test_a_pt_file_that_is_no_whisper_is_refused_in_one_line(tmp_path, found, reason):
    path = tmp_path / "encoder.pt"
    if isinstance(found, bytes):
        path.write_bytes(found)
    elif found is not None:
        torch.save(found, path)
    with pytest.raises(InputError, match=f"^{path}: .*({reason})") as error:
        load_encoder(str(path))
    assert "\n" not in str(error.value)


def test_what_is_no_speech_encoder_is_refused_in_one_line(tmp_path):
    wanted = {
        str(LLMS["qwen2"](tmp_path / "llm")): "a model of type qwen2; wanted one of whisper",
        str(tmp_path): "cannot load a speech encoder",
        "tiniest": "Model tiniest not found; available models = .*'tiny'",
        "nobody/nothing": "cannot load a speech encoder",
    }
    for name, reason in wanted.items():
        with pytest.raises(InputError, match=f"^{name}: .*{reason}") as error:
            load_encoder(name)
        assert "\n" not in str(error.value)


def test_a_revision_of_an_openai_whisper_is_refused(path_of):
    with pytest.raises(InputError, match="revision v2 of an openai-whisper model"):
        load_encoder(str(path_of("whisper_openai")), revision="v2")
