"""Writes in a transaction, which ends when it is told to."""
import os
import sqlite3
import sys
import time

STATUS, BASE, JOURNAL = sys.argv[1:]


def say(text):
    with open(STATUS + ".new", "w") as out:
        out.write(text + "\n")
    os.rename(STATUS + ".new", STATUS)


base = sqlite3.connect(BASE, isolation_level=None)
base.execute(f"pragma journal_mode = {JOURNAL}")
base.execute("create table t (n integer)")
base.execute("begin immediate")
base.executemany("insert into t values (?)", [(n,) for n in range(50)])
say("ready")
while not os.path.exists(STATUS + ".go"):
    time.sleep(0.01)
base.executemany("insert into t values (?)", [(n,) for n in range(50, 100)])
base.execute("commit")
say("ok")
