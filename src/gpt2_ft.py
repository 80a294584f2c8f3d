"""Stage 3: fine-tunes GPT-2 on encoded samples, with LoRA or as a whole.

Reads ``--train_data`` and ``--valid_data`` (src/gpt2_encode.py makes them) and a base model;
leaves checkpoints, log lines and a loss curve in ``--work_dir``. See work.sh for the flags of the
experiment.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import backend
import cli
import processes
from cli import InputError, at_least, seed, share
from config import MODEL_CARDS, LoRAConfig
from download import sha256


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--train_data", required=True, help="encoded samples to train on (.jsonl)")
    data.add_argument("--valid_data", required=True, help="encoded samples to validate on")
    data.add_argument("--train_batch_size", type=at_least(1), default=8, help="samples a batch")
    data.add_argument("--valid_batch_size", type=at_least(1), default=4,
                      help="samples a batch when validating")
    data.add_argument("--seq_len", type=at_least(2), default=512,
                      help="tokens a sample is cut to on the right")
    data.add_argument("--obj", choices=["clm", "jlm"], default="clm",
                      help="learn the completion's tokens (clm) or every token (jlm)")

    model = parser.add_argument_group("model")
    model.add_argument("--model_card", choices=MODEL_CARDS, default="gpt2.md", help="size of GPT-2")
    model.add_argument("--init_checkpoint", metavar="FILE",
                       help="weights to start from (.bin, .pt, .safetensors); none: random ones")
    model.add_argument("--lora_checkpoint", metavar="FILE",
                       help="LoRA matrices to start from, beside the base in --init_checkpoint")
    model.add_argument("--lora_dim", type=at_least(0), default=0,
                       help="LoRA's rank r; 0 trains every weight")
    model.add_argument("--lora_alpha", type=at_least(0), default=128,
                       help="LoRA's detour is scaled by alpha / r")
    model.add_argument("--lora_dropout", type=share, default=0.0, help="on LoRA's input")

    loop = parser.add_argument_group("training")
    loop.add_argument("--max_epoch", type=at_least(1), help="passes over the data")
    loop.add_argument("--max_step", type=at_least(1), help="micro-batches in all")
    loop.add_argument("--grad_acc", type=at_least(1), default=1, help="micro-batches an update")
    loop.add_argument("--clip", type=at_least(0, float), default=0.0,
                      help="largest norm of the whole gradient; 0: any")
    loop.add_argument("--label_smooth", type=share, default=0.0, help="label smoothing")
    loop.add_argument("--random_seed", type=seed, default=10,
                      help="of LoRA's first matrices, the order of samples and dropout")

    optimizer = parser.add_argument_group("optimizer (AdamW)")
    optimizer.add_argument("--lr", type=at_least(0, float), default=1e-5, help="learning rate")
    optimizer.add_argument("--weight_decay", type=at_least(0, float), default=0.01,
                           help="share of lr by which weights shrink at an update")
    optimizer.add_argument("--no_decay_bias", action="store_true", help="biases do not shrink")
    optimizer.add_argument("--correct_bias", action="store_true", help="Adam's bias correction")
    optimizer.add_argument("--adam_epislon", "--adam_epsilon", type=at_least(0, float),
                           default=1e-6, help="Adam's epsilon (the original spells it so)")
    optimizer.add_argument("--adam_beta1", type=share, default=0.9, help="Adam's first decay")
    optimizer.add_argument("--adam_beta2", type=share, default=0.98, help="Adam's second decay")
    optimizer.add_argument("--scheduler", default="linear", help="of the learning rate", choices=[
        "cosine", "inv_sqrt", "dev_perf", "constant", "linear", "cycle"])
    optimizer.add_argument("--warmup_step", type=at_least(0), default=0,
                           help="micro-batches until the learning rate is reached")
    optimizer.add_argument("--i_steps", default="0", help="cycle: corner steps, e.g. 0,100,1000")
    optimizer.add_argument("--i_lrs", default="0.00025", help="cycle: learning rates there")

    output = parser.add_argument_group("output")
    output.add_argument("--work_dir", type=Path, default=os.getenv("PT_OUTPUT_DIR", "gpt2_model"),
                        help="folder of checkpoints, logs and the loss curve")
    output.add_argument("--log_interval", type=at_least(1), default=100,
                        help="micro-batches a log line")
    output.add_argument("--eval_interval", type=at_least(1), default=2000,
                        help="micro-batches between validations")
    output.add_argument("--save_interval", type=at_least(1), default=500,
                        help="micro-batches between checkpoints")
    output.add_argument("--keep_last", type=at_least(1), metavar="N",
                        help="keep only the newest N checkpoints before the last, beside "
                             "model.best.pt, the best by validation; none: keep all")
    output.add_argument("--state_interval", type=at_least(1), metavar="N",
                        help="micro-batches between states to resume from; none: 100 with LoRA, "
                             "500 without")
    output.add_argument("--resume", nargs="?", choices=["no", "yes", "auto"], const="yes",
                        default="no",
                        help="go on from the newest state of a run in --work_dir that broke off; "
                             "auto: begin anew where that run had other settings")
    backend.add_device_flag(parser)
    args = parser.parse_args()

    if args.max_epoch is None and args.max_step is None and args.scheduler != "cycle":
        parser.error("give --max_epoch or --max_step")
    try:
        args.i_steps = [int(step) for step in args.i_steps.split(",")]
        args.i_lrs = [float(lr) for lr in args.i_lrs.split(",")]
    except ValueError:
        parser.error("--i_steps and --i_lrs take numbers with commas between them")
    if args.scheduler == "cycle":
        if len(args.i_steps) != len(args.i_lrs) or args.i_steps[-1] < 1 \
                or args.i_steps != sorted(args.i_steps):
            parser.error("--scheduler cycle: --i_steps must rise to a step above 0, with as many "
                         "--i_lrs")
        args.max_step = args.i_steps[-1]  # as in the original
    if args.state_interval is None:
        args.state_interval = 100 if args.lora_dim else 500
    if args.seq_len > MODEL_CARDS[args.model_card].n_positions:
        parser.error(f"--seq_len {args.seq_len}: the model has "
                     f"{MODEL_CARDS[args.model_card].n_positions} positions")
    return args


# Flags that change neither the losses nor what is logged: a resumed run may differ in them.
FREE_FLAGS = {"work_dir", "save_interval", "state_interval", "keep_last", "resume", "device"}
FILE_FLAGS = ("train_data", "valid_data", "init_checkpoint", "lora_checkpoint")


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """All that a run shares with the one it resumes, by flag; of a file what is in it.

    ``np`` is mpirun's flag for the number of processes.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    for name in FILE_FLAGS:
        if settings[name]:
            settings[name] = sha256(Path(settings[name]))
    return {**settings, "np": processes.world_size()}


def state_to_resume(args: argparse.Namespace, settings: dict[str, object]):
    """The state to go on from, or None, as --resume has it; says which.

    Raises InputError where a run of other settings broke off and --resume is not auto.
    """
    import train_state

    state = train_state.newest(args.work_dir) if args.resume != "no" else None
    if state is None:
        if args.resume == "yes":
            cli.log(f"{args.work_dir}: no state to resume from; starting from the beginning")
        return None
    name = state.differing(settings)
    if name is None:
        cli.log(f"resuming after step {state.counters.step}, from {state.path}")
        return state
    if name in FILE_FLAGS:
        difference = f"another --{name}"
    else:
        difference = f"--{name} {state.settings.get(name)}, not {settings.get(name)}"
    if args.resume == "auto":
        cli.log(f"{state.path}: of a run with {difference}; starting from the beginning")
        return None
    raise InputError(f"{state.path}: of a run with {difference}; give the same, or leave out "
                     "--resume to start anew")


def main() -> None:
    args = parse_args()
    backend.start(args.device, args.random_seed)
    # Jittor, and all that needs it, only now: see backend.
    import jittor as jt

    import checkpoint
    import loralib as lora
    from dataset import FTDataset
    from model import GPT2LMModel
    from optimizer import AdamW, make_schedule
    from trainer import TrainOptions, train

    card = MODEL_CARDS[args.model_card]
    limits = {"vocab_size": card.vocab_size, "n_positions": card.n_positions}
    train_data = FTDataset(args.train_data, args.train_batch_size, args.seq_len,
                           joint_lm=args.obj == "jlm", **limits)
    valid_data = FTDataset(args.valid_data, args.valid_batch_size, args.seq_len, **limits)
    for path, data in ((args.train_data, train_data), (args.valid_data, valid_data)):
        if not data.learns():
            raise InputError(f"{path}: no sample has a token of its completion within --seq_len "
                             f"{args.seq_len}; raise it")
        if data.cut_off():
            cli.log(f"{path}: {data.cut_off()} of {len(data.samples)} samples lose their whole "
                    f"completion to --seq_len {args.seq_len}; raise it to learn from them")
    model = GPT2LMModel(card, LoRAConfig(args.lora_dim, args.lora_alpha, args.lora_dropout))
    checkpoint.load(model, args.init_checkpoint, args.lora_checkpoint)
    jt.sync_all()  # random weights are drawn here, also those that a state is to replace
    if args.lora_dim:
        lora.mark_only_lora_as_trainable(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    no_decay = {name for name in trained if "bias" in name} if args.no_decay_bias else ()
    optimizer = AdamW(trained, args.adam_beta1, args.adam_beta2, args.adam_epislon,
                      args.weight_decay, args.correct_bias, frozenset(no_decay))
    max_step = args.max_step or -(-args.max_epoch * train_data.num_batches
                                  // processes.world_size())
    schedule = make_schedule(args.scheduler, args.lr, args.warmup_step, max_step, args.i_steps,
                             args.i_lrs)
    settings = settings_of(args)
    options = TrainOptions(args.work_dir, max_step, args.max_epoch, args.grad_acc, args.clip,
                           args.label_smooth, args.log_interval, args.eval_interval,
                           args.save_interval, args.state_interval, args.keep_last,
                           args.random_seed, settings)
    count = sum(p.numel() for p in trained.values())
    cli.log(f"{args.model_card}: {count:,} of {sum(p.numel() for p in model.parameters()):,} "
            f"weights train, {max_step} micro-batches of {args.train_batch_size}"
            + f" in each of {processes.world_size()} processes" * (processes.world_size() > 1))
    state = state_to_resume(args, settings)
    done = state.counters.step if state else 0
    if processes.total_numbers(done)[0] != done * processes.world_size():
        raise InputError(f"{args.work_dir}: the processes find different states to resume from; "
                         "give a folder that all machines share, or leave out --resume")
    last = train(model, optimizer, schedule, train_data, valid_data, options, cli.log, state)
    cli.log(f"saved {last}; log, metrics and loss curve beside it")


if __name__ == "__main__":
    cli.run(main)
