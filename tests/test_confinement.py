"""What a confined process can still do: compute, and write what is open."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, os, socket, subprocess
from compress.confinement import confine

def outcome(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "worked"

parent = os.getppid()
confine(memory_bytes=2**28, cpu_s=20, file_bytes=2**20)
print(json.dumps({
    "compute": outcome(lambda: sum(range(1000))),
    "read a file": outcome(lambda: open("/etc/hostname")),
    "write a file": outcome(lambda: open("out", "w")),
    "list a folder": outcome(lambda: os.listdir("/")),
    "remove a file": outcome(lambda: os.unlink("out")),
    "open a socket": outcome(socket.socket),
    "fork": outcome(os.fork),
    "execute": outcome(lambda: os.execv("/bin/true", ["true"])),
    "start a command": outcome(lambda: subprocess.run(["true"])),
    "signal": outcome(lambda: os.kill(parent, 0)),
    "take memory": outcome(lambda: bytearray(2**29)),
}))
"""


def test_a_confined_process_computes_and_nothing_else(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)
    assert found.pop("compute") == "worked"
    assert found.pop("take memory") == "MemoryError"
    assert set(found.values()) == {"PermissionError"}, found
