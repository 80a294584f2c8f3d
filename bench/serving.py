"""The child process of a benchmark: a side that loads its libraries once, then answers requests.

A request is one line of JSON on stdin, ``{"call": METHOD, "with": {...}}``. The answer is one line
on stdout, ``{"value": ...}`` or ``{"error": TEXT}``. See workers.py for the parent process.
"""

from __future__ import annotations

import json
import os
import sys


def serve(side: object) -> None:
    """Answers requests with the methods of ``side`` until stdin ends."""
    # Libraries may print to stdout: send that to stderr, so that the pipe has only answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(side, request["call"])(**request["with"])}
        except Exception as error:  # the parent raises InputError with this text
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
