"""Prints what the NVIDIA driver says: its version of CUDA and the GPUs that a process may use.

:mod:`runtime.cuda_toolkit` runs this file as a process of its own. The driver reads
CUDA_VISIBLE_DEVICES only once, and afterwards the process that asked cannot choose a GPU any more.
A driver that crashes or hangs does not take the script with it, either.
"""

from __future__ import annotations

import ctypes
import json
import sys

CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def main() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        sys.exit("no NVIDIA driver found")

    def ask(function: str, *arguments: int) -> int:
        answer = ctypes.c_int(0)
        error = driver[function](ctypes.byref(answer), *arguments)
        if error:
            sys.exit(f"the NVIDIA driver fails ({function}: error {error})")
        return answer.value

    error = driver.cuInit(0)
    count = 0 if error else ask("cuDeviceGetCount")
    if not count:
        sys.exit("the NVIDIA driver finds no GPU" + f" (cuInit: error {error})" * bool(error))
    devices = [ask("cuDeviceGet", number) for number in range(count)]
    print(json.dumps({"version": ask("cuDriverGetVersion"), "capabilities": [
        [ask("cuDeviceGetAttribute", which, device) for which in CAPABILITY]
        for device in devices]}))


if __name__ == "__main__":
    main()
