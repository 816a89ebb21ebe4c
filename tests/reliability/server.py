"""Fork a run of a bundle for each request on standard input: server.py BUNDLE"""

import json
import os
import resource
import sys

sys.path[:1] = [sys.argv[1], os.path.dirname(sys.argv[1])]

import main  # noqa: E402

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(0)
        if request["file_size"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
        flags = request["flags"]
        main.errors.run_and_exit(lambda flags=flags: main.main(flags))
    print(pid, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
