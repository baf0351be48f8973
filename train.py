"""Train what is not frozen, by default the projector: HF Trainer on one process, under DDP or DeepSpeed.

    torchrun --standalone --nproc_per_node=8 train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \
        --encoder_name_or_path tiny --data_path train.jsonl --output_dir run --bf16 True \
        --deepspeed ds_config_zero3.json
"""

import json
import sys
from pathlib import Path

from accelerate.utils import gather_object
from transformers import Trainer, set_seed

import zero3
from arguments import parse
from dataset import collate
from evaluate import evaluate
from manifest import InputError, Manifest, run
from model import SpeechLLM
from resume import KeepBest, find_checkpoint, settings_of, take_over
from sampler import LengthSampler
from trainable import describe


class SpeechTrainer(Trainer):
    """Trainer that saves the trained weights alone, evaluates loss and WER, and counts the utterances it skipped."""

    def __init__(self, *args, settings: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings, self.skipped = settings, {}
        self.model.label_smoothing, self.label_smoother = self.args.label_smoothing_factor, None

    def _get_train_sampler(self, dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        dataset, args = self.train_dataset, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        # the same order for any number of processes and accumulation steps with the same total batch
        total = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        durations, epoch = dataset.durations[dataset.indices], lambda: int(self.state.epoch or 0)
        return LengthSampler(durations, total, seed, epoch, args.dataloader_drop_last)

    def _run_epoch(self, *args, **kwargs) -> None:
        """Nothing if a run that has ended is started again: Trainer would take one step before it counts them."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.skipped.update(dict.fromkeys(filter(None, inputs["bad"])))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def all_skipped(self) -> list[str]:
        """Why utterances were skipped, on any process, since the run began."""
        return list({reason: None for part in gather_object([list(self.skipped)]) for reason in part})

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next, and says that all is there

    def _issue_warnings_after_load(self, load_result) -> None:
        """Frozen weights are missing from a checkpoint by design; nothing else may be."""
        missing = self.model.saved().keys() & set(load_result.missing_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir = output_dir or self.args.output_dir
        self.model.config.training["steps"] = self.state.global_step
        skipped = self.all_skipped()
        state = zero3.gather(self.model.saved()) if self.is_deepspeed_enabled else None
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state)
            Path(output_dir, "train_settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")
            Path(output_dir, "skipped.json").write_text(json.dumps(skipped) + "\n")
            if self.args.push_to_hub and not _internal_call:
                self.model.push_to_hub(self.hub_model_id, state_dict=state, token=self.args.hub_token)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics, skipped = evaluate(self.model, eval_dataset or self.eval_dataset, self.args)
        self.skipped.update(dict.fromkeys(skipped))
        self.model.config.training |= {f"evaluation {name}": round(value, 4) for name, value in metrics.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def main() -> None:
    config, data, args = parse(sys.argv[1:])
    set_seed(args.seed)
    manifest = Manifest(data.data_path)
    settings = settings_of(config, data, args, manifest.sha256)
    checkpoint = find_checkpoint(args.output_dir, settings, args.resume_from_checkpoint)

    if checkpoint:
        take_over(config, checkpoint)
    if args.deepspeed:
        zero3.prepare()
    model = SpeechLLM(config, device=None if args.deepspeed else args.device)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("nothing to train: every parameter matches --freeze_params")
    if any(p.requires_grad and ".lora_" not in name for name, p in model.encoder.named_parameters()):
        args.ddp_find_unused_parameters = True  # a chosen layer leaves norms unused, SpecAugment's vector is always
    if data.projector_model_path:
        model.load_trained(data.projector_model_path, may_lack=r"^(?!projector\.)")
    limits = {"max_length": min(data.model_max_length, model.max_length), "max_seconds": data.max_seconds}
    dataset = model.make_dataset(manifest, on_bad=data.on_bad_audio, **limits)
    eval_dataset = None
    if data.eval_data_path:
        eval_dataset = model.make_dataset(Manifest(data.eval_data_path), on_bad=data.on_bad_audio, **limits)
    hours = round(float(dataset.durations[dataset.indices].sum()) / 3600, 2)
    config.training = (config.training or {}) | {"data": data.data_path, "utterances": len(dataset), "hours": hours}
    callbacks = [KeepBest(data.save_best_by, args)] if data.save_best_by else []
    trainer = SpeechTrainer(model, args, collate, dataset, eval_dataset, callbacks=callbacks, settings=settings)
    if checkpoint:
        trainer.skipped = dict.fromkeys(json.loads(Path(checkpoint, "skipped.json").read_text()))
    if trainer.is_world_process_zero():
        print(describe(model), *[f"going on from {checkpoint}"] * bool(checkpoint), sep="\n")
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_dataset and args.eval_strategy == "no":
        trainer.save_model(_internal_call=True)  # first, for an evaluation can fail
        trainer.evaluate()

    for made in filter(None, (dataset, eval_dataset)):
        trainer.skipped.update(dict.fromkeys(made.bad.values()))
    skipped = trainer.all_skipped()
    if sum(reason.startswith(f"{manifest.path}:") for reason in skipped) == len(manifest):
        raise InputError(f"every utterance is bad; the first: {min(skipped)}")
    trainer.save_model()
    if skipped and trainer.is_world_process_zero():
        print(f"skipped {len(skipped)} bad utterances:", *skipped, sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    run(main)
