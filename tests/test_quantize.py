"""What quantize.py promises: a frozen LLM in 4 or 8 bits, on a GPU, or one line that says what is missing."""

import shlex
import sys

import pytest
import torch
from trials import SMALL

from errors import InputError
from model import SpeechLLM
from quantize import quantization_config
from train import parse


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_quantisation_wants_a_gpu(world, kind):
    with pytest.raises(InputError, match=f"^--quantize {kind}: wanted a CUDA GPU, found none; leave it out on a CPU$"):
        SpeechLLM.from_parts(world / "whisper.pt", world / "llm", **SMALL, quantize=kind)


def test_a_kind_that_does_not_exist_is_refused(world, capsys):
    with pytest.raises(InputError, match=r"^config: .*quantize.*2bit.*\('4bit', '8bit'\)"):
        SpeechLLM.from_parts(world / "whisper.pt", world / "llm", **SMALL, quantize="2bit")
    with pytest.raises(SystemExit):
        parse(shlex.split("--quantize 2bit --data_path a --output_dir b --use_cpu"))
    assert "--quantize: invalid choice: '2bit'" in capsys.readouterr().err


def test_bitsandbytes_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    with pytest.raises(InputError, match=r"^--quantize 4bit: wanted bitsandbytes: pip install bitsandbytes$"):
        quantization_config("4bit")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes wants a GPU")
@pytest.mark.parametrize(("kind", "bits"), [("4bit", 4), ("8bit", 8)])
def test_a_quantised_llm_has_so_many_bits_a_weight_and_its_lora_is_trained(world, kind, bits):
    model = SpeechLLM.from_parts(world / "whisper.pt", world / "llm", **SMALL, quantize=kind, lora_r=2, device="cuda")
    weight = model.llm.model.layers[0].mlp.up_proj.weight
    assert weight.nbytes * 8 == bits * 48 * 96
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"projector", "llm"}
    with pytest.raises(InputError, match="weights of a quantised LLM cannot be trained"):
        model.freeze_llm_except_lm_head()
