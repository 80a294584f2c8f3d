"""METEOR, ROUGE-L and CIDEr as the COCO caption tools compute them (Chen et al., 2015).

METEOR 1.5 (Denkowski and Lavie, 2014) and the Penn Treebank tokenizer before all three are Java
archives inside the package pycocoevalcap, run here; ROUGE-L (Lin, 2004) and CIDEr (Vedantam et
al., 2015) are that package's own scorers.

In all of it ``references`` is a list of segments, each a list of texts, and ``predictions`` one
text a segment; a metric returns the document's score and a list with each segment's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from runtime.errors import InputError

# Decimal points and UTF-8 whatever the locale; Java's own complaints not among the answers.
_JAVA_OPTIONS = ["-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US",
                 "-XX:+DisplayVMOutputToStderr"]
_LINE_BREAKS = re.compile("[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")

Scores = tuple[float, list[float]]  # of the document, of its segments


def require() -> Path:
    """The folder of pycocoevalcap; raises InputError where it or Java is missing."""
    if shutil.which("java") is None:
        raise InputError("no java on the PATH, which METEOR needs; install it: "
                         "apt-get install default-jre-headless, or, without root: "
                         "conda install -c conda-forge openjdk")
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None:
        raise InputError("the Python package pycocoevalcap is missing; install it: "
                         "pip install -r requirement.txt")
    return Path(next(iter(package.submodule_search_locations)))


def scores(references: list[list[str]],
           predictions: list[str]) -> dict[str, Scores | InputError]:
    """``{"METEOR": (document, segments), "ROUGE_L": ..., "CIDEr": ...}`` of untokenised texts.

    Takes 10 to 80 s on 2 cores, mostly METEOR. Raises InputError where Java is missing or fails;
    where it fails only in METEOR, which needs the most memory, the error stands for its scores.
    """
    package = require()
    # All references, then all predictions: the tokenizer takes a full stop after "Inc." in
    # different ways depending on the line that follows, so the order is part of the result.
    tokens = iter(tokenize([text for segment in references for text in segment], package))
    references = [[next(tokens) for _ in segment] for segment in references]
    predictions = tokenize(predictions, package)
    try:
        of_meteor = meteor(references, predictions, package)
    except InputError as error:
        of_meteor = error
    return {"METEOR": of_meteor,
            "ROUGE_L": rouge_l(references, predictions),
            "CIDEr": cider(references, predictions)}


def tokenize(texts: list[str], package: Path) -> list[str]:
    """Each text as lower-cased Penn Treebank tokens, joined by spaces, without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS  # here: require() comes first
    lines = "\n".join(_LINE_BREAKS.sub(" ", text) for text in texts)
    done = subprocess.run(
        [*_java(), "-cp", "tokenizer/stanford-corenlp-3.4.1.jar",
         "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding",
         "UTF-8"], cwd=package, env=_environment(),
        input=lines.encode("utf-8"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    tokenized = done.stdout.decode("utf-8").split("\n")
    if done.returncode != 0 or len(tokenized) != len(texts):
        raise _java_failed("the tokenizer", done.stderr)
    return [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATIONS)
            for line in tokenized]


def meteor(references: list[list[str]], predictions: list[str], package: Path) -> Scores:
    """METEOR of tokenised texts, from one Java process that ends with this call."""
    # Its messages go to a file: a pipe that nobody reads would block it when full.
    with tempfile.TemporaryFile() as messages, tempfile.TemporaryDirectory() as folder:
        try:
            # METEOR makes URLs of the path of its archive, in which a blank becomes %20 and "!/"
            # ends the archive's name. So it gets a copy (Java would follow a link), and -a names
            # what it would look for beside it.
            shutil.copy(package / "meteor/meteor-1.5.jar", folder)
            Path(folder, "paraphrase-en.gz").symlink_to(package / "meteor/data/paraphrase-en.gz")
            command = [*_java(), "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio",
                       "-l", "en", "-norm", "-a", "paraphrase-en.gz"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=messages, cwd=folder, env=_environment()) as process:
                try:
                    statistics = [_ask(process, ["SCORE", *map(_without_bars, [*segment, text])])
                                  for segment, text in zip(references, predictions)]
                    segments = [float(_ask(process, ["EVAL", *statistics]))]
                    segments += [float(process.stdout.readline()) for _ in predictions[1:]]
                    return float(process.stdout.readline()), segments
                finally:
                    process.kill()
        except (OSError, ValueError):  # it ended early, or answered with a message
            messages.seek(0)
            raise _java_failed("METEOR", messages.read()) from None


def _java() -> list[str]:
    """The start of a command that runs in the folder of its archives.

    They have relative names there: a class path cannot name a folder with a colon.
    """
    return [os.path.abspath(shutil.which("java")), *_JAVA_OPTIONS]


def _environment() -> dict[str, str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}  # else Java cannot open a path not in ASCII
    if "_JAVA_OPTIONS" in environment:  # stronger than those of the command
        environment["_JAVA_OPTIONS"] = " ".join([environment["_JAVA_OPTIONS"], *_JAVA_OPTIONS])
    return environment


def _ask(process: subprocess.Popen, fields: list[str]) -> str:
    """Sends METEOR a line of fields and returns the (first) line of its answer."""
    process.stdin.write(f"{' ||| '.join(fields)}\n".encode("utf-8"))
    process.stdin.flush()
    return process.stdout.readline().decode("utf-8").strip()


def _without_bars(text: str) -> str:
    """A text without METEOR's field separator (the tokenizer leaves it inside e.g. URLs)."""
    return text.replace("|||", "").replace("  ", " ")


def _java_failed(who: str, messages: bytes) -> InputError:
    lines = [line for line in messages.decode("utf-8", "replace").strip().splitlines()
             if not line.startswith("Picked up ")] or ["no message"]
    telling = [line for line in lines if re.search("error|exception", line, re.IGNORECASE)]
    return InputError(f"{who} failed in Java ({(telling or lines)[0].strip()}); check that "
                      "`java -version` says 8 or newer and that 2 GB of memory are free")


def rouge_l(references: list[list[str]], predictions: list[str]) -> Scores:
    """ROUGE-L (F measure, beta 1.2) of tokenised texts."""
    from pycocoevalcap.rouge.rouge import Rouge  # here: it loads NumPy
    return _scored(Rouge(), references, predictions)


def cider(references: list[list[str]], predictions: list[str]) -> Scores:
    """CIDEr of tokenised texts; 0 for a single segment, where every idf weight is log 1."""
    if not any(text.split() for segment in references for text in segment):
        return 0.0, [0.0] * len(predictions)  # pycocoevalcap fails without a single word
    from pycocoevalcap.cider.cider import Cider
    return _scored(Cider(), references, predictions)


def _scored(scorer, references: list[list[str]], predictions: list[str]) -> Scores:
    score, segments = scorer.compute_score(
        dict(enumerate(references)),
        {index: [prediction] for index, prediction in enumerate(predictions)})
    return float(score), [float(segment) for segment in segments]
