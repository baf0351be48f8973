"""What every encoder promises, Whisper too: frames without a trace of the padding, exact lengths, layers, errors."""

import json
import pickle
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import whisper
from families import ENCODERS, LLMS, make_parakeet, make_wave_encoder, make_whisper_hf, make_whisper_openai
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import encoders
from errors import InputError
from manifest import SAMPLE_RATE
from model import SpeechLLM, load_encoder, transformers_name

RELATIVES = {  # of the families, each with a part that no other has
    "hubert_batch_norm": partial(make_wave_encoder, name="Hubert", conv_pos_batch_norm=True),
    "parakeet_rnnt": partial(make_parakeet, name="ParakeetForRNNT", vocab_size=65, blank_token_id=64),
    "parakeet_tdt": partial(make_parakeet, name="ParakeetForTDT", vocab_size=65, blank_token_id=64),
}
EACH = pytest.mark.parametrize("name", [*ENCODERS, "hubert_batch_norm"])  # all Parakeets have one architecture
ONE_OF_EACH_CLASS = pytest.mark.parametrize(
    "name", ["whisper_openai", "whisper_hf", "wav2vec2_large", "hubert_batch_norm", "wavlm_base", "w2v_bert", "canary"]
)
SECONDS = [0.1, 3, 0.45, 1.01, 2]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness goes up and down, so that no two stretches of it are alike."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (random.normal(0, 0.1, len(time)) * np.sin(time * random.uniform(3, 9)) ** 2).astype(np.float32)


def noise_for(name: str, seconds: float) -> np.ndarray:
    """Noise, followed by silence up to 30 s for Whisper, as transformers' own model wants it."""
    return whisper.pad_or_trim(noise(seconds)) if "whisper" in name else noise(seconds)


def batch_of(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


def alone(encoder: nn.Module, features: Tensor) -> Tensor:
    """Frames (T, D) of one clip."""
    with torch.no_grad():
        return encoder(features[None], torch.tensor([len(features)]))[0]


def clips_for(encoder: nn.Module) -> list[Tensor]:
    """What the encoder takes of five clips of very different length."""
    return [encoder.extract(noise(seconds, seed)) for seed, seconds in enumerate(SECONDS)]


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
def encoder_of(path_of) -> Callable[[str], nn.Module]:
    """encoder_of(name): an encoder that tests share, and do not change."""
    loaded = {}

    def load(name: str) -> nn.Module:
        if name not in loaded:
            loaded[name] = load_encoder(str(path_of(name)))
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return str(LLMS["qwen2"](tmp_path_factory.mktemp("llm")))


@pytest.fixture
def without_dropout(path_of, tmp_path) -> Callable[[str], Path]:
    """without_dropout(name): the checkpoint of a family, whose config skips layers and masks frames but has no dropout.

    Neither shall happen in an encoder of ours.
    """

    def build(name: str) -> Path:
        if name == "whisper_openai":  # its config has none
            return path_of(name)
        folder = shutil.copytree(path_of(name), tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config.get("encoder_config", {})):
            part |= {key: 0.0 for key in part if "dropout" in key}
            part |= {key: 0.5 for key in part if "layerdrop" in key or key in ("mask_time_prob", "mask_feature_prob")}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return build


def reference(path: Path, features: Tensor) -> tuple[Tensor, ...]:
    """hidden_states and last_hidden_state of a clip, as the unchanged model of transformers gives them, unmasked."""
    model = transformers.AutoModel.from_pretrained(path).eval()
    model = model.encoder if model.config.model_type in ("whisper", "canary") or "parakeet" in str(path) else model
    features = features.T if model.config.model_type == "whisper" else features
    with torch.no_grad():
        output = model(features[None], output_hidden_states=True)
    return *(state[0] for state in output.hidden_states), output.last_hidden_state[0]


# Padding and lengths


@EACH
def test_the_frames_of_a_clip_are_the_same_alone_and_in_a_batch(encoder_of, name):
    encoder = encoder_of(name)
    clips = clips_for(encoder)
    with torch.no_grad():
        together = encoder(*batch_of(clips))
    assert together.shape[2] == encoder.output_size
    for clip, row in zip(clips, together, strict=True):
        frames = alone(encoder, clip)
        assert len(frames) == encoder.output_lengths(len(clip)) > 0
        torch.testing.assert_close(row[: len(frames)], frames, atol=2e-5, rtol=0)


@EACH
def test_gradients_reach_a_clip_to_its_ends_and_no_other_clip(encoder_of, name):
    encoder = encoder_of(name)
    features, lengths = batch_of(clips_for(encoder))
    frames = encoder(features.requires_grad_(), lengths)
    frames[2, : encoder.output_lengths(lengths)[2]].square().sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.flatten(1).any(1).tolist() == [False, False, True, False, False]
    stride = lengths[2] // encoder.output_lengths(lengths)[2]
    assert features.grad[2, 0].any() and features.grad[2, lengths[2] - 2 * stride : lengths[2]].any()


@EACH
def test_a_clip_too_short_for_a_frame_does_no_harm_to_its_batch(encoder_of, name):
    encoder = encoder_of(name)
    clip = clips_for(encoder)[3]
    takes_samples = clip.ndim == 1
    for other in (clip, clip[: 500 if takes_samples else 2]):  # the second has one frame
        lengths = torch.tensor([0, len(other), 250 if takes_samples else 0])
        assert encoder.output_lengths(lengths).tolist() == [0, encoder.output_lengths(len(other)), 0]
        with torch.no_grad():
            frames = encoder(torch.stack([other * 0, other, other * 0]), lengths)
        assert frames.isfinite().all()
        expected = alone(encoder, other)
        torch.testing.assert_close(frames[1, : len(expected)], expected, atol=2e-5, rtol=0)


@ONE_OF_EACH_CLASS
def test_the_number_of_frames_is_known_beforehand(encoder_of, name):
    encoder = encoder_of(name)
    clip = encoder.extract(noise(5))
    lengths = [*range(1, 40), 123, 200, 249]
    if clip.ndim == 1:  # samples
        lengths = [400, 719, 720, 721, *range(800, 2400, 79), 7999, 8000, 16001, 40000]
    num_frames = encoder.output_lengths(torch.tensor(lengths))
    assert num_frames.dtype == torch.long
    assert num_frames.tolist() == [len(alone(encoder, clip[:length])) for length in lengths]
    assert num_frames.tolist() == [encoder.output_lengths(length) for length in lengths]
    assert encoder.output_lengths(torch.tensor(lengths[-1])) == num_frames[-1]
    assert [encoder.output_lengths(length) for length in (0, -5, -100000)] == [0, 0, 0]
    assert encoder.output_lengths(torch.tensor([0, -5, -100000])).tolist() == [0, 0, 0]


def test_the_real_frame_rates(encoder_of):
    per_second = {"whisper_hf": 50, "wav2vec2_base": 50, "w2v_bert": 50, "parakeet": 12.5, "canary": 12.5}
    for name, rate in per_second.items():
        encoder = encoder_of(name)
        assert encoder.output_lengths(len(encoder.extract(noise(5)))) == pytest.approx(5 * rate, abs=1), name


@EACH
def test_two_threads_may_use_one_encoder(encoder_of, name):
    encoder = encoder_of(name)
    clips = [encoder.extract(noise(seconds, seed)) for seed, seconds in enumerate((0.3, 0.1, 0.15, 0.35))]
    batches = [batch_of(clips[:2]), batch_of(clips[2:])]
    with torch.no_grad():
        expected = [encoder(*batch) for batch in batches]
    differences = [[], []]

    def work(thread: int) -> None:
        for _ in range(30):
            with torch.no_grad():
                frames = encoder(*batches[thread])
            differences[thread].append((frames - expected[thread]).abs().max().item())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the threads take turns all the time
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert differences == [[0.0] * 30, [0.0] * 30]


# The same as the originals


@pytest.mark.parametrize("name", [name for name in (*ENCODERS, *RELATIVES) if name != "whisper_openai"])
def test_frames_and_layers_are_those_of_transformers_for_a_clip_alone(path_of, encoder_of, name):
    encoder = encoder_of(name)
    clip = encoder.extract(noise_for(name, 1.3))
    *states, last = reference(path_of(name), clip)
    torch.testing.assert_close(alone(encoder, clip), last, atol=2e-5, rtol=0)
    assert len(states) == 4  # the first is what goes into the first layer
    for layer in (1, 3):
        encoder = load_encoder(str(path_of(name)), layer=layer)
        torch.testing.assert_close(alone(encoder, clip), states[layer], atol=2e-5, rtol=0)
        assert len(encoder.model.layers if hasattr(encoder.model, "layers") else encoder.model.encoder.layers) == layer
        assert encoder.output_size == 32 and encoder.output_lengths(len(clip)) == len(states[layer])


@pytest.mark.parametrize("seconds", [30, 7.77, 0.1])
def test_whispers_frames_are_those_of_openai_at_any_length(path_of, encoder_of, seconds):
    encoder, original = encoder_of("whisper_openai"), whisper.load_model(path_of("whisper_openai")).encoder
    features = encoder.extract(noise(seconds))
    frames = alone(encoder, features)
    original.positional_embedding = original.positional_embedding[: len(frames)]  # else it wants 30 s
    with torch.no_grad():
        torch.testing.assert_close(frames, original(features.T[None])[0], atol=1e-5, rtol=0)


def test_whispers_weights_have_the_names_that_transformers_has_for_them(path_of):
    original = whisper.load_model(path_of("whisper_openai")).encoder.state_dict()
    names = load_encoder(str(path_of("whisper_openai"))).model.state_dict().keys()
    assert {transformers_name(name) for name in original} == set(names)


@pytest.mark.parametrize("make", [make_whisper_openai, make_whisper_hf])
@pytest.mark.parametrize("num_mels", [80, 128])
def test_whispers_features_are_those_of_openai_with_the_checkpoints_mel_bins(tmp_path, make, num_mels):
    encoder = load_encoder(str(make(tmp_path / "whisper", num_mels=num_mels)))
    assert alone(encoder, encoder.extract(noise(1))).shape == (50, 32)
    for samples in (noise(0.03), noise(3.21), whisper.pad_or_trim(noise(3.21)), noise(31)):
        expected = whisper.log_mel_spectrogram(samples, num_mels).T
        torch.testing.assert_close(encoder.extract(samples), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_of_the_clip_alone_and_cut_by_the_extractors_own_mask(encoder_of, name):
    encoder = encoder_of(name)
    pickled = pickle.dumps(encoder.extract)  # as on its way to a data loading worker
    weight = next(p for p in encoder.parameters() if p.numel() > 1000)
    assert weight.detach().numpy().tobytes()[:1000] not in pickled
    extract, samples = pickle.loads(pickled), noise(1.234)
    features = extract(samples)
    if features.ndim == 1:
        normalises = encoder.feature_extractor.do_normalize
        expected = (samples - samples.mean()) / samples.std() if normalises else samples
        np.testing.assert_allclose(features, expected, atol=1e-3)
    else:
        num_frames, num_mels = {"w2v_bert": (60, 160), "canary": (123, 128)}.get(name, (123, 80))
        assert features.shape == (num_frames, num_mels)
    assert features.dtype == torch.float32 and features.isfinite().all()
    shortest = extract(samples[:400])
    assert len(shortest) == 0 or shortest.isfinite().all()


# Layers and weights


def test_layers_of_an_openai_whisper_are_those_of_its_copy(path_of, tmp_path):
    load_encoder(str(path_of("whisper_openai"))).save_pretrained(tmp_path)
    for layer in (1, 2, 3):
        original, copy = (load_encoder(str(path), layer=layer) for path in (path_of("whisper_openai"), tmp_path))
        clip = original.extract(noise(1.3))
        assert alone(original, clip).equal(alone(copy, clip))


@pytest.mark.parametrize("name", ["whisper_openai", "whisper_hf", "wavlm_base", "w2v_bert", "canary"])
def test_a_layer_that_is_not_there_is_refused_with_the_range(path_of, name):
    for layer in (0, 4, -1):
        with pytest.raises(InputError, match=rf"^encoder layer {layer}: wanted 1 \.\.\. 3, or none") as error:
            load_encoder(str(path_of(name)), layer=layer)
        assert "\n" not in str(error.value)


@EACH
def test_an_encoder_is_frozen_and_in_eval_mode_and_holds_nothing_but_itself(encoder_of, name):
    encoder = encoder_of(name)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    names = dict(encoder.named_parameters())
    assert not [n for n in names if "decoder" in n or "head" in n or not n.startswith("model.")]


@ONE_OF_EACH_CLASS
def test_an_encoder_comes_back_from_its_folder_to_the_bit(path_of, tmp_path, name):
    for layer in (None, 2):
        encoder, folder = load_encoder(str(path_of(name)), layer=layer), tmp_path / str(layer)
        encoder.save_pretrained(folder)
        assert load_file(folder / "model.safetensors").keys() == encoder.model.state_dict().keys()
        clip = encoder.extract(noise(0.5))
        for layer_again in {None, layer}:  # the last layer that is left may be named again
            again = load_encoder(str(folder), layer=layer_again)
            assert again.extract(noise(0.5)).equal(clip)
            assert alone(again, clip).equal(alone(encoder, clip))


@ONE_OF_EACH_CLASS
def test_an_encoder_runs_in_bf16(path_of, encoder_of, tmp_path, name):
    encoder = load_encoder(str(path_of(name)), dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    clips = clips_for(encoder)
    with torch.no_grad():
        frames, exact = encoder(*batch_of(clips)), encoder_of(name)(*batch_of(clips))
    assert frames.dtype == torch.bfloat16
    num_frames = encoder.output_lengths(len(clips[1]))
    difference = (frames[1, :num_frames] - exact[1, :num_frames]).float().norm()
    assert difference / exact[1, :num_frames].norm() < 0.1
    encoder.save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path)).model.dtype == torch.bfloat16  # the checkpoint's own, unless told otherwise


# Training


@ONE_OF_EACH_CLASS
def test_training_mode_brings_dropout_and_no_other_chance(without_dropout, name):
    encoder = load_encoder(str(without_dropout(name))).train()
    batch = batch_of([encoder.extract(noise(seconds)) for seconds in (0.3, 0.7)])
    first = encoder(*batch)
    assert all(encoder(*batch).equal(first) for _ in range(3))


@ONE_OF_EACH_CLASS
def test_every_weight_learns_the_same_with_gradient_checkpointing_in_another_thread(without_dropout, name):
    encoder = load_encoder(str(without_dropout(name))).requires_grad_(True).train()
    features, lengths = batch_of([encoder.extract(noise(seconds)) for seconds in (0.2, 0.7)])

    def gradients() -> dict[str, Tensor]:
        encoder.zero_grad()
        num_frames = encoder.output_lengths(lengths)
        frames = encoder(features, lengths)
        loss = sum(row[:count].square().mean() for row, count in zip(frames, num_frames, strict=True))
        backward = threading.Thread(target=loss.backward)  # on a GPU, PyTorch starts a thread of its own
        backward.start()
        backward.join()
        return {name: p.grad for name, p in encoder.named_parameters()}

    plain = gradients()
    encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, gradient in gradients().items():
        if "embed_positions" not in key:  # Whisper's, which never learn
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient, plain[key], msg=lambda message, key=key: f"{key}: {message}")


@ONE_OF_EACH_CLASS
def test_lora_in_an_encoder_learns_with_and_without_gradient_checkpointing(path_of, llm, name):
    model = SpeechLLM.from_parts(str(path_of(name)), llm, encoder_lora_r=2, projector_hidden_size=8).train()
    encoder = model.encoder
    batch = batch_of([encoder.extract(noise(seconds)) for seconds in (0.2, 0.7)])
    lora = [p for p in encoder.parameters() if p.requires_grad]
    assert len(lora) == 3 * 2 * 2  # layers; queries and values, or two linear layers of WavLM's; matrices A and B
    for number, p in enumerate(lora):
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))

    def gradients() -> list[Tensor]:
        lengths = encoder.output_lengths(batch[1])
        sum(row[:length].square().mean() for row, length in zip(encoder(*batch), lengths, strict=True)).backward()
        values = [p.grad for p in lora]
        encoder.zero_grad()
        return values

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for gradient, expected in zip(gradients(), plain, strict=True):
        assert expected.abs().sum() > 0 and expected.isfinite().all()
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["wav2vec2_base", "hubert_base", "wavlm_large"])
def test_convolutions_over_samples_need_no_gradients_while_layers_learn(path_of, name):
    encoder = load_encoder(str(path_of(name))).train()
    encoder.model.encoder.layers.requires_grad_(True)
    needs_gradient = []
    encoder.model.feature_projection.register_forward_pre_hook(lambda _, x: needs_gradient.append(x[0].requires_grad))
    assert encoder(*batch_of(clips_for(encoder))).requires_grad and needs_gradient == [False]


# A family of a fork


class MelBank(nn.Module):
    """Whisper's log-mel features, each with a weight, are the frames: `melbank:80` has 80 of them."""

    def __init__(self, num_mels: int):
        super().__init__()
        self.output_size = num_mels
        self.weight = nn.Parameter(torch.ones(num_mels))
        self.extract = partial(self.log_mel, num_mels)

    @classmethod
    def load(cls, name: str, revision: str | None, layer: int | None, dtype: torch.dtype | None) -> "MelBank":
        return cls(int(name))

    @staticmethod
    def log_mel(num_mels: int, samples: np.ndarray) -> Tensor:
        return whisper.log_mel_spectrogram(samples, num_mels).T

    def output_lengths(self, lengths: Tensor | int) -> Tensor | int:
        return lengths

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        return features * self.weight


def test_a_fork_adds_a_family_with_a_class_and_a_row(monkeypatch, llm):
    monkeypatch.setitem(encoders.ENCODERS, "melbank", MelBank.load)
    model = SpeechLLM.from_parts("melbank:80", llm, projector_hidden_size=16)
    assert model.encoder.output_size == 80
    assert isinstance(model.transcribe(noise(1), max_new_tokens=3), str)


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


@pytest.mark.parametrize("name", ["whisper_hf", "canary"])
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
        (robbed, r"weights .* are missing \(\d+\): \S*layers\.1\.\S* \.\.\."),
        (partial(cropped, count=1), r"layers\.1\.\S* is \(1,.*\), wanted \(\d\d.*\) by its config.json"),
        (partial(cropped, count=0), r"layers\.1\.\S* is \(0,.*by its config\.json"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_refused_in_one_line(path_of, tmp_path, name, spoil, reason):
    folder = shutil.copytree(path_of(name), tmp_path / "folder")
    spoil(folder)
    with pytest.raises(InputError, match=f"^{folder}: .*{reason}") as error:
        load_encoder(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["wav2vec2_base", "wavlm_large", "w2v_bert"])
def test_strided_convolutions_behind_the_last_layer_are_refused(path_of, tmp_path, name):
    folder = shutil.copytree(path_of(name), tmp_path / "folder")
    edited(folder, "config.json", add_adapter=True)
    with pytest.raises(InputError, match=f"^{folder}: add_adapter is true in config.json; wanted an encoder that ends"):
        load_encoder(str(folder))


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
    ("content", "reason"),
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
def test_a_pt_file_that_is_no_whisper_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "encoder.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"^{path}: .*({reason})") as error:
        load_encoder(str(path))
    assert "\n" not in str(error.value)


def test_what_is_no_speech_encoder_is_refused_in_one_line(tmp_path, llm):
    reasons = {
        llm: "a model of type qwen2; wanted one of whisper, wav2vec2, hubert",
        str(tmp_path): "cannot load a speech encoder",
        "tiniest": "Model tiniest not found; available models = .*'tiny'",
        "nobody/nothing": "cannot load a speech encoder",
        "mysteries:80": "cannot load a speech encoder",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"^{name}: .*{reason}") as error:
            load_encoder(name)
        assert "\n" not in str(error.value)


def test_a_revision_of_an_openai_whisper_is_refused(path_of):
    with pytest.raises(InputError, match="revision v2 of an openai-whisper model"):
        load_encoder(str(path_of("whisper_openai")), revision="v2")
