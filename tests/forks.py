#!/usr/bin/env python3
"""A Python for the tests that starts at once: `forks.py SCRIPT ARGUMENTS...` runs a script of the project as a fork of one
process that has its packages imported (not the project), since importing PyTorch takes longer than most of these runs.

`forks.py --serve SOCKET` is that process; FORKS_SOCKET names it to the others. Anything else than a script goes to
FORKS_PYTHON, so that run_all.sh can have this file for its PYTHON.
"""
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback


def start(argv, cwd, environments, out, err, first=""):
    """Run argv as a fork for each of some environments, which are added to that of the server (several: what torchrun would
    set), with the file descriptors out and err for its output, after the Python `first`. Returns a file of two lines: the
    process numbers, and once all have ended the exit code, of several that of the first that failed."""
    job = {"argv": argv, "cwd": str(cwd), "environments": environments, "first": first}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["FORKS_SOCKET"])
        socket.send_fds(server, [b"!"], [out, err])
        server.sendall(json.dumps(job).encode() + b"\n")
        return server.makefile()


def ask(*job):
    """The exit code of what start() starts."""
    with start(*job) as answer:
        answer.readline()
        return int(answer.readline())


def serve(path):
    """Answer start() until the tests end, with which this process' stdin ends."""
    import_packages()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            with client:
                _, (out, err), _, _ = socket.recv_fds(client, 1, 2)
                job = json.loads(client.makefile().readline())
                children = [fork(job, environment, out, err) for environment in job["environments"]]
                client.sendall(f"{' '.join(map(str, children))}\n".encode())
                code = wait_for(children)
                os.close(out)
                os.close(err)
                client.sendall(f"{code}\n".encode())


def wait_for(children):
    """Wait until all have ended; where one fails, the others are ended too, as by torchrun. Returns the first failure's
    exit code, else 0."""
    code = 0
    running = set(children)
    while running:
        ended, status = os.wait()
        running.remove(ended)
        failed = os.waitstatus_to_exitcode(status)
        if failed and not code:
            code = abs(failed)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return code


def import_packages():
    """What every stage imports, and matplotlib's fonts, found once; a fork's garbage collection leaves all that alone."""
    for name in ("filelock", "timm", "torch", "torchvision", "tqdm"):
        importlib.import_module(name)
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    figure.subplots().set(title="fonts", xlabel="x")
    figure.savefig(io.BytesIO(), bbox_inches="tight")
    gc.collect()
    gc.freeze()


def fork(job, environment, out, err):
    """Start a job's script as __main__ with its own arguments, folder, environment and output. Returns its process number."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    code = 0
    try:
        exec(job["first"], {})
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    if sys.argv[1].endswith(".py"):
        sys.exit(ask([os.path.abspath(sys.argv[1]), *sys.argv[2:]], os.getcwd(), [dict(os.environ)], 1, 2))
    os.execv(os.environ["FORKS_PYTHON"], [os.environ["FORKS_PYTHON"], *sys.argv[1:]])
