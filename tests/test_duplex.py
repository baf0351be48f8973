"""What duplex/ promises: text placed by time, codes, two models that never look ahead, in pieces as whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import ROOT, make_llm, make_tokenizer, make_whisper, noise, write_manifest
from runs import assert_same, history, losses, weights
from torch.nn.utils.rnn import pad_sequence

import duplex.simulate
import duplex.talk
import duplex.train
from dataset import open_records
from duplex.codecs import HubCodec, MelCodec, load_codec
from duplex.data import HOP, TextTokens, collate, frame_of, open_conversations, text_channel, windows
from duplex.evaluate import evaluate
from duplex.model import DuplexModel
from duplex.train import encode_once
from errors import InputError

TOKENS = TextTokens(pad=0, bos=1, eos=2)
KINDS = pytest.mark.parametrize("kind", ["direct", "decoder"])
PARTS = {"encoder": "whisper.pt", "llm": "llm", "codec": "codec.safetensors"}
SIZES = {"projector_stride": 4, "projector_hidden_size": 32, "text_pad": "</s>"}
SIZES |= {"speech_decoder_size": 64, "speech_decoder_layers": 2, "speech_decoder_dropout": 0.0, "lookahead": 1}


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Path:
    """A folder with whisper.pt, llm/, codec.safetensors, and three conversations of 2 to 4 s."""
    folder = tmp_path_factory.mktemp("studio")
    make_whisper(folder / "whisper.pt")
    make_llm(folder / "llm", tokenizer=make_tokenizer(eos_token="<|im_end|>", pad_token="</s>"))
    MelCodec.learn([torch.from_numpy(noise(2.0))], num_codebooks=3, codebook_size=16).save(folder / "codec.safetensors")
    rows = []
    for number in range(3):
        turns = [{"role": "user", "start": 0.2, "end": 0.8, "text": "hello"}]
        turns += [{"role": "agent", "start": 0.9, "end": 1.8, "text": "hello world"}]
        names = {role: f"{role}{number}.wav" for role in ("user", "agent")}
        for seed, name in enumerate(names.values()):
            soundfile.write(folder / name, noise(2.0 + number, 2 * number + seed), 16000)
        rows.append(names | {"turns": turns})
    write_manifest(folder / "talks.jsonl", rows)
    return folder


def flags_of(studio: Path, kind: str) -> str:
    """Flags of duplex.train for such a model and these conversations."""
    flags = f"--encoder_name_or_path {studio}/whisper.pt --llm_model_name_or_path {studio}/llm --kind {kind}"
    flags += f" --codec {studio}/codec.safetensors --projector_stride 4 --projector_hidden_size 32 --text_pad </s>"
    flags += " --speech_decoder_size 64 --speech_decoder_layers 2 --report_to none --use_cpu"
    return f"{flags} --data_path {studio}/talks.jsonl"


def build(studio: Path, kind: str, **fields) -> DuplexModel:
    torch.manual_seed(0)
    parts = {name: str(studio / path) for name, path in PARTS.items()}
    return DuplexModel.from_parts(kind=kind, **parts | SIZES | fields)


@pytest.fixture(scope="module")
def models(studio) -> dict[str, DuplexModel]:
    models = {kind: build(studio, kind) for kind in ("direct", "decoder")}
    for model in models.values():
        model.projector.linear2.weight.data *= 30  # so that what the user says matters
    return models


def users(studio: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(soundfile.read(studio / f"user{i}.wav", dtype="float32")[0]) for i in range(3)]


def replies(model: DuplexModel, samples: list[torch.Tensor]) -> dict:
    return model.offline_inference(pad_sequence(samples, batch_first=True), torch.tensor([*map(len, samples)]))


# The text channel


def test_text_stands_where_the_specification_says():
    def encode(text: str) -> list[int]:
        return {"hi": [6151], "hello": [31373], "ok": [3431], "okay": [20759]}[text]

    def turns(*texts: tuple[float, float, str]) -> list[dict]:
        return [{"start": start, "end": end, "text": text} for start, end, text in texts]

    user = text_channel(turns((0, 0.1, "hi"), (0.5, 0.6, "ok")), 13, encode, TOKENS, "a:1")
    assert user.tolist() == [1, 2, 0, 0, 0, 0, 1, 3431, 2, 0, 0, 0, 0]
    with pytest.warns(UserWarning, match="a:1: 1 tokens from 0.3 s, room for 0: cut"):  # its end stands on its text
        agent = text_channel(turns((0.3, 0.4, "hello"), (0.6, 1.0, "okay")), 13, encode, TOKENS, "a:1")
    assert agent.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 1, 20759, 0, 0, 0]
    with pytest.warns(UserWarning, match="a:1: 1 tokens from 2 s, room for 0: cut"):  # it begins behind the audio
        assert not text_channel(turns((2.0, 2.5, "ok")), 13, encode, TOKENS, "a:1").any()


def test_a_time_is_the_frame_that_begins_nearest_to_it():
    assert [frame_of(seconds) for seconds in (0, 0.039, 0.04, 0.1, 0.12, 1.0)] == [0, 0, 1, 1, 2, 13]


def test_windows_are_chunks_behind_their_context_with_silence_before_the_start():
    samples = np.arange(1, 2.5 * HOP + 1, dtype=np.float32)
    parts = windows(samples, chunk=2, context=1, lookahead=1)
    assert parts.shape == (2, 4 * HOP)
    assert not parts[0, :HOP].any() and (parts[0, HOP : round(3.5 * HOP)] == samples).all()
    assert (parts[1, : round(1.5 * HOP)] == samples[HOP:]).all() and not parts[1, round(1.5 * HOP) :].any()


# Codecs


def small_codecs() -> dict[str, transformers.PreTrainedModel]:
    torch.manual_seed(0)
    mimi = {"hidden_size": 32, "num_filters": 4, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 16}
    mimi |= {"num_attention_heads": 2, "num_key_value_heads": 2, "codebook_size": 16, "codebook_dim": 8}
    mimi |= {"num_quantizers": 4, "vector_quantization_hidden_dimension": 8, "upsample_groups": 32}
    encodec = {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16, "target_bandwidths": [1.5]}
    dac = {
        "encoder_hidden_size": 8,
        "decoder_hidden_size": 32,
        "codebook_size": 16,
        "codebook_dim": 4,
        "n_codebooks": 4,
    }
    dac |= {"downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [8, 5, 4, 2], "hop_length": 320}
    return {
        "mimi": transformers.MimiModel(transformers.MimiConfig(**mimi)),
        "encodec": transformers.EncodecModel(transformers.EncodecConfig(**encodec)),
        "dac": transformers.DacModel(transformers.DacConfig(**dac)),
    }


@pytest.mark.parametrize(("name", "num_codebooks"), [("mimi", 4), ("encodec", 5 * 6), ("dac", 4 * 4)])
def test_a_codec_of_transformers_gives_codes_for_each_frame_of_80_ms(name, num_codebooks, tmp_path, studio):
    small_codecs()[name].save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path))
    samples = torch.randn(2, 13 * codec.hop - 100)
    codes = codec.encode(samples)
    assert codes.shape == (2, 13, num_codebooks) == (2, 13, codec.num_codebooks)
    assert codes.min() >= 0 and codes.max() < codec.codebook_size
    assert codec.decode(codes).shape[1] == pytest.approx(13 * codec.hop, abs=codec.hop)
    model = build(studio, "direct", codec=str(tmp_path))
    dataset = model.make_conversations(open_conversations(studio / "talks.jsonl"))
    loss = model(**collate([dataset[0], dataset[1]], model.tokens.pad)).loss
    loss.backward()
    assert torch.isfinite(loss) and model.audio_head.weight.grad.abs().sum() > 0


def test_a_codec_whose_frames_do_not_fit_is_told():
    codec = small_codecs()["dac"]
    codec.config.sampling_rate = 44_100
    with pytest.raises(InputError, match=r"odd: 11\.04 frames of codes in 0\.08 s; wanted a whole number"):
        HubCodec(codec, "odd")


def test_the_demos_codec_copies_what_it_has_learnt(tmp_path):
    clip = torch.from_numpy(noise(1.0))
    MelCodec.learn([clip], num_codebooks=4, codebook_size=12).save(tmp_path / "codec.safetensors")
    codec = load_codec(str(tmp_path / "codec.safetensors"))
    codes = codec.encode(clip[None])
    assert codes.shape == (1, 13, 4) and codec.decode(codes).shape == (1, 13 * HOP)
    assert torch.equal(codec.decode(codes), codec.decode(codes))
    copy, frames = codec.frames(codec.decode(codes)), codec.frames(clip[None])
    assert (copy - frames).norm() < 0.6 * (frames - frames.mean(1)).norm()


# Models


@KINDS
def test_a_conversation_has_the_same_loss_alone_and_in_a_batch(models, studio, kind):
    model = models[kind]
    dataset = model.make_conversations(open_conversations(studio / "talks.jsonl"))
    examples = [dataset[number] for number in range(3)]
    frames = torch.tensor([len(example["text_ids"]) - 1.0 for example in examples])
    alone = torch.stack([model(**collate([example], model.tokens.pad)).loss for example in examples])
    together = model(**collate(examples, model.tokens.pad)).loss
    torch.testing.assert_close(together, (alone * frames).sum() / frames.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_detached", [True, False])
def test_detach_input_keeps_the_loss_of_the_voice_from_the_llm(studio, is_detached):
    model = build(studio, "decoder", text_loss_weight=0.0, detach_input=is_detached)
    dataset = model.make_conversations(open_conversations(studio / "talks.jsonl"))
    model(**collate([dataset[0], dataset[1]], model.tokens.pad)).loss.backward()
    assert bool(model.projector.conv.weight.grad.any()) != is_detached


@KINDS
def test_frame_by_frame_it_gives_what_it_gives_all_at_once(models, studio, kind):
    """Teacher-forced on its own answer, the model predicts this very answer."""
    model, (user, *_) = models[kind], users(studio)
    result = replies(model, [user])
    text, codes = result["tokens_text"], result["tokens_audio"]  # (1, T), (1, T, K)
    stream, dataset = model.stream(), model.make_conversations(open_conversations(studio / "talks.jsonl"))
    before_text = torch.cat([stream.text, text[:, :-1]], 1)
    before_codes = torch.cat([stream.codes, codes[:, :-1]], 1)
    with torch.no_grad():
        embeds = model.embed_chunks(model.encode_windows(dataset[0]["features"])).flatten(0, 1)  # (frames, H)
        embeds = torch.nn.functional.pad(embeds, (0, 0, model.delay, 0))[None, : text.shape[1]]
        text_logits, code_logits = model.predict(embeds, before_text, before_codes, stream.caches)
    assert text_logits.argmax(2).equal(text) and code_logits.argmax(3).equal(codes)


@KINDS
def test_no_frame_changes_when_later_audio_does(models, studio, kind):
    model, (user, *_) = models[kind], users(studio)
    other = user.clone()
    other[12 * HOP :] = torch.from_numpy(noise(1.0, 9))[0]
    one, two = replies(model, [user]), replies(model, [other])
    assert one["tokens_text"][:, :12].equal(two["tokens_text"][:, :12])
    assert one["tokens_audio"][:, :12].equal(two["tokens_audio"][:, :12])
    assert not one["tokens_text"].equal(two["tokens_text"])


@KINDS
def test_offline_inference_has_six_results_the_same_alone_and_in_a_batch(models, studio, kind):
    model, samples = models[kind], users(studio)
    together = replies(model, samples)
    assert set(together) == {"text", "tokens_text", "tokens_audio", "tokens_len", "audio", "audio_len"}
    assert together["tokens_len"].tolist() == [25, 38, 50] and together["audio_len"].tolist() == [
        25 * HOP,
        38 * HOP,
        50 * HOP,
    ]
    assert together["tokens_audio"].min() >= 0 and together["tokens_audio"].max() < model.size + 3
    for number, user in enumerate(samples):
        alone, length = replies(model, [user]), together["tokens_len"][number]
        assert alone["text"][0] == together["text"][number]
        assert alone["tokens_audio"][0].equal(together["tokens_audio"][number, :length])


@KINDS
@pytest.mark.parametrize("size", [HOP, 777, 10_000])
def test_a_stream_in_pieces_of_any_size_gives_what_the_whole_gives(models, studio, kind, size):
    model, (user, *_) = models[kind], users(studio)
    whole, stream = replies(model, [user]), model.stream()
    padded = np.pad(user.numpy(), (0, -len(user) % (model.config.chunk * HOP) + model.config.lookahead * HOP))
    frames = [frame for piece in np.split(padded, range(size, len(padded), size)) for frame in stream.push(piece[None])]
    assert len(frames) >= 25
    assert torch.stack([text for text, _ in frames[:25]], 1).equal(whole["tokens_text"])
    assert torch.stack([codes for _, codes in frames[:25]], 1).equal(whole["tokens_audio"])


def test_frames_and_codes_that_are_computed_once_give_the_same_loss(studio, tmp_path):
    model, records = build(studio, "direct"), open_conversations(studio / "talks.jsonl")
    dataset = model.make_conversations(records)
    loss = model(**collate([dataset[0], dataset[1]], model.tokens.pad)).loss
    for rank in range(2):
        encode_once(model, model.make_conversations(records), tmp_path, rank, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 3
    encode_once(model, dataset, tmp_path, 0, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before  # all were there
    example = dataset[0]
    assert example["codes"].dtype == torch.int16 and example["frames"].shape == (7, 4 * 4, model.config.encoder_size)
    again = model(**collate([example, dataset[1]], model.tokens.pad)).loss
    torch.testing.assert_close(again, loss, rtol=1e-3, atol=0)
    for path in before:
        path.unlink()
    with pytest.raises(InputError, match="cannot read the frames of a conversation"):
        dataset[0]
    with pytest.raises(InputError, match="the encoder is trained; wanted a frozen one"):
        encode_once(build(studio, "direct", freeze_params=["^llm"]), dataset, tmp_path, 0, 1)


@KINDS
def test_the_losses_of_an_evaluation_do_not_depend_on_its_batches(studio, call, tmp_path, kind):
    flags = f"{flags_of(studio, kind)} --eval_data_path {studio}/talks.jsonl --eval_strategy steps --eval_steps 1"
    flags, found = f"{flags} --max_steps 1 --save_steps 1", []
    for size in (1, 3):  # conversations of different lengths
        call(duplex.train.main, f"{flags} --per_device_eval_batch_size {size} --output_dir {tmp_path}/{size}")
        logs = history(tmp_path / str(size))
        found.append({name: value for row in logs for name, value in row.items() if name.endswith("_loss")})
    assert {"eval_loss", "eval_text_loss", "eval_audio_loss"} <= found[0].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_cannot_go_together_is_told(studio, tmp_path):
    with pytest.raises(InputError, match="--projector_stride 5: 16 embeddings in 21 frames of 80 ms; wanted one each"):
        build(studio, "direct", projector_stride=5)
    with pytest.raises(InputError, match="three tokens of the LLM, all different"):
        build(studio, "direct", text_pad="<|im_end|>")
    build(studio, "direct").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not fit"):
        DuplexModel.from_pretrained(tmp_path, kind="decoder")


# Conversations


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"agent": None}, r"missing \['agent'\]"),
        ({"turns": [{"role": "user", "start": 0, "end": 1}]}, "found the turn .*; wanted a 'text', a 'role'"),
        ({"turns": [{"role": "boss", "start": 0, "end": 1, "text": "a"}]}, "found the turn .*; wanted a 'text'"),
        ({"turns": [{"role": "user", "start": 1, "end": 1, "text": "a"}]}, "found the turn .*'start' < 'end' in"),
    ],
)
def test_a_bad_conversation_is_told_with_its_line(tmp_path, change, wanted):
    good = {"user": "u.wav", "agent": "a.wav", "turns": []}
    row = {key: value for key, value in (good | change).items() if value is not None}
    path = write_manifest(tmp_path / "talks.jsonl", [good, row])
    with pytest.raises(InputError, match=f"talks.jsonl:2: {wanted}"):
        open_conversations(path)


def test_channels_of_different_length_are_filled_with_silence_and_that_is_told(models, studio, tmp_path):
    for name, seconds in (("u", 1.0), ("a", 2.0)):
        soundfile.write(tmp_path / f"{name}.wav", noise(seconds), 16000)
    path = write_manifest(tmp_path / "talks.jsonl", [{"user": "u.wav", "agent": "a.wav", "turns": []}])
    dataset = models["direct"].make_conversations(open_conversations(path))
    with pytest.warns(UserWarning, match="talks.jsonl:1: channels of 1.00 and 2.00 s: silence fills the shorter one"):
        assert len(dataset[0]["text_ids"]) == 25


def test_conversations_of_lhotse_are_those_of_the_lines(studio, tmp_path):
    from lhotse import CutSet, Recording, SupervisionSegment

    cut = Recording.from_file(studio / "user0.wav").to_cut()
    cut.target_audio = Recording.from_file(studio / "agent0.wav")
    for role, start, text in (("user", 0.2, "hello"), ("assistant", 0.9, "hello world")):
        cut.supervisions.append(SupervisionSegment(role, cut.recording_id, start, 0.6, text=text, speaker=role))
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    (record,) = open_conversations(f"lhotse:{tmp_path}/cuts.jsonl")
    assert [turn["role"] for turn in record["turns"]] == ["user", "agent"]
    assert (record["user"], record["agent"]) == (str(studio / "user0.wav"), str(studio / "agent0.wav"))


def test_simulated_conversations_have_the_words_where_their_turns_say(tmp_path):
    for kind, level in (("q", 0.5), ("a", 0.25)):
        for number in range(2):
            soundfile.write(tmp_path / f"{kind}{number}.wav", np.full(16000, level, np.float32), 16000)
        rows = [{"wav": f"{kind}{number}.wav", "txt": f"{kind} {number}"} for number in range(2)]
        write_manifest(tmp_path / f"{kind}.jsonl", rows)
    manifests = [open_records(tmp_path / f"{kind}.jsonl") for kind in "qa"]
    duplex.simulate.write_conversations(*manifests, tmp_path / "talks", count=20, interruption=1.0)
    records = open_conversations(tmp_path / "talks/conversations.jsonl")
    interrupted = 0
    for record in records:
        for turn in record["turns"]:
            samples, _ = soundfile.read(tmp_path / "talks" / record[turn["role"]])
            part = samples[round(turn["start"] * 16000) : round(turn["end"] * 16000)]
            if turn["role"] == "agent":  # where the code that begins its turn stands, it is silent
                assert part[:HOP].max() < 0.01
                part = part[HOP:]
            part = part[10:-10]
            assert part.min() == pytest.approx(0.5 if turn["role"] == "user" else 0.25, abs=0.01)
            assert turn["text"].startswith("q" if turn["role"] == "user" else "a")
        agents = [turn for turn in record["turns"] if turn["role"] == "agent"]
        interrupted += len(agents) == 2 and agents[0]["end"] - agents[0]["start"] < 1.05
    assert len(records) == 20 and interrupted > 3


# The commands


@KINDS
def test_zero3_on_two_processes_trains_what_one_process_does(studio, launch, tmp_path, kind):
    flags = f"{flags_of(studio, kind)} --speech_decoder_dropout 0 --cfg_unconditional_prob 0 --max_steps 3"
    flags += f" --learning_rate 1e-2 --logging_steps 1 --save_steps 3 --output_dir {tmp_path}"
    runs = {"one": (1, 2, ""), "zero3": (2, 1, f"--deepspeed {ROOT}/ds_config_zero3.json")}
    for name, (processes, size, more) in runs.items():  # conversations of different lengths: a frame counts the same
        command = f"{flags}/{name} --per_device_train_batch_size {size} {more}"
        job = launch("duplex/train.py", command, processes=processes).wait()
        assert job.status == 0, job.err
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert weights(tmp_path / "zero3").keys() == weights(tmp_path / "one").keys()
    assert_same(weights(tmp_path / "zero3"), weights(tmp_path / "one"), within=5e-4)  # of steps of 1e-2


@KINDS
def test_training_talking_and_evaluation_run_and_a_run_goes_on(studio, call, tmp_path, kind, monkeypatch):
    flags = f"{flags_of(studio, kind)} --lora_r 2 --save_steps 2 --per_device_train_batch_size 2"
    flags += f" --eval_data_path {studio}/talks.jsonl --eval_strategy steps --eval_steps 2"
    call(duplex.train.main, f"{flags} --max_steps 2 --output_dir {tmp_path}")
    call(duplex.train.main, f"{flags} --max_steps 4 --output_dir {tmp_path}")  # goes on
    history = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert {"eval_loss", "eval_text_loss", "eval_audio_loss"} <= history[-1].keys()
    model = DuplexModel.from_pretrained(tmp_path)
    trained = {name for name in model.parameters_to_save() if not name.startswith("projector.")}
    assert trained and not any(name.startswith("encoder.") for name in trained)
    screen = call(duplex.talk.main, f"--model_path {tmp_path} {studio}/user0.wav --result_path {tmp_path}/reply.wav")
    samples, rate = soundfile.read(tmp_path / "reply.wav")
    assert rate == 16000 and samples.shape[1] == 2 and "real-time factor" in screen.err
    # With the silence in which it may answer
    assert len(samples) >= soundfile.info(studio / "user0.wav").frames + 3 * 16000 - HOP
    figures = evaluate(model, open_conversations(studio / "talks.jsonl"), None, tmp_path)
    assert 0 <= figures["exact"] <= 1 and figures["real_time_factor"] > 0 and (tmp_path / "reply002.wav").is_file()
