"""Every encoder with every LLM and every projector, tiny and random: trained for a step, decoded, alone = in a batch.

python -m tools.matrix  # the table of README.md
python -m tools.matrix whisper_openai canary  # two rows of it
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import torch
from families import ENCODERS, LLMS
from transformers.utils import logging
from trials import SMALL, try_out

from model import SpeechLLM
from projectors import PROJECTORS

ALL_PROJECTORS = ["conv1d", *PROJECTORS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", metavar="ENCODER", help=f"default: {', '.join(ENCODERS)}")
    encoders = parser.parse_args().encoders or list(ENCODERS)
    if unknown := set(encoders) - set(ENCODERS):
        parser.error(f"no encoder {', '.join(unknown)}; wanted some of {', '.join(ENCODERS)}")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print("| encoder |", *(f"{llm} |" for llm in LLMS))
    print("|---|" + "---|" * len(LLMS))
    with tempfile.TemporaryDirectory() as folder:
        llms = {name: str(build(Path(folder, name))) for name, build in LLMS.items()}
        for encoder in encoders:
            path, cells = str(ENCODERS[encoder](Path(folder, encoder))), []
            for llm in LLMS:
                for projector in ALL_PROJECTORS:
                    torch.manual_seed(0)
                    try_out(SpeechLLM.from_parts(path, llms[llm], projector=projector, **SMALL))
                cells.append(f"{len(ALL_PROJECTORS)} of {len(ALL_PROJECTORS)}")
            print(f"| {encoder} |", *(f"{cell} |" for cell in cells), flush=True)
    print(f"\nprojectors: {', '.join(ALL_PROJECTORS)}")


if __name__ == "__main__":
    main()
