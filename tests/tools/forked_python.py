#!/usr/bin/env -S python3 -S -s
"""A `python` that starts at once: a process that has imported torch forks, and the fork runs the words it is given.

`Server` starts that process; this file, run as a program, is the `python`. Where PYTHONPATH is set it is the real one,
which finds packages of its own there. The fork is no child of the caller: signals reach it through this program.
"""

import array
import json
import os
import signal
import socket
import subprocess
import sys

REAL, ADDRESS = "FORKED_PYTHON_REAL", "FORKED_PYTHON_ADDRESS"  # environment variables
PRELOADED = ("numpy", "PIL.Image", "simplejpeg", "tqdm", "torch", "torch.distributed.run", "torch.multiprocessing")


class Server:
    """A process that forks; `path` is the `python` to use it by."""

    def __init__(self, folder):
        address = os.path.join(str(folder), "socket")
        self.path = os.path.join(str(folder), "python")
        with open(self.path, "w") as file:
            text = '#!/bin/sh\n{}={} {}={} exec {} -S -s {} "$@"\n'
            file.write(text.format(REAL, sys.executable, ADDRESS, address, sys.executable, os.path.abspath(__file__)))
        os.chmod(self.path, 0o755)
        words = [sys.executable, os.path.abspath(__file__), "--serve", address]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout.readline() == b"ready\n"

    def close(self):
        """End the process; that its input is closed would not do: processes forked since then have it open too."""
        self._process.kill()
        self._process.wait()


def _serve(address):
    import importlib
    import threading

    for name in PRELOADED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    server = os.getpid()
    threading.Thread(target=lambda: (sys.stdin.read(), os.kill(server, signal.SIGKILL)), daemon=True).start()
    os.write(1, b"ready\n")
    while True:
        connection = listener.accept()[0]
        if os.fork() == 0:  # it waits for the fork that runs the words, and tells its status
            _attend(connection)
        connection.close()
        while True:  # reap those that are done
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _attend(connection):
    files = array.array("i")
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_LEN(3 * files.itemsize))
    files.frombytes(ancillary[0][2])
    with connection.makefile("rwb") as stream:
        request = json.loads(stream.readline().decode())
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            for number, file in enumerate(files):
                os.dup2(file, number)
            connection.close()
            _become(request)
        stream.write("{}\n".format(pid).encode())
        stream.flush()
        status = os.waitpid(pid, 0)[1]
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        stream.write("{}\n".format(code).encode())
        stream.flush()
    os._exit(0)


def _become(request):
    """Run what the request asks for in this process, and end it."""
    import runpy

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["words"]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.stdin = open(0)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.path.pop(0)  # of this file
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, request["folder"])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ask(words):
    words = [word for word in words if word != "-u"]
    real = os.environ.pop(REAL)
    address = os.environ.pop(ADDRESS)
    if os.environ.get("PYTHONPATH") or not words or (words[0].startswith("-") and words[0] != "-m"):
        os.execv(real, [real, "-u", *words])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    stream = connection.makefile("rwb")
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    pid = int(stream.readline())
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda number, frame: os.kill(pid, number))
    return int(stream.readline())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2])
    sys.exit(_ask(sys.argv[1:]))
