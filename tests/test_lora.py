"""What lora.py promises: LoRA on the LLM and the encoder, trained, saved, loaded, merged."""

import re

import pytest
import torch
from conftest import TRAIN_FLAGS
from families import LLMS
from runs import assert_same, weights
from trials import SMALL, decode, examples_of, losses, records

import recognize
import train
from errors import InputError
from model import SpeechLLM


def build(world, llm="llm", **fields) -> SpeechLLM:
    torch.manual_seed(0)
    return SpeechLLM.from_parts(str(world / "whisper.pt"), str(world / llm), **(SMALL | fields))


def trained_names(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def randomize_lora(model) -> None:
    """LoRA starts with zeros in B and so has no effect; now it has one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.3)


# Layers


def test_lora_changes_nothing_before_it_is_trained(world):
    plain, adapted = build(world), build(world, lora_r=4)
    examples = examples_of(plain)
    assert losses(adapted, examples) == pytest.approx(losses(plain, examples), abs=1e-5)
    names = {name for name in trained_names(adapted) if name.startswith("llm")}
    assert names and all(re.search(r"(q_proj|v_proj)\.lora_[AB]", name) for name in names)


def test_loras_layers_and_rank_can_be_chosen(world):
    model = build(world, lora_r=3, lora_target_modules=["up_proj"])
    shapes = {name: p.shape for name, p in model.named_parameters() if "lora_A" in name}
    assert len(shapes) == 2 and all("up_proj" in name and shape[0] == 3 for name, shape in shapes.items())
    everywhere = build(world, lora_r=3, lora_target_modules=["all-linear"])
    assert sum("lora_A" in name for name in trained_names(everywhere)) == 2 * 7
    with pytest.raises(InputError, match=r"LoRA: .*--lora_target_modules can be \['down_proj', .*'q_proj'"):
        build(world, lora_r=3, lora_target_modules=["query"])


def test_a_layer_that_does_not_exist_or_is_tied_is_refused(world):
    with pytest.raises(InputError, match="LoRA: no layer 'nothere'"):
        build(world, lora_r=2, lora_target_modules=["q_proj", "nothere"])
    with pytest.raises(InputError, match="'lm_head' shares its weights"):
        build(world, lora_r=2, lora_target_modules=["lm_head"])
    with pytest.raises(InputError, match="give --lora_r too"):
        build(world, lora_target_modules=["q_proj"])


@pytest.mark.parametrize("family", LLMS)
def test_an_llm_of_any_family_names_its_layers_when_none_fits(family, tmp_path, world):
    with pytest.raises(InputError, match=r"--lora_target_modules can be \['\w+'"):
        build(world, LLMS[family](tmp_path), lora_r=2, lora_target_modules=["nothing"])


def test_lora_is_held_in_fp32_beside_weights_in_bf16(world):
    model = build(world, lora_r=2, dtype="bfloat16")
    assert {p.dtype for name, p in model.llm.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in model.llm.named_parameters() if "lora_" in name} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(losses(model, examples_of(model)))))


def test_loras_dropout_acts_in_training_and_no_other_does(world):
    model = build(world, lora_r=4, lora_dropout=0.5)
    randomize_lora(model)
    examples = examples_of(model)
    plain = losses(model, examples)
    assert losses(model.train(), examples) != pytest.approx(plain, abs=1e-4)
    modes = {name: module.training for name, module in model.named_modules() if name}
    on = {name for name, mode in modes.items() if mode}
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    assert all(name.startswith("projector") or ".lora_" in name or name == embeddings for name in on)
    assert any(".lora_dropout" in name for name in on)
    assert losses(model.eval(), examples) == plain


# Merged


def test_merged_lora_gives_the_same_losses_and_texts_without_its_layers(world):
    model = build(world, lora_r=4, encoder_lora_r=4)
    randomize_lora(model)
    examples, dataset = examples_of(model), model.make_dataset(records())
    before, texts = losses(model, examples), decode(model, dataset, 3)
    model.merge_lora()
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert losses(model, examples) == pytest.approx(before, rel=1e-4)
    assert decode(model, dataset, 3) == texts


def test_merged_lora_is_saved_with_the_weights_that_it_went_into_or_not_at_all(world, tmp_path):
    model = build(world, lora_r=4, encoder_lora_r=2)
    randomize_lora(model)
    model.save_pretrained(tmp_path / "run")
    before = weights(tmp_path / "run")
    model.merge_lora()
    with pytest.raises(InputError, match=r"^LoRA was merged .*include_frozen=True$"):
        model.save_pretrained(tmp_path / "run")
    assert_same(weights(tmp_path / "run"), before)
    model.save_pretrained(tmp_path / "run", include_frozen=True)
    loaded = SpeechLLM.from_pretrained(tmp_path / "run")
    assert loaded.config.lora_r == loaded.config.encoder_lora_r == 0
    assert not any("lora" in name for name in loaded.state_dict())
    assert_same(loaded.state_dict(), model.state_dict())


# Saved and loaded


def test_lora_can_be_added_to_a_projector_that_was_trained_before(world, tmp_path):
    first = build(world)
    first.save_pretrained(tmp_path)
    second, path = build(world, lora_r=2), tmp_path / "model.safetensors"
    torch.nn.init.normal_(second.projector.linear1.weight)
    with pytest.raises(InputError, match=r"lora_A.* is missing"):
        second.load_trained(path)
    with pytest.warns(UserWarning, match=r"without llm\..*lora_A.* \(8\): they start new"):
        second.load_trained(path, only="projector")
    assert second.projector.linear1.weight.equal(first.projector.linear1.weight)


@pytest.fixture(scope="module")
def adapted(world, chinese_llm, call) -> str:
    """A run with LoRA on both parts, never stopped: six steps, checkpoints at the third and the sixth. Its flags."""
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 6 --save_steps 3 --per_device_train_batch_size 2"
    flags += " --lora_r 4 --encoder_lora_r 2 --lora_dropout 0.1 --audio_boundary_tokens --learning_rate 1e-3"
    screen = call(train.main, f"{flags} --output_dir adapted")
    assert "| llm |" in screen.out and "| boundary |" in screen.out
    return flags


def test_lora_is_saved_beside_the_projector_and_loaded_with_it(world, adapted):
    saved = weights(world / "adapted")
    assert {name.split(".")[0] for name in saved} == {"llm", "encoder", "projector", "boundary"}
    assert all(".lora_" in name for name in saved if name.startswith(("llm", "encoder")))
    for part in ("llm", "encoder"):
        assert any(p.any() for name, p in saved.items() if name.startswith(part) and "lora_B" in name)
    model = SpeechLLM.from_pretrained(world / "adapted")
    assert_same(model.parameters_to_save(), saved)
    assert trained_names(model) == saved.keys()


def test_a_run_with_lora_that_was_killed_ends_with_the_weights_of_one_that_was_not(world, adapted, call, launch):
    launch("train.py", f"{adapted} --output_dir adapted_killed", die_at="adapted_killed/checkpoint-6").died()
    screen = call(train.main, f"{adapted} --output_dir adapted_killed")
    assert "going on from adapted_killed/checkpoint-3\n" in screen.out
    assert_same(weights(world / "adapted_killed"), weights(world / "adapted"))


def test_recognize_decodes_with_lora_merged_or_not(adapted, call):
    flags = "--model_path adapted --max_new_tokens 8 --num_workers 0 clip0.wav clip5.wav"
    apart, merged = (call(recognize.main, f"{flags} {more}").out for more in ("", "--merge_lora"))
    assert apart == merged != ""
