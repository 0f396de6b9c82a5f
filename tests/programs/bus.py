"""A client of a message bus (D-Bus), which asks for something before and after a checkpoint."""

import os
import socket
import struct
import time


def text(value):
    return struct.pack("<I", len(value)) + value.encode() + b"\0"


def padded(data, size):
    return data + b"\0" * (-len(data) % size)


def call(serial, member):
    """Returns a call of a method of the bus itself, without arguments."""
    bus = "org.freedesktop.DBus"
    fields = b""
    for code, kind, value in (1, "o", "/org/freedesktop/DBus"), (6, "s", bus), (2, "s", bus), (3, "s", member):
        fields = padded(fields, 8) + bytes([code, 1]) + kind.encode() + b"\0" + text(value)
    head = b"l\1\0\1" + struct.pack("<III", 0, serial, len(fields))
    return padded(head + fields, 8)


bus = socket.socket(socket.AF_UNIX)
while bus.connect_ex("bus"):
    time.sleep(0.01)
user = str(os.getuid()).encode().hex().encode()
bus.sendall(b"\0AUTH EXTERNAL " + user + b"\r\n")
assert bus.recv(100).startswith(b"OK ")
bus.sendall(b"BEGIN\r\n" + call(1, "Hello"))
# Its name, and the signal that it has it.
answer = b""
while answer.count(b":1.") < 2 or b"NameAcquired" not in answer:
    answer += bus.recv(1000)
open("ready", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
bus.sendall(call(2, "GetId"))
answer = bus.recv(1000)
with open("answer.new", "wb") as file:
    file.write(answer)
os.rename("answer.new", "answer")
time.sleep(1000)
