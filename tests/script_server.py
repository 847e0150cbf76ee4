"""Start scripts in forks of this process, which has imported the libraries: that takes longer than most tests.

A line of JSON on stdin is a request: the script, its arguments, the folder it is started in, and the files that take
what it prints. Its exit code is printed when it has ended. Only libraries are imported here: a script imports the
project's modules itself, as under `python SCRIPT`. It ends without Python's tearing down all modules, which takes as
long as importing them.
"""

import atexit
import json
import os
import runpy
import sys
import threading
import traceback
from typing import Any

# What most scripts import, or, as torch's compiler by its optimisers, is imported for them.
import datasketch  # noqa: F401
import gensim.models.doc2vec  # noqa: F401
import nltk  # noqa: F401
import PIL.Image  # noqa: F401
import pyarrow.compute
import pyarrow.parquet  # noqa: F401
import pydantic  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401


def next_request() -> dict[str, Any]:
    """In a fork, the request it is to serve; in the server, when there are no more, an empty one."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        child = os.fork()
        if not child:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return {}


if __name__ == "__main__":
    if request := next_request():
        for number, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
            os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        os.chdir(request["folder"])
        sys.argv, sys.path[0] = [request["script"], *request["words"]], os.path.dirname(request["script"])
        code: object = 0
        try:
            runpy.run_path(request["script"], run_name="__main__")
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)
