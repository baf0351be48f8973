"""What distributed.py promises: several processes join, wait for each other, and leave without being aborted."""

import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(("ending", "status"), [("pass", 0), ("raise InputError('wrong')", 2)])
def test_a_process_of_several_leaves_without_the_teardown_in_which_gloo_may_abort_it(ending, status):
    code = f"""
import atexit, torch.distributed as dist
from errors import InputError, run

class Teardown:
    def __del__(self):
        print("torn down")

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "good-bye")
    {ending}

kept = Teardown()
run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (status, "good-bye\n"), done.stderr
    assert ("error: wrong" in done.stderr) == (status == 2)


def test_processes_that_have_joined_wait_for_each_other():
    """The second is a second late; neither leaves `wait_for_all` before both have called it."""
    code = """
import os, time
import distributed

wait_for_all = distributed.join()
time.sleep(int(os.environ["RANK"]))
called = time.time()
wait_for_all()
print(called, time.time())
distributed.leave(0)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command, options = [sys.executable, "-c", code], {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=os.environ | address | {"RANK": rank}, **options) for rank in "01"]
    times = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    called, left = [[float(row[column]) for row in times] for column in (0, 1)]
    assert min(left) >= max(called) > min(called) + 0.5
