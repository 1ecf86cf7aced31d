"""Fresh processes in a tenth of a second: forks of an interpreter that has imported transformers, and nothing of ours.

Importing it takes seconds, and hundreds of tests need a process of their own.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the project

# Forks for each line of its input and says how the fork ended; the fork leaves the loop, to run the code that it was given.
_FORKING = """
import gc, json, os, sys
import accelerate, safetensors.torch, transformers.generation, transformers.models.auto.modeling_auto
import transformers.models.gpt2.modeling_gpt2, transformers.models.llama.modeling_llama
from transformers import dynamic_module_utils

gc.collect()
gc.freeze()  # or each fork would go through, and copy, all that was imported
for line in sys.stdin:
    code, words, environment, folder, outputs = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate((os.devnull, *outputs)):
    os.dup2(os.open(path, os.O_RDWR), number)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
if "HF_MODULES_CACHE" in os.environ:  # read when it was imported
    dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
sys.argv = ["-c", *words]
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os._exit(0)  # at once: taking all modules down takes longer than what was run
"""


class ForkingInterpreter:
    """Runs code as ``python -I -c`` does, each time in a new fork of one interpreter. It starts when it is first needed."""

    def run(
        self, code: str, words: Sequence[str], environment: Mapping[str, str], folder: str
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of an interpreter with its output captured: of code, with words for arguments, in a folder."""
        with tempfile.NamedTemporaryFile("r+") as output, tempfile.NamedTemporaryFile("r+") as errors:
            request = [code, list(words), dict(environment), folder, [output.name, errors.name]]
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(["-c", code, *words], status, output.read(), errors.read())

    def script(self, path: Path, *words: object, lacks: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """As ``python path words`` where mxdsurgery is this one, and the modules ``lacks`` are not installed."""
        start = [f"sys.modules[{name!r}] = None" for name in lacks]
        start += [f"sys.path[:0] = [{str(path.parent)!r}, {str(ROOT)!r}]", "sys.argv = sys.argv[1:]"]
        code = "; ".join(["import runpy, sys", *start, "runpy.run_path(sys.argv[0], run_name='__main__')"])
        return self.run(code, [str(path), *map(str, words)], os.environ, os.getcwd())

    @functools.cached_property
    def _process(self) -> subprocess.Popen:
        command = [sys.executable, "-I", "-c", _FORKING]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """Ends the interpreter."""
        if "_process" in vars(self):
            self._process.communicate()
