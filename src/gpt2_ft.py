"""Stage 3: fine-tunes GPT-2 on encoded samples, with LoRA or as a whole.

Reads ``--train_data`` and ``--valid_data`` (src/gpt2_encode.py makes them) and a base model;
leaves checkpoints, log lines and a loss curve in ``--work_dir``. The experiment's flags are in
data/: ``python src/gpt2_ft.py @data/experiment.ini --train_data ...``.
"""

import argparse
import math
import os
from contextlib import nullcontext
from pathlib import Path

import model_flags
import weight_files
from config import GPT2Config, LoRAConfig
from runtime import backend, memory, processes
from runtime.errors import InputError
from runtime.flags import (
    LATER_FLAGS,
    ArgumentParser,
    add_device_flag,
    add_resume_flag,
    at_least,
    seed,
    settings_of,
    share,
    wrong,
)
from runtime.locks import exclusive
from runtime.progress import Progress, log
from runtime.script import StopRequest, run

CARD = "gpt2.md"  # the original's default


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, "gpt2_ft")
    data = parser.add_argument_group("data")
    data.add_argument("--train_data", required=True, help="encoded samples to train on (.jsonl)")
    data.add_argument("--valid_data", required=True, help="encoded samples to validate on")
    data.add_argument("--train_batch_size", type=at_least(1), default=8, help="samples a batch")
    data.add_argument("--valid_batch_size", type=at_least(1), default=4,
                      help="samples a batch in validation")
    data.add_argument("--seq_len", type=at_least(2), default=512,
                      help="most tokens of a sample; the rest on its right is cut off")
    data.add_argument("--obj", choices=["clm", "jlm"], default="clm",
                      help="targets: the completion's tokens (clm) or every token (jlm)")

    model = model_flags.add_flags(parser, CARD, trains=True)
    model.add_argument("--lora_dropout", type=share, default=0.0, help="dropout on LoRA's input")

    loop = parser.add_argument_group("training")
    loop.add_argument("--max_epoch", type=at_least(1), help="passes over the data")
    loop.add_argument("--max_step", type=at_least(1), help="micro-batches in total")
    loop.add_argument("--grad_acc", type=at_least(1), default=1, help="micro-batches of an update")
    loop.add_argument("--clip", type=at_least(0, float), default=0.0,
                      help="largest norm of the whole gradient; 0: no limit")
    loop.add_argument("--label_smooth", type=share, default=0.0, help="label smoothing")
    loop.add_argument("--random_seed", type=seed, default=10,
                      help="seed of LoRA's initial matrices, the order of samples and dropout")

    optimizer = parser.add_argument_group("optimizer (AdamW)")
    optimizer.add_argument("--lr", type=at_least(0, float), default=1e-5, help="learning rate")
    optimizer.add_argument("--weight_decay", type=at_least(0, float), default=0.01,
                           help="at each update weights shrink by lr times this share")
    optimizer.add_argument("--no_decay_bias", action="store_true", help="no decay of biases")
    optimizer.add_argument("--correct_bias", action=argparse.BooleanOptionalAction, default=False,
                           help="Adam's bias correction")
    optimizer.add_argument("--adam_epislon", "--adam_epsilon", type=at_least(0, float),
                           default=1e-6, help="Adam's epsilon (the original spells it so)")
    optimizer.add_argument("--adam_beta1", type=share, default=0.9,
                           help="Adam's decay of the mean gradient")
    optimizer.add_argument("--adam_beta2", type=share, default=0.98,
                           help="Adam's decay of the mean squared gradient")
    optimizer.add_argument("--scheduler", default="linear", help="learning rate schedule", choices=[
        "cosine", "inv_sqrt", "dev_perf", "constant", "linear", "cycle"])
    optimizer.add_argument("--warmup_step", type=at_least(0), default=0,
                           help="micro-batches until the learning rate reaches --lr")
    optimizer.add_argument("--i_steps", default="0", help="cycle: its corners, e.g. 0,100,1000")
    optimizer.add_argument("--i_lrs", default="0.00025", help="cycle: learning rates at --i_steps")

    output = parser.add_argument_group("output")
    output.add_argument("--work_dir", type=Path, default=os.getenv("PT_OUTPUT_DIR", "gpt2_model"),
                        help="folder of checkpoints, logs and the loss curve")
    output.add_argument("--log_interval", type=at_least(1), default=100,
                        help="micro-batches between log lines")
    output.add_argument("--eval_interval", type=at_least(1), default=2000,
                        help="micro-batches between validations")
    output.add_argument("--save_interval", type=at_least(1), default=500,
                        help="micro-batches between checkpoints")
    output.add_argument("--keep_last", type=at_least(1), metavar="N",
                        help="keep only the newest N checkpoints before the last one; "
                             "model.best.pt, the best by validation, always stays; none: keep all")
    output.add_argument("--state_interval", type=at_least(1), metavar="N",
                        help="micro-batches between states to resume from; none: 100 with LoRA, "
                             "500 without")
    add_resume_flag(parser, "the run in --work_dir that broke off, from its newest state")
    add_device_flag(parser)
    args = parser.parse_args()

    if args.model_card == "auto" and not args.init_checkpoint:
        parser.error("--model_card auto: there is no --init_checkpoint to take it from")
    if args.max_epoch is None and args.max_step is None and args.scheduler != "cycle":
        parser.error("give --max_epoch or --max_step")
    try:
        args.i_steps = [int(step) for step in args.i_steps.split(",")]
        args.i_lrs = [float(lr) for lr in args.i_lrs.split(",")]
    except ValueError:
        parser.error("--i_steps and --i_lrs take numbers separated by commas")
    if args.scheduler == "cycle":
        if len(args.i_steps) != len(args.i_lrs) or args.i_steps[-1] < 1 \
                or args.i_steps != sorted(args.i_steps):
            parser.error("--scheduler cycle: --i_steps must rise to a step above 0, and --i_lrs "
                         "must have as many numbers")
        args.max_step = args.i_steps[-1]  # as in the original
    return args


def complete(args: argparse.Namespace) -> GPT2Config:
    """Sets the flags that follow from the checkpoints and from others; the model's dimensions."""
    config = model_flags.complete(args, CARD)
    if args.precision != "float32" and not args.lora_dim:
        wrong(f"--precision {args.precision}: for frozen matrices, and --lora_dim 0 trains them; "
              "give --lora_dim, or leave the flag out")
    if args.state_interval is None:
        args.state_interval = 100 if args.lora_dim else 500
    if args.seq_len > config.n_positions:
        wrong(f"--seq_len {args.seq_len}: the model has {config.n_positions} positions")
    return config


# Flags that change neither the losses nor the log: a resumed run may differ in them.
FREE_FLAGS = {"work_dir", "save_interval", "state_interval", "keep_last", "resume", "device"}
FILE_FLAGS = ("train_data", "valid_data", "init_checkpoint", "lora_checkpoint")


def is_finished(args: argparse.Namespace, settings: dict[str, object]) -> bool:
    """Whether --resume finds that this very run has ended; logs its last checkpoint."""
    import train_state

    last = None
    if args.resume != "no" and processes.rank() == 0:
        last = train_state.finished(args.work_dir, settings)
    if last:
        train_state.remove(args.work_dir)
        log(f"finished before, nothing to do: {last}; --resume no trains anew")
    return processes.total_number(bool(last)) > 0


def state_to_resume(args: argparse.Namespace, settings: dict[str, object]):
    """The train_state.TrainState to continue from, or None, as --resume asks; logs which.

    Raises InputError if the run that broke off had other settings and --resume is not auto, or if
    the processes do not all find the same state.
    """
    import train_state

    state = train_state.newest(args.work_dir) if args.resume != "no" else None
    step = state.counters.step if state else 0
    if processes.total_number(step) != step * processes.world_size():
        raise InputError(f"{args.work_dir}: the processes find different states to resume from; "
                         "give a folder that all machines share, or leave out --resume")
    if state is None:
        if args.resume == "yes":
            log(f"{args.work_dir}: no state to resume from; starting from the beginning")
        return None
    name = state.differing(settings)
    if name is None:
        log(f"resuming after step {step}, from {state.path}")
        return state
    difference = (f"another --{name}" if name in FILE_FLAGS else
                  f"--{name} {state.settings.get(name, LATER_FLAGS.get(name))}, not "
                  f"{settings.get(name, LATER_FLAGS.get(name))}")
    if args.resume == "auto":
        log(f"{state.path}: of a run with {difference}; starting from the beginning")
        return None
    raise InputError(f"{state.path}: of a run with {difference}; give the same, or leave out "
                     "--resume to start anew")


def read_data(args: argparse.Namespace, config: GPT2Config):
    """The training and the validation set; raises InputError if nothing can be learned from one."""
    from dataset import FTDataset

    sets = []
    for path, batch_size, joint_lm in (
            (args.train_data, args.train_batch_size, args.obj == "jlm"),
            (args.valid_data, args.valid_batch_size, False)):
        data = FTDataset(path, batch_size, args.seq_len, joint_lm=joint_lm,
                         vocab_size=config.vocab_size, n_positions=config.n_positions)
        if not data.learns():
            raise InputError(f"{path}: no sample has a token of its completion within --seq_len "
                             f"{args.seq_len}; raise it")
        lost = data.lost()
        if any(lost):
            wholly = sum(n == len(sample[1]) > 0 for n, sample in zip(lost, data.samples))
            longest = max(len(context + completion) for context, completion in data.samples)
            log(f"{path}: {sum(map(bool, lost))} of {len(lost)} completions are cut at --seq_len "
                f"{args.seq_len}, by up to {max(lost)} tokens, {wholly} of them wholly; raise it "
                f"to {longest} to learn from all")
        sets.append(data)
    if not sets[0].full_batches(processes.world_size()):
        raise InputError(f"{args.train_data}: {len(sets[0].samples)} samples are not a batch of "
                         f"{args.train_batch_size} in each of {processes.world_size()} processes; "
                         "use fewer processes or a smaller --train_batch_size")
    return sets


def name_of(train_data: str) -> str:
    """What checkpoints call a data set: the name of its folder, of data/e2e/whole "e2e/whole"."""
    folder = Path(train_data).resolve().parent
    return "/".join(folder.parts[-2:] if folder.name in ("whole", "work") else folder.parts[-1:])


def require_memory(args: argparse.Namespace, config: GPT2Config, data, joined: int) -> None:
    """Raises InputError if there is too little memory for the weights and the largest batches."""
    lengths = sorted(min(len(context + completion), args.seq_len)
                     for context, completion in data.samples)[-args.train_batch_size * joined:]
    activations = 16 * config.n_layer * config.n_embd * sum(lengths)
    # of a full training also the gradients and AdamW's two means
    numbers = config.weights * (1 if args.lora_dim else 4) + activations
    memory.require(4 * numbers, "take a smaller --train_batch_size, --seq_len or --model_card")


def make_trainer(args: argparse.Namespace, config: GPT2Config, max_step: int, joined: int):
    """The model with its weights, optimizer and schedule; logs how many weights train."""
    import jittor as jt

    import checkpoint
    import lora
    from model import GPT2LMModel
    from optimizer import AdamW, make_schedule
    from trainer import Trainer, TrainOptions

    model = GPT2LMModel(config,
                        LoRAConfig(args.lora_dim, args.lora_alpha, args.lora_dropout))
    checkpoint.load(model, args.init_checkpoint, args.lora_checkpoint)
    jt.sync_all()  # draws random weights now, also those that a state will replace
    if args.lora_dim:
        lora.mark_only_lora_as_trainable(model)
        model.pack(args.precision)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(
        trained, beta1=args.adam_beta1, beta2=args.adam_beta2, epsilon=args.adam_epislon,
        weight_decay=args.weight_decay, correct_bias=args.correct_bias,
        no_decay={name for name in trained if "bias" in name} if args.no_decay_bias else ())
    schedule = make_schedule(args.scheduler, args.lr, args.warmup_step, max_step, args.i_steps,
                             args.i_lrs)
    log(f"{args.model_card}: {sum(p.numel() for p in trained.values()):,} of "
        f"{sum(math.prod(p.shape) for p in model.weights().values()):,} weights train, "
        f"{max_step} micro-batches of {args.train_batch_size}"
        + f" in each of {processes.world_size()} processes" * (processes.world_size() > 1))
    return Trainer(model, optimizer, schedule, TrainOptions(
        grad_acc=args.grad_acc, joined=joined, clip=args.clip, label_smooth=args.label_smooth,
        seed=args.random_seed))


def main() -> None:
    args = parse_args()
    config = complete(args)
    backend.start(args.device, args.random_seed)
    from trainer import RunOptions, TrainingRun, joined_batches  # needs Jittor, see backend

    train_data, valid_data = read_data(args, config)
    max_step = args.max_step or -(-args.max_epoch * train_data.num_batches
                                  // processes.world_size())
    if args.warmup_step >= max_step and args.scheduler in ("linear", "constant", "cosine"):
        log(f"--warmup_step {args.warmup_step}: the run has only {max_step} micro-batches, so its "
            f"learning rate never reaches --lr {args.lr:g}; lower it")
    # np is mpirun's flag for the number of processes
    settings = {**settings_of(args, FREE_FLAGS, FILE_FLAGS, weight_files.digest),
                "np": processes.world_size()}
    processes.check_same({**vars(args), **settings})
    options = RunOptions(
        work_dir=args.work_dir, max_step=max_step, max_epoch=args.max_epoch,
        log_interval=args.log_interval, eval_interval=args.eval_interval,
        save_interval=args.save_interval, state_interval=args.state_interval,
        keep_last=args.keep_last, settings=settings,
        data=name_of(args.train_data),
        title=f"{args.model_card}, {f'LoRA rank {args.lora_dim}' if args.lora_dim else 'no LoRA'}, "
              f"{args.train_data}")
    if is_finished(args, settings):
        return
    joined = joined_batches(train_data, args.grad_acc)
    require_memory(args, config, train_data, joined)
    trainer = make_trainer(args, config, max_step, joined)
    lock = exclusive(args.work_dir / ".training", "another --work_dir")
    with lock if processes.rank() == 0 else nullcontext():
        state = state_to_resume(args, settings)
        done = state.counters.step if state else 0
        with StopRequest(log) as stop, Progress(max_step, "training", "batch", initial=done) as bar:
            last = TrainingRun(trainer, train_data, valid_data, options, log).run(
                state, lambda: stop.requested, lambda note: bar.update(note=note))
    log(f"saved {last}; log, metrics and loss curve beside it")


if __name__ == "__main__":
    run(main)
