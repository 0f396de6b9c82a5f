# Usage: halting.py HALTED GO PROGRAM [ARGUMENT]...
# Runs PROGRAM with its input passed through and its output up to the first MiB. Then it
# makes the file HALTED, waits for the file GO, and passes on the rest.
import os
import subprocess
import sys
import time

halted, go, *command = sys.argv[1:]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
passed = 0
while data := os.read(child.stdout.fileno(), 65536):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    passed += len(data)
    if passed >= 1 << 20 and not os.path.exists(halted):
        open(halted, "w").close()
        while not os.path.exists(go):
            time.sleep(0.01)
sys.exit(child.wait())
