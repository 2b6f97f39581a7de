# ruff: noqa: E501 - programs, of which each line is one
"""Programs that cheat or try to break out. None solves its task, so none may pass, and none may leave anything behind.

The task: `f(x)` is x + 1; or, of programs, to print one more than the number read. What is promised goes further than
the published harnesses, which run tests and code in one process: there an object that equals everything passes, or a
name of the code that hides one of the tests' (`abs`, `math`, `check`). Not promised: that code which computes the right
answers did so in an honest way, such as by a table of answers that a model has learnt by heart.
"""

TELL_ALL = """
import json, os, struct
def tell(*messages):
    for fd in range(64):
        for message in messages:
            content = json.dumps(message).encode()
            try: os.write(fd, struct.pack("<Q", len(content)) + content)
            except OSError: pass
"""
PASSED = '{"outcome": "passed", "why": "", "nonce": None}'.replace("None", "None")
WRONG = "\ndef f(x):\n    return 0\n"

ENDS = {
    "exits before the tests": "import sys; sys.exit(0)",
    "ends at once": "import os; os._exit(0)",
    "exits when called": "import sys\ndef f(x): sys.exit(0)",
    "ends when called": "import os\ndef f(x): os._exit(0)",
    "exits in a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()" + WRONG,
    "becomes another program": "import os\ndef f(x): os.execv('/usr/bin/true', ['true'])",
    "kills itself": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "aborts": "import os\ndef f(x): os.abort()",
    "stops itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "runs for ever": "def f(x):\n    while True: pass",
    "runs for ever when imported": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "stops the clock": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.signal(14, signal.SIG_IGN)\nwhile 1: pass",
    "ignores signals": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile 1: pass",
    "recurses": "def f(x): return f(x)",
    "recurses until the stack ends": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "crashes": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "is no Python": "def f(x) return x",
    "defines nothing": "",
    "reads stdin": "def f(x): return int(input())",
    "reads stdin when imported": "x = input()\ndef f(x): return x",
    "returns for ever": "import itertools\ndef f(x): return itertools.repeat(2)",
}
LIES = {
    "equals everything": "class E:\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(x): return E()",
    "a number that equals everything": "class E(int):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "a float without differences": "class E(float):\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n"
    "    def __eq__(s, o): return True\ndef f(x): return E(9)",
    "a list that equals everything": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "a text that equals everything": "class E(str):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "says that it is a number": "class E:\n    __class__ = int\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "its type equals everything": "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\n"
    "class E(metaclass=M):\n    __eq__ = lambda s, o: True\ndef f(x): return E",
    "a mock": "from unittest.mock import MagicMock\nclass E(MagicMock):\n    __eq__ = lambda s, o: True\ndef f(x): return E()",
    "computes with anything": "class E:\n    def __getattr__(s, n): return lambda *a: 0\n"
    "    __sub__ = __rsub__ = __abs__ = lambda *a: 0\n    __float__ = lambda s: 0.0\n    __lt__ = lambda *a: True\n"
    "def f(x): return E()",
    "pickles into a call": "class E:\n    def __reduce__(s): return (print, ('passed',))\n    __eq__ = lambda s, o: True\n"
    "def f(x): return E()",
    "replaces built-in functions": "import builtins\nbuiltins.all = builtins.abs = builtins.isinstance = lambda *a: True\n"
    "builtins.AssertionError = builtins.Exception = BaseException" + WRONG,
    "hides built-in functions": "abs = lambda x: 0\nlen = round = lambda *a: 0\nall = any = lambda *a: True" + WRONG,
    "hides modules of the tests": "class math:\n    isclose = staticmethod(lambda *a, **k: True)" + WRONG,
    "brings its own check": "def check(candidate): pass" + WRONG,
    "replaces the import of modules": "import sys, types\nfor n in list(sys.modules): sys.modules[n] = types.ModuleType(n)"
    + WRONG,
    "raises StopIteration": "def f(x): raise StopIteration",
    "raises GeneratorExit": "def f(x): raise GeneratorExit",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "raises the referee's own": "class TimeOverError(BaseException): pass\ndef f(x): raise TimeOverError",
    "raises an error that cannot be said": "class E(Exception):\n    def __str__(s): raise s\ndef f(x): raise E",
}
FORGERIES = {
    "writes a verdict everywhere": TELL_ALL + f"tell({PASSED})\ndef f(x):\n    tell({PASSED})\n    return 0",
    "writes a verdict at its end": TELL_ALL + f"import atexit\natexit.register(tell, {PASSED})" + WRONG,
    "writes answers and an end everywhere": TELL_ALL
    + "tell(['ready'], *([['answer', 2]] * 3), ['end'])\ndef f(x):\n    tell(['answer', 0], ['end'])\n    return 0",
    "answers with objects of the referee": TELL_ALL + "def f(x):\n    tell(['answer', ['yours', 0]])\n    return 0",
    "answers with what is no message": TELL_ALL + "def f(x):\n    tell('passed', 7, None, {}, [])\n    return 0",
    "answers with brackets without end": "import os\ndef f(x):\n    m = b'[' * 10**6\n"
    "    os.write(4, len(m).to_bytes(8, 'little') + m)\n    return 0",
    "answers with a size beyond all": "import os\ndef f(x): os.write(4, b'\\xff' * 8)",
    "answers with very much": "def f(x): return [0] * 10**8",
    "closes everything": "import os\ndef f(x): os.closerange(0, 100)",
    "looks through frames": TELL_ALL + "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in list(frame.f_locals.values()): tell({'outcome': 'passed', 'why': '', 'nonce': str(v)})\n"
    "        frame = frame.f_back\n    return 0",
    "looks through all objects": TELL_ALL + "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
    "        if isinstance(o, dict) and 'nonce' in o: tell({'outcome': 'passed', 'why': '', 'nonce': o['nonce']})\n"
    "    return 0",
    "looks for the tests in its modules": "import sys\ndef f(x):\n    r = sys.modules['mtp_lightning.evaluation.code.inside."
    "referee']\n    r._run_tests = r._judge_calls = lambda *a: None\n    return 0",
    "traces": "import sys\ndef jump(frame, event, arg):\n    try: frame.f_lineno += 1\n    except ValueError: pass\n"
    "    return jump\nsys.settrace(jump)\nsys.setprofile(lambda *a: None)" + WRONG,
    "reads its memory": "def f(x): return open('/proc/self/mem').read()",
    "reads the referee's memory": "import os\ndef f(x): return open(f'/proc/{os.getppid()}/mem').read()",
    "lists descriptors": "import os\ndef f(x): return os.listdir('/proc/self/fd')",
    "traces the referee": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef f(x):\n"
    "    return 2 if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 0",
    "reads the referee with a call": "import ctypes, os\nlibc = ctypes.CDLL(None)\ndef f(x):\n    b = ctypes.create_string_buffer(8)\n"
    "    v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "    r = libc.process_vm_readv(os.getppid(), v, 1, (ctypes.c_void_p * 2)(id(0), 8), 1, 0)\n    return 2 if r > 0 else 0",
    "reads environment and arguments": "import os, sys\ndef f(x): return os.environ['NONCE'], sys.argv[1], sys.orig_argv[9]",
}
PROCESSES = {
    "kills the referee": "import os, time\ndef f(x):\n    for n in (1, 2, 3, 6, 9, 13, 14, 15, 19): os.kill(os.getppid(), n)\n"
    "    time.sleep(1)",
    "kills everything": "import os\ndef f(x): os.kill(-1, 9)",
    "stops everything": "import os\ndef f(x): os.kill(-1, 19)",
    "kills its group": "import os\ndef f(x): os.killpg(0, 9)",
    "leaves a child": "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\ndef f(x): return x + 1",
    "leaves a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
    "    os._exit(0)\ndef f(x): return x + 1",
    "leaves a program": "import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\ndef f(x): return x + 1",
    "leaves a child that ignores all": "import os, signal\nif os.fork() == 0:\n    for n in range(1, 65):\n"
    "        try: signal.signal(n, signal.SIG_IGN)\n        except (OSError, ValueError): pass\n    while 1: pass\n"
    "def f(x): return x + 1",
    "leaves a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ndef f(x): return x + 1",
    "answers twice, by a child": "import os\nos.fork()" + WRONG,
    "forks for ever": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "starts threads for ever": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "fills memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "fills memory when called": "def f(x): return b'1' * (1 << 40)",
    "fills memory by children": "import os\nfor _ in range(8): os.fork()\nx = [bytearray(1 << 24) for _ in range(99)]"
    + WRONG,
    "prints for ever": "while True: print('x' * 1000)",
    "fills its folder": "n = 0\nwhile True:\n    open(str(n), 'w').write('x' * 10**6)\n    n += 1",
    "makes files for ever": "n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1",
    "opens files for ever": "x = []\nwhile True: x.append(open('/dev/null'))",
    "raises its limits": "import resource\nfor k in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):\n"
    "    resource.setrlimit(k, (-1, -1))\ndef f(x): return x + 1",
    "lowers its limits": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))\ndef f(x): return open('/dev/null') and x + 1",
    "removes its folder": "import os\nos.rmdir('/tmp')\ndef f(x): return x + 1",
}
WAYS_OUT = {  # each would return the right answer if it got out; `{mark}`, `{port}` and `{secret}` are the test's
    "writes outside": "import os\nfor d in ('/', '/usr', '/usr/lib', '/etc', '/dev', '/dev/shm', '/var/tmp', '/root', '/home', '{folder}', '..'):\n"
    "    try: open(d + '/{mark}', 'w').close()\n    except OSError: continue\n    OUT = d\ndef f(x): return OUT and x + 1",
    "writes through a link": "import os\nos.symlink('{folder}', 'link')\nopen('link/{mark}', 'w').close()\ndef f(x): return x + 1",
    "writes over a file of Python": "import os\nopen(os.__file__, 'a').close()\ndef f(x): return x + 1",
    "changes rights of a file": "import os\nos.chmod(os.__file__, 0o777)\ndef f(x): return x + 1",
    "reads a file of the user": "def f(x): return int(open('{secret}').read())",
    "reads through a link": "import os\nos.link('{secret}', 'mine')\ndef f(x): return int(open('mine').read())",
    "reads the home of root": "import os\ndef f(x): return x + 1 if os.listdir('/root/..') and os.listdir('/home') else 0",
    "looks at other processes": "import os\ndef f(x): return x + 1 if len(os.listdir('/proc')) > 1 else 0",
    "connects": "import socket\ndef f(x): return socket.create_connection(('127.0.0.1', {port}), 1) and x + 1",
    "listens": "import socket\ndef f(x): return socket.create_server(('', 0)) and x + 1",
    "sends a datagram": "import socket\ndef f(x):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "    return s.sendto(b'x', ('127.0.0.1', {port})) and x + 1",
    "asks the network's name service": "import socket\ndef f(x): return socket.getaddrinfo('localhost', 80) and socket.socket() and x + 1",
    "connects to the machine's host": "import socket\ndef f(x): return socket.socket(40, socket.SOCK_STREAM) and x + 1",
    "connects to a socket in a folder": "import socket\ndef f(x):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect('{socket}')\n    return x + 1",
    "opens a page": "import urllib.request\ndef f(x): return urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1) and x + 1",
    "becomes root": "import os\nos.setuid(0)\ndef f(x): return x + 1",
    "makes a namespace": "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x): return x + 1 if libc.unshare(0x10000000) == 0 else 0",
    "mounts": "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x): return x + 1 if libc.mount(b'p', b'/tmp', b'proc', 0, None) == 0 else 0",
    "changes its root": "import os\nos.mkdir('d')\nos.chroot('d')\ndef f(x): return x + 1",
    "makes a device": "import os\nos.mknod('/tmp/d', 0o60666, os.makedev(254, 0))\ndef f(x): return open('/tmp/d') and x + 1",
    "changes the kernel": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/false')\ndef f(x): return x + 1",
    "changes the machine's name": "import socket\nsocket.sethostname('{mark}')\ndef f(x): return x + 1",
    "keeps a key": "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x): return x + 1 if libc.syscall(248, b'user', b'k', b'v', 1, -4) > 0 else 0",
}
PROGRAMS = {
    "prints nothing": "",
    "prints all numbers": "for i in range(100): print(i)",
    "prints a verdict": f"print({PASSED!r})",
    "writes a verdict": TELL_ALL + f"tell({PASSED})",
    "reads what it must print": "import os\nfor fd in range(3):\n    try: print(os.pread(fd, 9, 0))\n    except OSError: pass",
    "prints the answer and fails": "print(int(input()) + 1, flush=True)\nraise ValueError",
    "prints the answer and never ends": "print(int(input()) + 1, flush=True)\nwhile 1: pass",
    "prints the answer and leaves a child": "import os, time\nprint(int(input()) + 1, flush=True)\nif os.fork() == 0: time.sleep(1000)",
    "prints the answer for ever": "x = int(input()) + 1\nwhile True: print(x)",
}
