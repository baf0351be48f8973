"""What prompt_once.py promises: loss, gradients and texts of the plain way, which it takes where they would differ."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from conftest import make_whisper, noise
from families import LLMS
from transformers.integrations.neftune import activate_neftune
from transformers.modeling_layers import GradientCheckpointingLayer

import model as model_file
import prompt_once
from dataset import IGNORE, collate
from manifest import DecodingOptions
from model import SpeechLLM

LENGTHS = (0.5, 2.0, 1.1)  # seconds: rows with much, no and some padding
SEARCHES = {}, {"num_beams": 3, "num_return_sequences": 2}
EXACT = {"atol": 1e-5, "rtol": 1e-5}
SYSTEM = "You are a careful listener"


@pytest.fixture(autouse=True)
def short_prompts_count_too(monkeypatch):
    monkeypatch.setattr(model_file, "SHORT_PROMPT", 1)  # those of some templates here are


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build("qwen2", **fields): a new model; its weights are always the same."""
    folder = tmp_path_factory.mktemp("parts")
    whisper = make_whisper(folder / "whisper.pt")

    def build_model(llm: str = "qwen2", **fields) -> SpeechLLM:
        path = folder / llm
        path = path if path.exists() else LLMS[llm](path)
        torch.manual_seed(0)
        return SpeechLLM.from_parts(str(whisper), str(path), projector_hidden_size=32, **fields)

    return build_model


def records(*others: dict) -> list[dict]:
    rows = [{"wav": noise(seconds, n), "txt": "hello world " * (n + 1)} for n, seconds in enumerate(LENGTHS)]
    return [{"where": f"clip {n}"} | row for n, row in enumerate([*rows, *others])]


def batch_of(model: SpeechLLM, rows: list[dict] | None = None, with_targets: bool = True) -> dict:
    return collate(list(model.make_dataset(rows or records())), with_targets)


def columns_read(model: SpeechLLM, call) -> tuple:
    """What a call returns, and the columns (of embeddings) of the LLM's forward passes over batches in it."""
    columns = []

    def note(_, args, inputs: dict) -> None:
        embeds = inputs.get("inputs_embeds")
        columns.extend([] if embeds is None or len(embeds) == 1 else [embeds.shape[1]])

    handle = model.llm.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return call(), columns
    finally:
        handle.remove()


def training_step(model: SpeechLLM, batch: dict) -> tuple[float, torch.Tensor, list[int]]:
    """Loss, gradient of the projector, and the columns that the LLM reads."""
    model.zero_grad()
    loss, columns = columns_read(model, lambda: model(**batch).loss)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.projector.parameters()]), columns


def both_ways(monkeypatch, function) -> tuple:
    """function() the plain way, and with the prompt once."""
    monkeypatch.setattr(prompt_once, "IS_ON", False)
    plain = function()
    monkeypatch.setattr(prompt_once, "IS_ON", True)
    return plain, function()


def columns_saved(monkeypatch, model: SpeechLLM, batch: dict) -> int:
    """Columns that the LLM need not read in a training step, whose loss and gradient are those of the plain way."""
    plain, once = both_ways(monkeypatch, lambda: training_step(model, batch))
    assert once[0] == pytest.approx(plain[0], abs=1e-5)
    torch.testing.assert_close(once[1], plain[1], atol=1e-5 * plain[1].abs().max().item(), rtol=1e-4)
    return plain[2][0] - once[2][0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("llm", LLMS)
def test_every_llm_has_the_same_loss_and_gradient_and_reads_the_prompt_no_more(build, monkeypatch, llm, checkpointing):
    model = build(llm)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert columns_saved(monkeypatch, model.train(), batch_of(model)) == len(model.prompt_ids) >= 2


@pytest.mark.parametrize("llm", LLMS)
def test_every_llm_writes_the_same_texts(build, monkeypatch, llm):
    model = build(llm)
    tensors = model.tensors_of(batch_of(model, with_targets=False))
    for search in SEARCHES:
        plain, once = both_ways(
            monkeypatch, lambda s=search: columns_read(model, lambda: model.generate(**tensors, max_new_tokens=6, **s))
        )
        assert once[0].equal(plain[0])
        assert once[1][0] == plain[1][0] - len(model.prompt_ids)


def test_samples_nbest_and_confidence_are_the_same(build, monkeypatch):
    model = build()
    dataset = model.decoding_dataset(records(), options := DecodingOptions(max_new_tokens=6))

    def decode(**more) -> list:
        options_ = {"max_new_tokens": options.max_new_tokens, **more}
        return [(h.text, h.log_probability) for batch in model.decode(dataset, **options_) for h in batch]

    for more in ({"do_sample": True, "nbest": 2}, {"nbest": 3, "num_beams": 3}, {"confidence": True, "num_beams": 1}):
        plain, once = both_ways(monkeypatch, lambda more=more: decode(**more))
        assert [text for text, _ in once] == [text for text, _ in plain]
        assert [p for _, p in once] == pytest.approx([p for _, p in plain], abs=1e-4)


# Which tokens


def test_rows_with_other_prompts_share_the_tokens_with_which_all_begin(build, monkeypatch):
    model = build(system_prompt=SYSTEM).train()
    own_prompt = {"wav": noise(0.9, 7), "txt": "hello", "prompt": "<audio>\nwrite"}
    turns = [{"role": "system", "content": SYSTEM + " of noise"}, {"role": "user", "content": "<audio>", "audio": []}]
    turns[1]["audio"], answer = [noise(0.7, 8)], {"role": "assistant", "content": "world"}
    conversation = {"messages": [*turns, answer]}
    whole = len(model.prompt_ids)
    assert columns_saved(monkeypatch, model, batch_of(model, records(own_prompt))) == whole
    part = columns_saved(monkeypatch, model, batch_of(model, records(conversation)))
    assert len(SYSTEM) / 4 < part < whole  # up to the system turn's fifth word
    foreign = conversation | {"messages": [turns[1], answer]}  # the template puts another system turn first
    assert columns_saved(monkeypatch, model, batch_of(model, records(foreign))) < part


def test_a_changed_prompt_is_another_prompt(build, monkeypatch):
    model = build().train()
    before = columns_saved(monkeypatch, model, batch_of(model))
    model.config.system_prompt = SYSTEM
    assert columns_saved(monkeypatch, model, batch_of(model)) != before


def test_a_prompt_without_text_before_the_speech_saves_nothing(build, monkeypatch):
    model = build(chat_template="{{ messages[-1].content }}", prompt="<audio> write").train()
    assert model.prompt_ids == []
    assert columns_saved(monkeypatch, model, batch_of(model)) == 0


def test_boundary_vectors_are_no_part_of_the_prompt(build, monkeypatch):
    model = build(audio_boundary_tokens=True).train()
    assert columns_saved(monkeypatch, model, batch_of(model)) == len(model.prompt_ids)
    assert model.boundary.weight.grad.abs().min() > 0


def test_labels_on_the_prompt_are_trained_on(build, monkeypatch):
    """The shortest row's prompt stands further to the right, among the columns with labels."""
    model = build("qwen3").train()
    batch = batch_of(model)
    length, padding = batch["input_ids"].shape[1], int((batch["attention_mask"][0] == 0).sum())
    labels = torch.full((3, length - padding), IGNORE)
    labels[:, -batch["labels"].shape[1] :] = batch["labels"]
    assert columns_saved(monkeypatch, model, batch | {"labels": labels}) == 3
    labels[0, 2] = 7
    assert columns_saved(monkeypatch, model, batch | {"labels": labels}) == 0
    assert columns_saved(monkeypatch, model, batch | {"labels": batch["input_ids"].clamp(min=0)}) == 0


def test_raw_tensors_with_padding_on_the_right_have_the_same_loss(build, monkeypatch):
    model = build().train()
    batch = batch_of(model)
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    ids, mask = (
        torch.stack([row.roll(-n) for row, n in zip(batch[name], shifts, strict=True)])
        for name in ("input_ids", "attention_mask")
    )
    labels = torch.where(mask.bool() & (torch.arange(ids.shape[1]) > 40), ids, IGNORE)[:, -20:]
    assert columns_saved(monkeypatch, model, batch | {"input_ids": ids, "attention_mask": mask, "labels": labels}) > 20


# When the plain way is taken


@pytest.mark.parametrize("window", [32, 50, 100])  # of 46 columns in training, 36 in decoding
def test_nothing_longer_than_a_sliding_window_is_read_so(build, monkeypatch, window):
    model = build("gemma").train()
    model.llm.config.sliding_window = window
    batch = batch_of(model)
    assert columns_saved(monkeypatch, model, batch) == (4 if window >= batch["input_ids"].shape[1] == 46 else 0)
    tensors = model.tensors_of(batch_of(model, with_targets=False))
    for new in (6, 30):
        plain, once = both_ways(
            monkeypatch, lambda new=new: columns_read(model, lambda: model.generate(**tensors, max_new_tokens=new))
        )
        assert once[0].equal(plain[0])
        assert plain[1][0] - once[1][0] == (4 if tensors["input_ids"].shape[1] + new <= window else 0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("Bloom", {"n_head": 2}), ("Mamba", {}), ("Mpt", {"n_heads": 2}), ("Qwen3Next", {"num_hidden_layers": 4})],
)
def test_llms_without_positions_or_with_states_of_other_kinds_go_the_plain_way(name, sizes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50} | sizes
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        assert prompt_once.longest(transformers.AutoModelForCausalLM.from_config(config)) == 0


def test_a_long_rope_ends_where_its_frequencies_change():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 50}
    sizes |= {"max_position_embeddings": 4096, "original_max_position_embeddings": 512, "pad_token_id": 0}
    for parameters, wanted in ((rope, 512), (None, 4096)):
        config = transformers.Phi3Config(**sizes, rope_parameters=parameters, eos_token_id=1)
        with torch.device("meta"):
            assert prompt_once.longest(transformers.AutoModelForCausalLM.from_config(config)) == wanted


def test_gradients_of_lora_and_of_a_trained_llm_go_through_the_prompt(build, monkeypatch):
    model = build(lora_r=2).train()
    assert columns_saved(monkeypatch, model, batch_of(model)) == 0
    model = build().train()
    model.unfreeze_llm()
    assert columns_saved(monkeypatch, model, batch_of(model)) == 0
    model.freeze_llm()
    assert columns_saved(monkeypatch, model, batch_of(model)) == len(model.prompt_ids)


def test_dropout_and_neftune_make_another_prompt_each_time(build):
    model = build(lora_r=2, lora_dropout=0.5).train()
    model.freeze_llm()  # LoRA's dropout stays on
    assert prompt_once.is_random(model.llm) and not prompt_once.is_random(model.eval().llm)
    model = build().train()
    hook = activate_neftune(model, 5.0)
    assert prompt_once.is_random(model.llm) and not prompt_once.is_random(model.eval().llm)
    hook.remove()


def test_layers_with_a_dropout_of_their_own_are_not_read_so_while_they_compute_activations_again():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "num_attention_heads": 2, "vocab_size": 50}
    for dropout in (0.0, 0.1):
        llm = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, dropout=dropout, word_embed_proj_dim=16))
        llm.eval().model.decoder.layers[0].training = True  # as SpeechLLM.train does it
        assert prompt_once.is_random(llm) == (dropout > 0)


# When it is computed again


def test_lora_is_heard_in_decoding_also_after_a_step_and_a_merge(build, monkeypatch):
    model = build(lora_r=2)
    tensors = model.tensors_of(batch_of(model, with_targets=False))

    def generate() -> torch.Tensor:
        ids, columns = columns_read(model, lambda: model.generate(**tensors, max_new_tokens=6))
        assert columns[0] == tensors["input_ids"].shape[1] - prompt_once.IS_ON * len(model.prompt_ids)
        return ids

    texts = []
    for step in range(3):
        plain, once = both_ways(monkeypatch, generate)
        assert once.equal(plain)
        texts.append(once.tolist())
        if step == 0:
            optimizer = torch.optim.AdamW([p for n, p in model.llm.named_parameters() if ".lora_" in n], lr=0.3)
            for _ in range(2):  # LoRA's second factor is zero at first
                model.train()(**batch_of(model)).loss.backward()
                optimizer.step()
            model.eval()
        elif step == 1:
            model.merge_lora()
    assert texts[0] != texts[1] == texts[2]


@pytest.mark.parametrize("way", ["load_trained", "load_state_dict", "in place", "to bfloat16"])
def test_changed_weights_are_noticed(build, monkeypatch, tmp_path, way):
    model, other = build().train(), build()
    batch = batch_of(model)
    assert columns_saved(monkeypatch, model, batch) > 0
    before = prompt_once.PROMPTS[model.llm].layers[-1][0]
    with torch.no_grad():
        for p in other.llm.parameters():
            p.mul_(1.3)
    if way == "load_trained":
        other.unfreeze_llm()
        other.save_pretrained(tmp_path)
        model.load_trained(tmp_path / "model.safetensors")
    elif way == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif way == "in place":
        with torch.no_grad():
            model.llm.get_output_embeddings().weight.mul_(1.3)  # tied to the embedding
    else:
        model.llm.to(torch.bfloat16).float()
        assert model(**batch).loss.isfinite()
        return
    assert columns_saved(monkeypatch, model, batch) > 0
    assert not torch.allclose(prompt_once.PROMPTS[model.llm].layers[-1][0], before)


def test_training_under_autocast_and_evaluation_without_have_a_prompt_each(build, monkeypatch):
    model = build().train()
    batch = batch_of(model)
    for dtype in (torch.bfloat16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            plain, once = both_ways(monkeypatch, lambda: model(**batch).loss.item())
        assert once == pytest.approx(plain, abs=0.05 if dtype else 1e-5)
        assert prompt_once.PROMPTS[model.llm].state[1] == dtype


def test_training_goes_on_after_decoding_in_inference_mode(build, monkeypatch):
    model = build()
    with torch.inference_mode():
        model.generate(**model.tensors_of(batch_of(model, with_targets=False)), max_new_tokens=2)
    assert columns_saved(monkeypatch, model.train(), batch_of(model)) > 0


# Where it is


def test_no_copy_and_no_file_holds_it(build, tmp_path):
    model, fresh = build(), build()
    model(**batch_of(model))
    assert model.llm in prompt_once.PROMPTS
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert copy.deepcopy(model).llm not in prompt_once.PROMPTS
    assert abs(len(pickle.dumps(model.llm.model)) - len(pickle.dumps(fresh.llm.model))) < 1000
    for each in (model, fresh):
        each.save_pretrained(tmp_path / str(id(each)))
    assert len({(path / "model.safetensors").read_bytes() for path in tmp_path.iterdir()}) == 1
    count = len(prompt_once.PROMPTS)
    del model, each
    gc.collect()
    assert len(prompt_once.PROMPTS) == count - 1


def test_threads_that_decode_and_compute_losses_at_once_do_not_disturb_each_other(build):
    model = build()
    clips = [batch_of(model, records()[n : n + 1], with_targets=False) for n in range(3)]
    batch = batch_of(model)

    def work(number: int) -> list:
        if number % 2:
            with torch.no_grad():
                return [model(**batch).loss.item()]
        return model.generate(**model.tensors_of(clips[number % 3]), max_new_tokens=8, num_beams=2).tolist()

    alone = [work(number) for number in range(6)]
    model.config.system_prompt = SYSTEM  # so that the threads meet a prompt that is not there yet
    model.config.system_prompt = None
    prompt_once.PROMPTS.pop(model.llm)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, [*range(6), *range(6)])) == alone * 2


def test_layers_that_compute_activations_again_can_still_be_told_to_keep_a_cache():
    told = f"transformers {transformers.__version__}: _can_checkpoint_with_cache is gone: the prompt would be ignored"
    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False, told
