"""The child's half of a bench: a side that loads its libraries once and then answers requests.

A request is a JSON object a line on stdin, ``{"call": METHOD, "with": {...}}``; the answer, a line
on stdout, is ``{"value": ...}`` or ``{"error": TEXT}``. See workers.py for the parent's half.
"""

from __future__ import annotations

import json
import os
import sys


def serve(side: object) -> None:
    """Answers with the methods of ``side`` until stdin ends."""
    # Libraries print what they like: the pipe is ours alone, their stdout becomes stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(side, request["call"])(**request["with"])}
        except Exception as error:  # the parent ends the run with it
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
