"""A server that loads what it needs and then forks its workers, which share it."""
import gc
import os
import sys
import time

STATUS = sys.argv[1]
DATA = {number: "value %d" % number * 3 for number in range(150_000)}
EXPECTED = sum(len(value) for value in DATA.values())
gc.collect()
gc.freeze()
gc.disable()


def publish(text):
    with open(STATUS + ".new", "w") as file:
        file.write(text)
    os.rename(STATUS + ".new", STATUS)


def wait():
    while not os.path.exists(STATUS + ".go"):
        time.sleep(0.01)


def work():
    wait()
    return sum(len(value) for value in DATA.values()) == EXPECTED


WORKERS = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() else 1)
    WORKERS.append(pid)
# Each of them has begun to wait, and has its own copies of what that takes.
time.sleep(0.5)
publish("ready\n")
good = work()
for pid in WORKERS:
    good = os.waitpid(pid, 0)[1] == 0 and good
publish("ok\n" if good else "failed: the data is not what it was\n")
