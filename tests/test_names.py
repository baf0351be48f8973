"""The README's table of names: what users of other systems write works here when its names are replaced."""

import re
from pathlib import Path

import pytest
import torch
from arguments import DataArguments, TrainArguments, parse
from config import SpeechLLMConfig
from conftest import ROOT
from families import ENCODERS, LLMS

from model import SpeechLLM


def names() -> dict[str, str]:
    """Theirs -> ours, of the rows with as many names on one side as on the other."""
    table = (ROOT / "README.md").read_text().partition("## If you come from another system")[2].partition("\n## ")[0]
    pairs = {}
    for row in re.findall(r"^\| (.*) \| (.*) \|$", table, re.MULTILINE):
        there, here = (re.findall(r"`([^`]+)`", cell) for cell in row)
        pairs |= dict(zip(there, here, strict=True)) if len(there) == len(here) else {}
    return pairs


def translate(code: str) -> str:
    code = re.sub(r"(\w+), (\w+), (\w+) = create_speech_lm_model\(", r"\3 = SpeechLLM.from_parts(", code)
    pairs = names()
    any_of_theirs = "|".join(map(re.escape, sorted(pairs, key=len, reverse=True)))
    return re.sub(rf"(?<!\w)({any_of_theirs})", lambda found: pairs[found[1]], code)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {"mms": str(ENCODERS["wav2vec2_large"](folder / "mms")), "qwen": str(LLMS["qwen3"](folder / "qwen"))}


def test_what_speechlms_users_write_runs_with_the_names_of_the_table(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = """
from main import create_speech_lm_model

feature_extractor, tokenizer, model = create_speech_lm_model(
    encoder_name=MMS, decoder_name=QWEN, projection_hidden_size=32, encoder_dropout=0.1
)
feature_extractor, tokenizer = model.feature_extractor, model.tokenizer
audio = feature_extractor(torch.randn(2, 16000).numpy(), sampling_rate=16000, return_tensors="pt")
text = tokenizer(["hello world", "hello world"], return_tensors="pt")
model.freeze_projection()
model.freeze_decoder_except_lm_head()
model.freeze_decoder()
model.unfreeze_projector()
model.freeze_encoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model.train()
for _ in range(3):
    optimizer.zero_grad()
    outputs = model(
        input_values=audio.input_values, input_ids=text.input_ids, attention_mask=torch.ones(2, 16000),
        decoder_attention_mask=text.attention_mask, labels=text.input_ids,
    )
    outputs.loss.backward()
    optimizer.step()
model.eval()
ids = model.generate(input_values=audio.input_values, max_length=20, num_beams=4)
sampled = {"do_sample": True, "temperature": 0.7}
model.generate(input_values=audio.input_values, input_ids=text.input_ids, max_length=20, **sampled)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
model.save_pretrained("./my-model")
feature_extractor.save_pretrained("./my-model")
tokenizer.save_pretrained("./my-model")
again = SpeechLMModel.from_pretrained("./my-model")
again = again.generate(input_values=audio.input_values, max_length=20, num_beams=4)
"""
    space = {"torch": torch, "MMS": parts["mms"], "QWEN": parts["qwen"]}
    exec(translate(code), space)
    assert space["outputs"].logits.shape[:2] == space["text"].input_ids.shape
    assert space["again"].equal(space["ids"])


def test_what_speechllms_users_write_runs_with_the_names_of_the_table(parts):
    code = """
config = SpeechLLMConfig(
    speech_encoder_name_or_path=MMS, text_decoder_name_or_path=QWEN, downsample_factor=4, projector_n_layers=2,
    projector_activation="relu", projector_hidden_size=32, projector="mlp"
)
model = SpeechLLM(config=config)
"""
    space = {"SpeechLLMConfig": SpeechLLMConfig, "SpeechLLM": SpeechLLM, "MMS": parts["mms"], "QWEN": parts["qwen"]}
    exec(translate(code), space)
    assert space["model"].config.projector_stride == 4


def test_their_yaml_is_ours_with_the_names_of_the_table(tmp_path: Path):
    (tmp_path / "train.yaml").write_text(
        translate("""
data:
  data_path: train.jsonl
  max_duration: 15.0
training:
  output_dir: ./output/
  num_train_epochs: 3
  per_device_train_batch_size: 4
  learning_rate: 1e-4
  warmup_steps: 1000
  bf16: false
  use_cpu: true
  lr_scheduler_type: cosine
  optim: adamw_torch
model:
  speech_encoder_name_or_path: microsoft/wavlm-large
  text_decoder_name_or_path: meta-llama/Llama-3.2-1B
  downsample_factor: 5
  projector_n_layers: 2
""")
    )
    model, data, training = parse([str(tmp_path / "train.yaml")])
    assert isinstance(data, DataArguments) and isinstance(training, TrainArguments)
    assert (data.max_seconds, model.projector_num_layers, training.warmup_steps) == (15.0, 2, 1000)


def test_the_table_names_what_exists():
    ours = set(" ".join(names().values()).split())
    assert {"encoder_name_or_path", "projector_stride", "SpeechLLM"} <= ours
