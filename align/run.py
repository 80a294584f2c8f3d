"""Runs the experiment on both sides, PyTorch and Jittor, and compares the results.

    bash align/run.sh demo|e2e|webnlg|dart|FOLDER [--strict] [--card CARD] [--base FILE|random] ...

Both sides start from the same base and the same LoRA matrices, get the samples in the same order
and run one after the other. Their files are in WORK_DIR/NAME, the report is in RESULTS/NAME.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import report
import summary
from common import (
    ROOT,
    ArgumentParser,
    InputError,
    log,
    read_flags,
    read_jsonl,
    run,
    write_jsonl,
)

RESULTS = ROOT / "align" / "results"
PUBLISHED = {"gpt2.sm": "gpt2", "gpt2.md": "gpt2-medium", "gpt2.lg": "gpt2-large"}
SCRIPTS = {"jittor": ("src/gpt2_ft.py", "src/gpt2_beam.py"),
           "torch": ("align/torch_train.py", "align/torch_beam.py"),
           "float64": ("align/torch_train.py", "align/torch_beam.py")}
FILES = ("train.jsonl", "valid.jsonl", "test.jsonl", "test_formatted.jsonl")
FOLDERS = {"demo": "data/demo/work", "e2e": "data/e2e", "webnlg": "data/webnlg_challenge_2017",
           "dart": "data/dart"}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="align/run.sh")
    parser.add_argument("data", help="demo (needs bash work.sh demo), e2e, webnlg, dart, or a "
                        "folder with " + ", ".join(FILES))
    parser.add_argument("--ref_type", choices=["e2e", "webnlg", "dart"],
                        help="how a FOLDER is decoded and scored, see src/gpt2_decode.py "
                             "(default: e2e)")
    parser.add_argument("--strict", action="store_true",
                        help="no LoRA dropout, and exit code 1 if a difference is too large")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32",
                        help="of both sides; bf16 with --strict: a run in float64 follows, and "
                             "Jittor's distance to it may be at most PyTorch's")
    parser.add_argument("--float64", action="store_true", help="PyTorch runs in float64, too; the "
                        "report has the distance of both sides to that run")
    parser.add_argument("--card", choices=["gpt2.nano", *PUBLISHED],
                        help="size of GPT-2 (default: gpt2.nano for demo, else gpt2.sm)")
    parser.add_argument("--base", metavar="FILE|random", help="base model (default: the demo's "
                        "own; for gpt2.nano, that of bash align/base.sh; else GPT-2's "
                        "published weights in pretrained_checkpoints)")
    parser.add_argument("--steps", type=int, help="micro-batches to train (default: as in work.sh)")
    parser.add_argument("--seeds", help='(default: with --strict "2025", else "2025 2026 2027")')
    parser.add_argument("--inputs", type=int, help="number of different inputs from the start "
                        "of the test set (default: all)")
    parser.add_argument("--batch_sizes", default="1 8", help="batch sizes of Jittor's beam search; "
                        'PyTorch takes one input at a time')
    parser.add_argument("--train_flags", default="", help="flags for both training scripts, e.g. "
                        '--train_flags="--lr 0.001 --warmup_step 10"')
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--name", help="name of the result (default: from data, card and mode)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "trained_models" / "align")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report_only", action="store_true",
                        help="run nothing, report on the files in --work_dir again")
    args = parser.parse_args()
    try:
        args.seeds = [int(seed) for seed in
                      (args.seeds or ("2025" if args.strict else "2025 2026 2027")).split()]
        args.batch_sizes = [int(size) for size in args.batch_sizes.split()]
    except ValueError:
        parser.error('--seeds and --batch_sizes take numbers with blanks between them: "1 8"')
    if not args.batch_sizes or min(args.batch_sizes) < 1 or min(args.seeds, default=-1) < 0:
        parser.error("--seeds takes numbers from 0 on, --batch_sizes from 1 on")
    if any(n is not None and n < 1 for n in (args.steps, args.inputs)):
        parser.error("--steps and --inputs take numbers from 1 on")
    if not args.strict and len(set(args.seeds)) < 3:
        parser.error("--seeds: a mean with its spread needs three seeds (or add --strict)")
    args.flags = [ROOT / "data/experiment.ini"]
    if args.data == "demo":
        args.flags.append(ROOT / "data/demo/demo.ini")
    args.card = args.card or ("gpt2.nano" if args.data == "demo" else "gpt2.sm")
    if args.ref_type and args.data in FOLDERS:
        parser.error(f"--ref_type is for a FOLDER, {args.data} has its own")
    args.ref_type = args.ref_type or (args.data if args.data in ("webnlg", "dart") else "e2e")
    args.name = args.name or "-".join([Path(args.data).resolve().name, args.card,
                                       "strict" if args.strict else "paper"]
                                      + ["bf16"] * (args.precision == "bf16"))
    return args


def main() -> None:
    args = parse_args()
    folder = args.work_dir / args.name
    # Two runs in bf16 differ by more than any bound; what counts is how far each is from the truth.
    judged = args.strict and args.precision == "bf16"
    if not args.report_only:
        base = prepare(args, folder)
        for seed in args.seeds:
            shutil.rmtree(folder / f"seed{seed}" / "float64", ignore_errors=True)
            execute("align/torch_init.py", "--model_card", args.card,
                    "--lora_dim", read_flags(args.flags[0], "gpt2_ft")["lora_dim"],
                    "--random_seed", seed, "--output", folder / f"seed{seed}" / "lora.pt")
            for side in ("torch", "jittor", *["float64"] * (judged or args.float64)):
                experiment(args, folder, base, seed, side)
    results = report.collect(folder, args.seeds, args.batch_sizes, judged)
    broken = report.broken(results) if args.strict else []
    if broken and not (judged or args.float64 or args.report_only):
        for seed in sorted({seed for seed, _ in broken}):
            log(f"seed {seed}: a bound is broken; running float64 to compare both sides with it")
            experiment(args, folder, base, seed, "float64")
        results = report.collect(folder, args.seeds, args.batch_sizes, judged)
    table = report.write(args.results / args.name, folder, results, broken, args.strict)
    for line in table.read_text(encoding="utf-8").splitlines():
        log(line)
    if args.results.resolve() == RESULTS:
        summary.publish(ROOT)
    if broken:
        seed, text = broken[0]
        raise InputError(f"{args.name}, seed {seed}: {text}; see {table}")


def prepare(args: argparse.Namespace, folder: Path) -> Path:
    """Writes the test samples and the setting of this run; returns the path of the base."""
    data = ROOT / FOLDERS[args.data] if args.data in FOLDERS else Path(args.data)
    if args.data == "demo":
        remedy = "run: bash work.sh demo"
    elif args.data in FOLDERS:
        remedy = (f"run: bash data/download_data.sh {args.data} && "
                  f"bash create_datasets.sh {args.data}")
    else:
        remedy = f"the folder needs {', '.join(FILES)}"
    for name in FILES:
        if not (data / name).is_file():
            raise InputError(f"{data / name}: no such file; {remedy}")
    args.samples = data
    samples = read_jsonl(data / "test.jsonl", {"context": list, "completion": list})
    texts = read_jsonl(data / "test_formatted.jsonl", {"context": str, "completion": str})
    if len(samples) != len(texts):
        raise InputError(f"{data / 'test.jsonl'}: {len(samples)} lines, but test_formatted.jsonl "
                         f"has {len(texts)}; write it anew with src/gpt2_encode.py")
    chosen = set(list(dict.fromkeys(tuple(s["context"]) for s in samples))[:args.inputs])
    kept = [n for n, sample in enumerate(samples) if tuple(sample["context"]) in chosen]
    write_jsonl(folder / "test.jsonl", [samples[n] for n in kept])
    write_jsonl(folder / "test_formatted.jsonl", [texts[n] for n in kept])
    write_jsonl(folder / "setting.json", [{
        "name": args.name, "inputs": len(chosen), "machine": machine(args.device),
        "versions": {"python": platform.python_version(), **{
            name: metadata.version(name) for name in ("jittor", "torch", "transformers", "numpy")}},
        "command": "bash align/run.sh " + shlex.join(sys.argv[1:])}])

    if args.base == "random":
        execute("align/torch_init.py", "--model_card", args.card, "--random_seed", 0,
                "--output", folder / "base.pt")
        return folder / "base.pt"
    if args.base:
        return Path(args.base)
    if args.data != "demo" and args.card in PUBLISHED:
        return ROOT / "pretrained_checkpoints" / f"{PUBLISHED[args.card]}-pytorch_model.bin"
    place, remedy = "trained_models/demo/base", "run: bash work.sh demo"
    if args.data != "demo":
        place, remedy = "trained_models/align_base", "run: bash align/base.sh"
    bases = sorted((ROOT / place).glob("model.[0-9]*.pt"), key=os.path.getmtime)
    if not bases:
        raise InputError(f"{place}: no model.STEP.pt; {remedy}, or take --base FILE or random")
    return bases[-1]


def experiment(args: argparse.Namespace, folder: Path, base: Path, seed: int, side: str) -> None:
    """Trains, generates, decodes and scores with one side, in FOLDER/seedSEED/SIDE."""
    train, beam = SCRIPTS[side]
    out, lora = folder / f"seed{seed}" / side, folder / f"seed{seed}" / "lora.pt"
    model = [*(f"@{path}" for path in args.flags), "--model_card", args.card,
             "--device", args.device, "--work_dir", out]
    precision = "float64" if side == "float64" else args.precision
    model += [] if precision == "float32" else ["--precision", precision]
    # An epoch has at least one step, so with this --max_epoch only --max_step ends the run.
    length = ["--max_step", args.steps, "--max_epoch", args.steps] if args.steps else []
    log(f"== {args.name}, seed {seed}: {side}")
    execute(train, *model, *length, "--random_seed", seed,
            "--train_data", args.samples / "train.jsonl",
            "--valid_data", args.samples / "valid.jsonl",
            "--init_checkpoint", base, "--lora_checkpoint", lora, *shlex.split(args.train_flags),
            *(["--lora_dropout", "0"] if args.strict else []))
    checkpoint = report.last_checkpoint(out)
    sizes = args.batch_sizes if side == "jittor" else [1]
    for size in sizes:
        said = execute(beam, *model, "--data", folder / "test.jsonl", "--batch_size", size,
                       *(["--hold_batch_size"] if side == "jittor" else []), "--init_checkpoint",
                       checkpoint, "--output_file", f"predict.{size}.jsonl")
        (out / f"predict.{size}.log").write_text(said, encoding="utf-8")
    measure(args, folder / "test_formatted.jsonl", out, f"predict.{sizes[0]}.jsonl")


def measure(args: argparse.Namespace, inputs: Path, out: Path, predictions: str) -> None:
    """Decodes predictions and writes their scores to OUT/scores.json, by name."""
    decode = ["--vocab", ROOT / "vocab", "--sample_file", out / predictions, "--input_file", inputs,
              "--output_ref_file", out / "references", "--output_pred_file", out / "texts",
              "--ref_type", args.ref_type]
    if args.ref_type == "e2e":
        execute("src/gpt2_decode.py", *decode)
        said = execute("eval/e2e/measure_scores.py", out / "references", out / "texts", "-p")
        scores = {name: float(score) for name, score in re.findall(r"^(\w+): (\S+)$", said, re.M)}
        write_jsonl(out / "scores.json", [scores])
    else:
        execute("src/gpt2_decode.py", *decode, "--ref_num", 6, "--tokenize", "--lower")
        execute("eval/eval_m.py", "-R", out / "references/reference", "-H", out / "texts", "-nr", 6,
                "-m", "bleu,meteor,ter", "--json", out / "scores.json")


def execute(script: str, *flags: object) -> str:
    """Runs a script of this repository, shows what it prints and returns that."""
    said = []
    with subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], text=True,
                          stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            log(line.rstrip("\n"))
            said.append(line)
    if process.returncode == 1:  # the script has printed the reason
        sys.exit(1)
    if process.returncode != 0:
        raise InputError(f"{script}: ended with exit code {process.returncode}; see above")
    return "".join(said)


def machine(device: str) -> str:
    """A description: model and number of the cores, and the GPU if it may have been used."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    words = f"{cpu}, {os.cpu_count()} cores"
    if device != "cpu" and shutil.which("nvidia-smi"):
        words += ", " + subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                                       capture_output=True, text=True).stdout.strip()
    return words


if __name__ == "__main__":
    run(main)
