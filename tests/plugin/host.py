"""Opens the plugin as a Python extension would be. With `--files` it prints the files that it needs, for the guest.

A mistake in the plugin's domain must leave Python, its threads and its signal handlers working.
"""

import ctypes
import signal
import subprocess
import sys
import threading


def files():
    """Returns the interpreter's modules that are loaded, and the libraries that these need."""
    modules = {module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    libraries = set()
    for path in modules | {sys.executable}:
        if path == sys.executable or path.endswith(".so"):
            listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
            libraries |= {word for word in listed.split() if word.startswith("/")}
    return sorted(modules | libraries)


def main(path):
    plugin = ctypes.CDLL(path)
    plugin.plugin_call.argtypes = [ctypes.c_bool]
    assert plugin.plugin_open() == 0
    results = []

    def call():
        results.append([plugin.plugin_call(fail) for fail in (False, True, False)])

    call()
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[4950, -1, 4950]] * 4, results
    handled = []
    signal.signal(signal.SIGUSR1, lambda *_: handled.append(True))
    signal.raise_signal(signal.SIGUSR1)
    call()
    assert handled == [True] and results[-1] == [4950, -1, 4950]
    plugin.plugin_close()
    print("the plugin works in Python", sys.version.split()[0])


if "--files" in sys.argv:
    print("\n".join(files()))
else:
    main(sys.argv[1])
