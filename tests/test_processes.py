"""Child processes by the group: which one lives, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from compress import processes

FIRST_THREAD_ENDS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_an_id_that_was_given_out_again_is_not_mistaken_for_the_child() -> None:
    me = processes.identify(os.getpid())
    assert me is not None and processes.alive(me)
    stranger = processes.Child(me.pid, me.birth + "1")
    assert not processes.alive(stranger)
    assert processes.living(stranger) == []


def test_a_process_lives_as_long_as_one_of_its_threads() -> None:
    process = subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS], start_new_session=True)
    child = processes.identify(process.pid)
    assert child is not None
    try:
        while (processes._stat(process.pid) or ["gone"])[0] not in (*processes.DEAD, "gone"):
            assert processes.age_s(child) < 15, "its first thread does not end"
        assert processes.alive(child) and processes.living(child) == [child.pid]
        assert processes.stop(child, grace_s=5.0)
        assert process.poll() == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_child_gets_the_variables_of_the_list_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("ESPALIER_LOGIN", "me:secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = processes.child_environment()
    assert not {"HF_TOKEN", "ESPALIER_LOGIN"} & set(environment) and environment["OMP_NUM_THREADS"] == "1"
