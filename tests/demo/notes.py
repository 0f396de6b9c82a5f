"""A server whose workers keep notes in shared memory, for the demonstration.

    notes.py serve SOCKET
    notes.py ask SOCKET write WORDS    each worker writes a note
    notes.py ask SOCKET read           prints all notes
"""

import mmap
import os
import socket
import sys

WORKERS = 3
ROOM = 1 << 20  # bytes of each worker


def work(number, orders, answers, memory):
    """Writes each order into the worker's part of the memory."""
    at = number * ROOM
    for words in orders:
        note = f"worker {number}: {words}".encode()
        memory[at : at + len(note)] = note
        at += mmap.PAGESIZE
        os.write(answers, b".")


def serve(path):
    memory = mmap.mmap(-1, WORKERS * ROOM)
    orders = []
    answers, answer = os.pipe()
    for number in range(WORKERS):
        order, to = os.pipe()
        if os.fork() == 0:
            for other in [to, *orders]:
                os.close(other)
            work(number, os.fdopen(order), answer, memory)
            os._exit(0)
        os.close(order)
        orders.append(to)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            client, _ = listener.accept()
            with client, client.makefile("rw") as stream:
                command, _, words = stream.readline().partition(" ")
                if command == "write":
                    for to in orders:
                        os.write(to, words.encode())
                        os.read(answers, 1)
                pages = (memory[at : at + mmap.PAGESIZE] for at in range(0, len(memory), mmap.PAGESIZE))
                for page in pages:
                    if page[0]:
                        stream.write(page.rstrip(b"\0").decode())


def ask(path, words):
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        with server.makefile("rw") as stream:
            stream.write(" ".join(words) + "\n")
            stream.flush()
            sys.stdout.write(stream.read())


if sys.argv[1] == "serve":
    serve(sys.argv[2])
else:
    ask(sys.argv[2], sys.argv[3:])
