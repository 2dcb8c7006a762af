"""Warm kernels: the suite's notebooks share one start of Python, torch, timm and matplotlib.

A kernel spends four to five seconds of processor time on importing libraries that are the same for every notebook. Here one process
a test worker imports them, and nothing of ours, once; each notebook then gets a fork of it. `python -m tests.warm serve DOOR` is that
process; the kernel that Jupyter starts is `warm.py DOOR -f CONNECTION`, a small client that hands over its folder, environment and standard
streams and lives as long as its fork does. Linux only (pidfd_open); TIMET_COLD=1 gives every notebook an interpreter of its own."""
import json
import os
import select
import signal
import socket
import sys

LIBRARIES = ("numpy scipy.optimize scipy.ndimage PIL.Image torch torch._dynamo torch.utils.data safetensors.torch matplotlib.pyplot "
             "matplotlib_inline.backend_inline ipykernel.kernelapp ipykernel.ipkernel fastcore.test").split()


def import_libraries():
    "Import what many notebooks import and is not ours; whatever must outlive the import is returned."
    import gc
    import importlib
    gc.disable()
    for name in LIBRARIES: importlib.import_module(name)
    from timet_nb.base import runtime            # timm needs the torchvision repair; our own modules are forgotten again
    runtime.import_timm()
    for name in [m for m in sys.modules if m.split(".")[0] in ("timet_nb", "tests")]: del sys.modules[name]
    gc.enable(); gc.collect(); gc.freeze()
    return runtime._LIBRARIES


def serve(path):
    "Fork a kernel for every client, until whoever started us closes our standard input."
    kept = import_libraries()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    door = socket.socket(socket.AF_UNIX); door.bind(path); door.listen()
    while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
        client, _ = door.accept()
        if os.fork() == 0:
            door.close(); watch(client); break
        client.close()
    return kept


def watch(client):
    "Fork the kernel; it ends with its client, and the client with it."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL); os.setsid()
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"): message += client.recv(1 << 20)
    kernel = os.fork()
    if kernel == 0:
        client.close(); become_kernel(json.loads(message), streams); return
    ended = os.pidfd_open(kernel)
    client.sendall(f"{kernel}\n".encode())
    if client in select.select([client, ended], [], [])[0]: os.kill(kernel, signal.SIGKILL)
    _, status = os.waitpid(kernel, 0)
    try: client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    finally: os._exit(0)


def become_kernel(asked, streams):
    "What `python -m ipykernel_launcher` does, in the client's folder, environment and streams."
    from ipykernel.kernelapp import IPKernelApp
    for standard, handed in enumerate(streams): os.dup2(handed, standard); os.close(handed)
    os.environ.clear(); os.environ.update(asked["env"])
    os.chdir(asked["cwd"]); os.setpgid(0, 0)
    sys.argv = ["ipykernel_launcher", *asked["words"]]
    del sys.path[0]                                       # the folder that `python -m` put there
    IPKernelApp.launch_instance(parent_handle=os.getppid())


def client(path, *words):
    "The process that Jupyter takes for its kernel."
    link = socket.socket(socket.AF_UNIX); link.connect(path)
    socket.send_fds(link, [b" "], [0, 1, 2])
    link.sendall(json.dumps(dict(env=dict(os.environ), cwd=os.getcwd(), words=words)).encode() + b"\n")
    told = link.makefile()
    kernel = int(told.readline())
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda n, _: os.kill(kernel, n))
    parent = os.getppid()
    while not select.select([link], [], [], 1)[0]:
        if os.getppid() != parent: return 1               # whoever started us is gone: the fork ends as the link does
    code = int(told.readline() or -signal.SIGKILL)
    return code if code >= 0 else 128 - code


def start(folder):
    "Start a server; it ends when its standard input closes. `folder` is then one for JUPYTER_PATH."
    import subprocess
    from pathlib import Path
    here, spec, door = Path(__file__).resolve(), Path(folder, "kernels", "python3"), str(Path(folder, "door"))
    argv = [sys.executable, "-I", "-S", str(here), door, "-f", "{connection_file}"]
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="python3", language="python")))
    env = dict(os.environ, PYTHONWARNINGS="ignore", MPLBACKEND="module://matplotlib_inline.backend_inline", TIMET_QUIET="1",
               OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    server = subprocess.Popen([sys.executable, "-m", "tests.warm", "serve", door], stdin=subprocess.PIPE, cwd=here.parent.parent, env=env)
    while not os.path.exists(door):                       # the first client would find nobody
        if server.poll() is not None: raise RuntimeError(f"no warm kernels: the server ended with code {server.returncode}")
        select.select([], [], [], .05)
    return server


if __name__ == "__main__":
    if sys.argv[1] == "serve": kept = serve(sys.argv[2])
    else: sys.exit(client(*sys.argv[1:]))
