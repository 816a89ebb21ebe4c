#!/usr/bin/env -S python3 -S -s
"""A `python` that starts at once: a process that has imported torch forks, and the fork runs the words it is given.

`Server` starts that process; this file, run as a program, is the `python`. Where PYTHONPATH is not that of the process
it is the real one, which finds packages of its own there. The fork is no child of the caller: signals reach it through
this program, and it is killed when this program is. Tests of how processes are killed and found take the real one.
"""

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys

REAL, ADDRESS, PATH = "FORKED_PYTHON_REAL", "FORKED_PYTHON_ADDRESS", "FORKED_PYTHON_PATH"  # environment variables
PRELOADED = ("numpy", "PIL.Image", "simplejpeg", "tqdm", "torch", "torch.distributed.run", "torch.multiprocessing")
PRELOADED += ("torch._dynamo",)  # the first step of an optimizer imports it, for as long as torch itself takes


class Server:
    """A process of the interpreter `real` that forks; `path` is the `python` to use it by."""

    def __init__(self, folder, real=sys.executable, environment=os.environ):
        address = os.path.join(str(folder), "socket")
        self.path = os.path.join(str(folder), "python")
        variables = {REAL: real, ADDRESS: address, PATH: environment.get("PYTHONPATH", "")}
        with open(self.path, "w") as file:
            words = ["{}={}".format(name, value) for name, value in variables.items()]
            text = '#!/bin/sh\n{} exec {} -S -s {} "$@"\n'
            file.write(text.format(" ".join(words), sys.executable, os.path.abspath(__file__)))
        os.chmod(self.path, 0o755)
        words = [str(real), os.path.abspath(__file__), "--serve", address]
        environment = dict(environment, OMP_NUM_THREADS="1")
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
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
        handle = os.pidfd_open(pid)
        if handle not in select.select([handle, connection], [], [])[0]:
            os.kill(pid, signal.SIGKILL)  # the caller has ended without waiting
        status = os.waitpid(pid, 0)[1]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        stream.write("{}\n".format(code).encode())
        stream.flush()
    os._exit(0)


def _become(request):
    """Run what the request asks for in this process, and end it."""
    import runpy
    import types

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if "PARENT_PID" in os.environ:  # of the process that it must not outlive
        os.environ["PARENT_PID"] = str(os.getppid())
    words = request["words"]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.stdin = open(0, closefd=False)  # else a fork would close it for what it starts
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.path.pop(0)  # of this file
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, request["folder"])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(words[1], vars(sys.modules["__main__"]))
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
    is_other = os.environ.get("PYTHONPATH", "") != os.environ.pop(PATH)
    if is_other or not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
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
    code = int(stream.readline())
    if code < 0:  # this program ends as the fork did
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2])
    sys.exit(_ask(sys.argv[1:]))
