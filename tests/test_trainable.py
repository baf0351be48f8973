"""What is trained: LoRA, patterns that freeze, the calls that do; and that nothing else is touched."""

import re

import pytest
import torch
from conftest import TRAIN_FLAGS
from families import ENCODERS, LLMS
from matrix import SMALL, decode, losses, records
from safetensors.torch import load_file
from trainable import describe
from transformers import AutoModelForCausalLM

from dataset import collate
from manifest import InputError
from model import SpeechLLM


def build(world, llm="llm", **fields) -> SpeechLLM:
    torch.manual_seed(0)
    return SpeechLLM.from_parts(str(world / "whisper.pt"), str(world / llm), **(SMALL | fields))


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def examples_of(model) -> list[dict]:
    dataset = model.make_dataset(records())
    return [dataset[i] for i in range(len(dataset))]


def give_lora_something_to_say(model) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.3)


# Patterns


def test_by_default_the_projector_alone_is_trained_and_the_table_says_so(world):
    model = build(world)
    assert {name.split(".")[0] for name in trained(model)} == {"projector"}
    rows = [re.split(r" *\| *", line)[1:-1] for line in describe(model).splitlines()]
    assert rows[0] == ["module", "parameters", "trained", "share"]
    count = sum(p.numel() for p in model.projector.parameters())
    assert ["projector", f"{count:,}", f"{count:,}", "100.00%"] in rows
    assert [row[2] for row in rows if row[0] in ("llm", "encoder")] == ["0", "0"]
    assert rows[-1][:3] == ["all", f"{sum(p.numel() for p in model.parameters()):,}", f"{count:,}"]


def test_parameters_are_frozen_by_the_first_patterns_but_for_the_second(world):
    model = build(world, freeze_params=[r"^encoder\.", r"^llm\."], prevent_freeze_params=[r"layers\.1\.mlp", "norm"])
    names = {name for name in trained(model) if not name.startswith("projector")}
    assert names == {
        name
        for name, _ in model.named_parameters()
        if not name.startswith("projector") and ("layers.1.mlp" in name or "norm" in name)
    }
    assert trained(build(world, freeze_params=[])) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("field", ["freeze_params", "prevent_freeze_params"])
def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names(world, field):
    with pytest.raises(InputError, match=r"pattern '\^decoder' matches no parameter; there are llm\..*projector"):
        build(world, **{field: ["^decoder"]})
    with pytest.raises(InputError, match=r"pattern '\(' is no regular expression"):
        build(world, **{field: ["("]})


def test_training_with_nothing_to_train_is_an_error(chinese_llm, launch):
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --output_dir never --freeze_params ."
    assert "nothing to train" in launch("train.py", flags).wait().the_error()


# Calls


def test_parts_are_frozen_and_unfrozen_by_calls(world):
    model = build(world)
    model.unfreeze_encoder()
    model.freeze_projector()
    assert {name.split(".")[0] for name in trained(model)} == {"encoder"}
    model.freeze_encoder()
    model.freeze_llm_except_lm_head()
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(model.llm.lm_head.weight)]
    model.unfreeze_llm()
    model.unfreeze_projector()
    assert {name.split(".")[0] for name in trained(model)} == {"llm", "projector"}
    model.freeze_llm()
    assert {name.split(".")[0] for name in trained(model)} == {"projector"}


def test_the_vectors_around_a_clip_are_frozen_with_the_projector(world):
    model = build(world, audio_boundary_tokens=True)
    assert "boundary.weight" in trained(model)
    model.freeze_projector()
    assert not trained(model)
    model.unfreeze_projector()
    assert "boundary.weight" in trained(model)


def test_an_unfrozen_encoder_gets_gradients(world):
    model = build(world)
    model.unfreeze_encoder()
    model.train()(**collate(examples_of(model))).loss.backward()
    unreached = [n for n, p in model.encoder.named_parameters() if p.grad is None and "embed_positions" not in n]
    assert not unreached


def test_a_part_whose_own_weights_are_trained_is_held_in_fp32(world, tmp_path):
    AutoModelForCausalLM.from_pretrained(world / "llm", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bf16" / name).write_bytes((world / "llm" / name).read_bytes())
    assert build(world, tmp_path / "bf16").llm.dtype == torch.bfloat16
    model = build(world, tmp_path / "bf16", lora_r=2)
    assert {p.dtype for n, p in model.llm.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in model.llm.named_parameters() if "lora_" in n} == {torch.float32}
    examples = examples_of(model)
    assert all(torch.isfinite(torch.tensor(losses(model, examples))))
    model.unfreeze_llm()
    assert {p.dtype for p in model.llm.parameters()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(losses(model, examples))))


# LoRA


def test_lora_changes_nothing_before_it_is_trained(world):
    plain, adapted = build(world), build(world, lora_r=4)
    examples = examples_of(plain)
    assert losses(adapted, examples) == pytest.approx(losses(plain, examples), abs=1e-5)
    names = {name for name in trained(adapted) if name.startswith("llm")}
    assert names and all(re.search(r"(q_proj|v_proj)\.lora_[AB]", name) for name in names)


def test_loras_layers_and_rank_can_be_chosen(world):
    model = build(world, lora_r=3, lora_target_modules=["up_proj"])
    shapes = {name: p.shape for name, p in model.named_parameters() if "lora_A" in name}
    assert len(shapes) == 2 and all("up_proj" in name and shape[0] == 3 for name, shape in shapes.items())
    everywhere = build(world, lora_r=3, lora_target_modules=["all-linear"])
    assert sum("lora_A" in name for name in trained(everywhere)) == 2 * 7
    with pytest.raises(InputError, match=r"LoRA: .*--lora_target_modules can be \['down_proj', .*'q_proj'"):
        build(world, lora_r=3, lora_target_modules=["query"])


def test_a_layer_that_does_not_exist_or_is_tied_is_refused(world):
    with pytest.raises(InputError, match="LoRA: no layer 'nothere'"):
        build(world, lora_r=2, lora_target_modules=["q_proj", "nothere"])
    with pytest.raises(InputError, match="'lm_head' shares its weights"):
        build(world, lora_r=2, lora_target_modules=["lm_head"])
    with pytest.raises(InputError, match="give --lora_r too"):
        build(world, lora_target_modules=["q_proj"])


def test_tied_weights_answer_to_both_of_their_names(world):
    model = build(world, prevent_freeze_params=["lm_head"])
    assert model.llm.lm_head.weight.requires_grad and model.llm.get_input_embeddings().weight.requires_grad


def test_running_statistics_stay_as_they_were_loaded(world, tmp_path):
    model = SpeechLLM.from_parts(str(ENCODERS["parakeet"](tmp_path / "p")), str(world / "llm"), **SMALL)
    model.unfreeze_encoder()
    model.train()(**collate(examples_of(model))).loss.backward()
    model.save_pretrained(tmp_path / "run")
    examples = examples_of(model)
    assert losses(SpeechLLM.from_pretrained(tmp_path / "run"), examples) == pytest.approx(
        losses(model.eval(), examples)
    )


def test_loras_dropout_acts_in_training_and_no_other_does(world):
    model = build(world, lora_r=4, lora_dropout=0.5)
    give_lora_something_to_say(model)
    examples = examples_of(model)
    plain = losses(model, examples)
    assert losses(model.train(), examples) != pytest.approx(plain, abs=1e-4)
    modes = {name: module.training for name, module in model.named_modules() if name}
    on = {name for name, mode in modes.items() if mode}
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    assert all(name.startswith("projector") or ".lora_" in name or name == embeddings for name in on)
    assert any(".lora_dropout" in name for name in on)
    assert losses(model.eval(), examples) == plain


def test_merged_lora_gives_the_same_losses_and_texts_without_its_layers(world):
    model = build(world, lora_r=4, encoder_lora_r=4)
    give_lora_something_to_say(model)
    examples, dataset = examples_of(model), model.make_dataset(records())
    before, texts = losses(model, examples), decode(model, dataset, 3)
    model.merge_lora()
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert losses(model, examples) == pytest.approx(before, rel=1e-4)
    assert decode(model, dataset, 3) == texts


def test_lora_can_be_added_to_a_projector_that_was_trained_before(world, tmp_path):
    first = build(world)
    first.save_pretrained(tmp_path)
    second, path = build(world, lora_r=2), tmp_path / "model.safetensors"
    torch.nn.init.normal_(second.projector.linear1.weight)
    with pytest.raises(InputError, match=r"lora_A.* is missing"):
        second.load_trained(path)
    with pytest.warns(UserWarning, match=r"without llm\..*lora_A.* \(8\): they start new"):
        second.load_trained(path, may_lack=r"^(?!projector\.)")
    assert second.projector.linear1.weight.equal(first.projector.linear1.weight)


@pytest.fixture(scope="module")
def adapted(world, chinese_llm, launch):
    """A run with LoRA on both parts, never stopped: eight steps, checkpoints at the fourth and the eighth."""
    flags = f"{TRAIN_FLAGS} --data_path corpus.jsonl --max_steps 8 --save_steps 4 --per_device_train_batch_size 2"
    flags += " --lora_r 4 --encoder_lora_r 2 --lora_dropout 0.1 --audio_boundary_tokens --learning_rate 1e-3"
    job = launch("train.py", f"{flags} --output_dir adapted").wait()
    assert job.status == 0, job.err
    assert "| llm |" in job.out and "| boundary |" in job.out
    return flags


def test_lora_is_saved_beside_the_projector_and_loaded_with_it(world, adapted, monkeypatch):
    monkeypatch.chdir(world)
    weights = load_file("adapted/model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"llm", "encoder", "projector", "boundary"}
    assert all(".lora_" in name for name in weights if name.startswith(("llm", "encoder")))
    assert any(p.any() for name, p in weights.items() if "lora_B" in name)
    model = SpeechLLM.from_pretrained("adapted")
    assert all(p.equal(weights[name]) for name, p in model.saved().items())
    assert trained(model) == weights.keys()


def test_a_run_with_lora_that_was_killed_ends_with_the_weights_of_one_that_was_not(world, adapted, launch):
    launch("train.py", f"{adapted} --output_dir stopped", die_at="stopped/checkpoint-8").died()
    job = launch("train.py", f"{adapted} --output_dir stopped").wait()
    assert job.status == 0 and "going on from stopped/checkpoint-4" in job.out, job.err
    whole, stopped = (load_file(world / name / "model.safetensors") for name in ("adapted", "stopped"))
    assert all(tensor.equal(stopped[name]) for name, tensor in whole.items())


def test_recognize_decodes_with_lora_merged_or_not(world, adapted, launch):
    texts = []
    for flags in ("", "--merge_lora"):
        job = launch("recognize.py", f"--model_path adapted {flags} --max_new_tokens 8 clip0.wav clip5.wav").wait()
        assert job.status == 0, job.err
        texts.append(job.out)
    assert texts[0] == texts[1] != ""


# Quantised


@pytest.mark.parametrize(("kind", "told"), [("4bit", "wanted a CUDA GPU"), ("2bit", "wanted 4bit or 8bit")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_quantisation_wants_a_gpu_and_a_kind_that_exists(world, kind, told):
    with pytest.raises(InputError, match=f"--quantize {kind}: {told}"):
        build(world, quantize=kind)


def test_all_families_name_their_lora_layers_when_none_fits(tmp_path, world):
    for name, make in LLMS.items():
        with pytest.raises(InputError, match="--lora_target_modules can be"):
            build(world, make(tmp_path / name), lora_r=2, lora_target_modules=["nothing"])
