"""Compares the results of run.py's two sides, and writes the table, the CSV file and the figure.

A run's folder holds setting.json and, for each seed, ``seedSEED/{torch,jittor}`` and, if it was
run, ``float64`` with metrics.csv, train.log, model.STEP.pt, predict.BATCH_SIZE.{jsonl,log} and
scores.json.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

from common import InputError, read_jsonl, replacing, torch_file

LOSS_BOUND = 1e-4  # absolute, each step, in nats per token
LORA_BOUND = 1e-3  # of each matrix, ||A - B|| / ||B|| in the Frobenius norm
LR_BOUND = 1e-12  # absolute, each step
SIDES = {"torch": "PyTorch", "jittor": "Jittor"}
# what is compared where float64 judges: from the distance of a side to it
FROM_FLOAT64 = {"loss, root mean square of the differences": lambda d: d["loss"]["rms"],
                "LoRA, relative difference of all matrices together": lambda d: d["lora_all"]}
METRICS = ("BLEU", "BLEU NLTK", "NIST", "METEOR", "ROUGE_L", "CIDEr", "TER")


def collect(folder: Path, seeds: list[int], batch_sizes: list[int], judged: bool) -> dict:
    """All data of the report, ready for JSON; :func:`broken` checks the bounds.

    ``judged``: by float64, which must have been run; Jittor may be as far from it as PyTorch.
    """
    (setting,) = read_jsonl(folder / "setting.json", {"name": str}, "run align/run.sh first")
    runs = {seed: _seed(folder / f"seed{seed}", batch_sizes) for seed in seeds}
    for seed, one in runs.items():
        if judged and "float64" not in one:
            raise InputError(f"{folder / f'seed{seed}' / 'float64'}: has no scores.json; run "
                             "align/run.sh without --report_only")
    return {**setting, "judged": judged, "bounds": {} if judged else {
        "loss": LOSS_BOUND, "lora": LORA_BOUND}, "seeds": runs}


def broken(results: dict) -> list[tuple[int, str]]:
    """The broken bounds as (seed, description), in the order of the experiment."""
    found = []
    for seed, one in results["seeds"].items():
        loss, lora = one["loss"], one["lora"]
        if not one["lr_largest"] <= LR_BOUND:
            found.append((seed, f"learning rates differ by {one['lr_largest']:.2g}"))
        if results["judged"]:
            for name, value in FROM_FLOAT64.items():
                theirs, ours = (value(one["float64"][side]) for side in SIDES)
                if not ours <= theirs:
                    found.append((seed, f"{name}: Jittor is {ours:.2e} from float64, PyTorch "
                                        f"{theirs:.2e}"))
            continue
        if loss["first_beyond"] is not None:
            found.append((seed, f"loss of step {loss['first_beyond']} differs by more than "
                                f"{LOSS_BOUND:g}, at most by {loss['largest']:.2g}"))
        for name, distance in lora.items():
            if not distance <= LORA_BOUND:
                found.append((seed, f"{name} differs by {distance:.2g} relative, more than "
                                    f"{LORA_BOUND:g}"))
        for size, count in one["identical"].items():
            if count != one["samples"]:
                found.append((seed, f"batch size {size}: the ids of only {count} of "
                                    f"{one['samples']} samples are identical"))
    return found


def last_checkpoint(side: Path) -> Path:
    """The checkpoint of a side's last step; the folder may have others of earlier runs."""
    return side / f"model.{_rows(side)[-1]['step']}.pt"


def _seed(folder: Path, batch_sizes: list[int]) -> dict:
    """One seed: the distance of Jittor to PyTorch, and of both to float64 if that was run."""
    torch, jittor, exact = (folder / name for name in ("torch", "jittor", "float64"))
    one = _distance(jittor, torch)
    predicted = _predictions(torch, 1)
    one["samples"] = len(predicted)
    one["identical"] = {size: _same(_predictions(jittor, size), predicted) for size in batch_sizes}
    one["ms_per_batch"] = {side: median(float(row["ms_per_batch"]) for row in _rows(folder / side))
                           for side in SIDES}
    one["samples_per_s"] = {"torch": _pace(torch, 1), "jittor": {
        size: _pace(jittor, size) for size in batch_sizes}}
    is_judged = (exact / "scores.json").is_file()  # written last, so the run is complete
    sides = [*SIDES, *(["float64"] if is_judged else [])]
    one["scores"] = {side: _scores(folder / side) for side in sides}
    one["mean_loss"] = {side: _losses(folder / side).mean() for side in sides}
    one["last_losses"] = {side: _losses(folder / side)[-max(1, one["steps"] // 10):].mean()
                          for side in sides}
    if is_judged:
        one["float64"] = {side: {**_distance(folder / side, exact), "identical": _same(
            _predictions(folder / side, batch_sizes[0] if side == "jittor" else 1),
            _predictions(exact, 1))} for side in SIDES}
    return one


def _distance(a: Path, b: Path) -> dict:
    """The distance of side ``a`` to ``b`` in losses, learning rates and LoRA matrices."""
    ours, theirs = _losses(a), _losses(b)
    if len(ours) != len(theirs):
        raise InputError(f"{a}: {len(ours)} steps, but {b} has {len(theirs)}; run both again")
    apart = np.abs(ours - theirs)
    beyond = np.flatnonzero(~(apart <= LOSS_BOUND))
    rates = (np.array([float(row["lr"]) for row in _rows(side)]) for side in (a, b))
    ours, theirs = _lora(a), _lora(b)
    if ours.keys() != theirs.keys():
        raise InputError(f"{a}: its LoRA matrices are not those of {b}; run both again")
    return {"steps": len(apart), "lr_largest": float(np.abs(np.subtract(*rates)).max()),
            "lora_all": _relative(*(np.concatenate([side[name].ravel() for name in theirs])
                                    for side in (ours, theirs))),
            "loss": {"largest": float(apart.max()), "largest_at": int(apart.argmax()) + 1,
                     "median": float(np.median(apart)),
                     "rms": float(np.sqrt(np.mean(apart ** 2))),
                     "first_beyond": int(beyond[0]) + 1 if len(beyond) else None},
            "lora": {name: _relative(ours[name], theirs[name]) for name in theirs}}


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    distance, norm = (float(np.linalg.norm(x)) for x in (np.float64(a) - b, b))
    return distance / norm if norm else (np.inf if distance else 0.0)


def _rows(side: Path) -> list[dict]:
    try:
        with open(side / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{side / 'metrics.csv'}: cannot be read: {error.strerror}; run "
                         "align/run.sh without --report_only") from None
    if not rows:
        raise InputError(f"{side / 'metrics.csv'}: has no steps; run both sides again")
    return rows


def _losses(side: Path) -> np.ndarray:
    return np.array([float(row["loss"]) for row in _rows(side)])


def _lora(side: Path) -> dict[str, np.ndarray]:
    path = last_checkpoint(side)
    try:
        weights = torch_file.load(path)["model_state_dict"]
    except (OSError, torch_file.TorchFileError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run both sides again") from None
    return {name: value for name, value in sorted(weights.items()) if "lora_" in name}


def _predictions(side: Path, size: int) -> list[list[int]]:
    path = side / f"predict.{size}.jsonl"
    return [line["predict"] for line in read_jsonl(path, {"id": int, "predict": list})]


def _same(a: list[list[int]], b: list[list[int]]) -> int:
    return sum(x == y for x, y in zip(a, b))


def _pace(side: Path, size: int) -> float:
    """Samples per second, from the log of the beam search."""
    said = (side / f"predict.{size}.log").read_text(encoding="utf-8")
    return float(re.findall(r"([\d.]+) samples/s", said)[-1])


def _scores(side: Path) -> dict[str, float]:
    """The scores in a side's folder by name, in the order of METRICS."""
    (scores,) = read_jsonl(side / "scores.json", {}, "run align/run.sh without --report_only")
    return {metric: scores[metric] for metric in METRICS if metric in scores}


def is_random(results: dict) -> bool:
    """Whether the base had random weights; such a model writes no text, and scores say nothing."""
    words = shlex.split(results["command"])
    return "--base=random" in words or ("--base", "random") in zip(words, words[1:])


def write(out: Path, folder: Path, results: dict, faults: list[tuple[int, str]],
          strict: bool) -> Path:
    """Writes {table.md, results.json, losses.csv, losses.png, SIDE.SEED.train.log} to ``out``.

    Returns the path of the table.
    """
    losses = {seed: {side: _losses(folder / f"seed{seed}" / side) for side in
                     (*SIDES, *(["float64"] if "float64" in one else []))}
              for seed, one in results["seeds"].items()}
    _write(out / "results.json", json.dumps({**results, "broken": faults}, indent=1) + "\n")
    _write(out / "losses.csv", _csv(losses))
    with replacing(out / "losses.png") as file:
        file.write(_figure(results, losses, strict))
    for seed in losses:
        for side in SIDES:
            _write(out / f"{side}.{seed}.train.log", (
                folder / f"seed{seed}" / side / "train.log").read_text(encoding="utf-8"))
    _write(out / "table.md", _table(results, faults, strict))
    return out / "table.md"


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def _csv(losses: dict) -> str:
    lines = ["seed,step,torch,jittor,difference,float64"]
    for seed, sides in losses.items():
        exact = sides.get("float64", [""] * len(sides["torch"]))
        for step, (a, b, c) in enumerate(zip(sides["torch"], sides["jittor"], exact), start=1):
            lines.append(f"{seed},{step},{a},{b},{b - a},{c}")
    return "\n".join(lines) + "\n"


def _figure(results: dict, losses: dict, strict: bool) -> bytes:
    """A PNG: both loss curves (running mean, mean of seeds) and their absolute difference.

    If float64 judges, the difference of each to float64, mean of the seeds' absolute differences.
    The logarithmic axis has no place for a difference of 0: such steps get a mark at its foot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6), dpi=120,
                                             layout="constrained", height_ratios=[3, 2])
    curves = {side: np.array([one[side] for one in losses.values()]) for side in SIDES}
    steps = np.arange(1, curves["torch"].shape[1] + 1)
    window = max(1, len(steps) // 50)
    means = f"running mean of {window}" + (f", {len(losses)} seeds" if len(losses) > 1 else "")
    for (side, title), style in zip(SIDES.items(), ("-", "--")):
        smooth = np.array([np.convolve(curve, np.ones(window) / window, "valid")
                           for curve in curves[side]])
        (line,) = above.plot(steps[window - 1:], smooth.mean(0), style, label=f"{title}, {means}")
        if len(losses) > 1:
            spread = smooth.std(0, ddof=1)
            above.fill_between(steps[window - 1:], smooth.mean(0) - spread,
                               smooth.mean(0) + spread, color=line.get_color(), alpha=0.2)
    if results["judged"]:
        exact = np.array([one["float64"] for one in losses.values()])
        for side, title in SIDES.items():
            below.semilogy(steps, np.abs(curves[side] - exact).mean(0), ".", markersize=3,
                           label=f"|{title} - PyTorch in float64|")
    else:
        apart = np.abs(curves["jittor"].mean(0) - curves["torch"].mean(0))
        below.semilogy(steps[apart > 0], apart[apart > 0], ".", markersize=3, color="tab:gray",
                       label="|Jittor - PyTorch|")
        if not apart.all():
            foot = apart[apart > 0].min(initial=LOSS_BOUND) / 3
            same = steps[apart == 0]
            below.plot(same, np.full(len(same), foot), "|", markersize=6, color="tab:green",
                       label=f"the same to the last bit: {len(same)} of {len(steps)} steps")
        if strict:
            below.axhline(LOSS_BOUND, color="tab:red", linestyle=":",
                          label=f"bound {LOSS_BOUND:g}")
    above.set(ylabel="loss (nats per token)")
    below.set(xlabel="micro-batch", ylabel="difference (nats per token)")
    figure.suptitle(results["name"])
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return picture.getvalue()


def _table(results: dict, faults: list[tuple[int, str]], strict: bool) -> str:
    """The report in Markdown."""
    runs, judged = results["seeds"], results["judged"]
    lines = [f"# {results['name']}", "", f"    {results['command']}", "",
             f"Machine: {results['machine']}. Versions: " + ", ".join(
                 f"{name} {version}" for name, version in results["versions"].items()) + ".", ""]
    if strict:
        lines += ["**All bounds hold.**" if not faults else "**Broken:** " + "; ".join(
            f"seed {seed}: {text}" for seed, text in faults) + ".", ""]

    def rows(title: str, columns, table) -> None:
        lines.extend([f"| {title} | " + " | ".join(columns) + " |",
                      "|---" + "|---:" * len(columns) + "|"])
        lines.extend(f"| {name} | " + " | ".join(cells) + " |" for name, cells in table)
        lines.append("")

    table = [
        ("steps", ["", *(str(one["steps"]) for one in runs.values())]),
        ("loss, largest difference (at step)", [f"{LOSS_BOUND:g}", *(
            f"{one['loss']['largest']:.2e} ({one['loss']['largest_at']})"
            for one in runs.values())]),
        ("loss, median difference", ["", *(
            f"{one['loss']['median']:.2e}" for one in runs.values())])]
    table += [(f"`{name.removeprefix('transformer.')}`, relative difference", [
        f"{LORA_BOUND:g}", *(f"{one['lora'][name]:.2e}" for one in runs.values())])
        for name in next(iter(runs.values()))["lora"]]
    table += [(f"samples with identical ids, batch size {size}", ["all", *(
        f"{one['identical'][size]} of {one['samples']}" for one in runs.values())])
        for size in next(iter(runs.values()))["identical"]]
    if not strict or judged:  # the dropout masks or the rounding differ, so no bound applies
        table = [(name, ["", *cells[1:]]) for name, cells in table]
    for side, title in SIDES.items():
        exact = {seed: one["float64"][side] for seed, one in runs.items() if "float64" in one}
        bound = "PyTorch's" if judged and side == "jittor" else ""
        for name, value in (
                ("loss, largest difference", lambda e: f"{e['loss']['largest']:.2e}"),
                ("LoRA, largest relative difference", lambda e: f"{max(e['lora'].values()):.2e}"),
                *((name, lambda e, value=value: f"{value(e):.2e}")
                  for name, value in FROM_FLOAT64.items()),
                ("samples with identical ids", lambda e: str(e["identical"]))):
            if exact:
                table.append((f"{title} to PyTorch in float64: {name}", [
                    bound if name in FROM_FLOAT64 else "", *(
                        value(exact[seed]) if seed in exact else "" for seed in runs)]))
    rows(f"Jittor to PyTorch ({results['inputs']} different test inputs)",
         ["bound", *(f"seed {seed}" for seed in runs)], table)

    def pair(name: str, values: dict[str, list[float]], digits: int, last=np.subtract):
        means = [mean(values[side]) for side in ("torch", "jittor")]
        spreads = [f" ± {stdev(values[side]):.{digits}f}" if len(runs) > 1 else ""
                   for side in ("torch", "jittor")]
        sign = "+" if last is np.subtract else ""
        exact = [f"{mean(values['float64']):.{digits}f}"] if "float64" in values else []
        return name, [*(f"{m:.{digits}f}{s}" for m, s in zip(means, spreads)),
                      f"{last(means[1], means[0]):{sign}.{digits}f}", *exact]

    def values(key: str, inner: str | None = None) -> dict[str, list[float]]:
        return {side: [one[key][side][inner] if inner else one[key][side]
                       for one in runs.values()]
                for side in next(iter(runs.values()))[key] if side in SIDES or judged}

    metrics = () if is_random(results) else next(iter(runs.values()))["scores"]["torch"]
    note = f", mean ± standard deviation of {len(runs)} seeds" if len(runs) > 1 else ""
    rows(f"Losses{' and scores' if metrics else ''}{note}",
         ["PyTorch", "Jittor", "difference", *(["PyTorch in float64"] if judged else [])], [
        pair("loss, all steps", values("mean_loss"), 4),
        pair("loss, last tenth of the steps", values("last_losses"), 4),
        *(pair(metric, values("scores", metric), 4) for metric in metrics)])
    paces = [(size, {"torch": [one["samples_per_s"]["torch"] for one in runs.values()],
                     "jittor": [one["samples_per_s"]["jittor"][size] for one in runs.values()]})
             for size in next(iter(runs.values()))["identical"]]
    rows(f"Speed on this machine{note}", ["PyTorch", "Jittor", "Jittor's time / PyTorch's"], [
        pair("training, ms/batch (median)", values("ms_per_batch"), 2, np.divide),
        *(pair(f"beam search, samples/s, Jittor's batch size {size}", pace, 2,
               lambda speed, other: other / speed) for size, pace in paces)])
    lines.append("Only the ratio is meaningful (below 1: Jittor is faster); PyTorch's beam search "
                 "takes one input at a time.")
    return "\n".join(lines) + "\n"
