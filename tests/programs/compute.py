"""Threads and a child compute until told to end; then all is computed again."""
import multiprocessing
import os
import struct
import sys
import threading
import time
from multiprocessing import shared_memory

STATUS = sys.argv[1]
GO = STATUS + ".go"
MASK = (1 << 64) - 1
BLOCK = 2000


def step(value, count):
    for _ in range(count):
        value = (value * 6364136223846793005 + 1442695040888963407) & MASK
    return value


def say(text):
    with open(STATUS + ".new", "w") as out:
        out.write(text + "\n")
    os.rename(STATUS + ".new", STATUS)


def compute(seed, keep):
    """Goes on for a while after the word to end."""
    value, blocks, left = seed, 0, 20
    while left:
        value = step(value, BLOCK)
        blocks += 1
        keep(value, blocks)
        if os.path.exists(GO):
            left -= 1
        time.sleep(0.001)


def in_child(name, seed, lock, counter):
    memory = shared_memory.SharedMemory(name=name)

    def keep(value, blocks):
        with lock:
            struct.pack_into("QQ", memory.buf, 16 * seed, value, blocks)
            counter.value += 1

    compute(seed, keep)
    memory.close()


def main():
    context = multiprocessing.get_context("fork")
    memory = shared_memory.SharedMemory(create=True, size=4096)
    lock, counter = context.Lock(), context.Value("Q", 0, lock=False)
    results = {}
    children = [
        context.Process(target=in_child, args=(memory.name, seed, lock, counter))
        for seed in range(3)
    ]
    for child in children:
        child.start()
    threads = [
        threading.Thread(
            target=compute, args=(seed, lambda v, b, s=seed: results.__setitem__(s, (v, b)))
        )
        for seed in range(100, 104)
    ]
    for thread in threads:
        thread.start()
    while len(results) < 4 or counter.value < 10:
        time.sleep(0.002)
    history = {"text": "unicode ✓", "big": 3**500, "floats": [0.1 * n for n in range(1000)]}
    say("ready")
    while not os.path.exists(GO):
        time.sleep(0.002)
    for worker in threads + children:
        worker.join()
    if any(child.exitcode != 0 for child in children):
        return f"children ended with {[child.exitcode for child in children]}"
    total = 0
    for seed in range(3):
        results[seed] = struct.unpack_from("QQ", memory.buf, 16 * seed)
        total += results[seed][1]
    memory.close()
    memory.unlink()
    if total != counter.value:
        return f"blocks of the children: {total}, counted {counter.value}"
    for seed, (value, blocks) in results.items():
        if step(seed, BLOCK * blocks) != value:
            return f"result of {seed} after {blocks} blocks is wrong"
    expected = {"text": "unicode ✓", "big": 3**500, "floats": [0.1 * n for n in range(1000)]}
    return None if history == expected else "objects have changed"


try:
    error = main()
except BaseException as caught:  # noqa: BLE001
    error = repr(caught)
say("ok" if error is None else f"failed: {error}")
