"""A fork that a test is given behaves like a new interpreter, except that it starts faster."""

import json
import os

TOLD = """
import json, os, sys
loaded = [name for name in sys.modules if "mxdsurgery" in name]
told = dict(pid=os.getpid(), words=sys.argv[1:], folder=os.getcwd(), isolated=sys.flags.isolated, environment=dict(os.environ))
print(json.dumps(told | dict(loaded=loaded, transformers="transformers" in sys.modules, left=hasattr(sys, "left"))))
sys.left = True
"""


def test_each_run_is_a_process_that_knows_nothing_of_mxdsurgery_or_of_another_run(forking, tmp_path):
    told = []
    for words in (["a b", "é"], []):
        done = forking.run(TOLD, words, {"HOME": "/nowhere", "ODD": "a\nb"}, str(tmp_path))
        assert done.returncode == 0 and done.stderr == ""
        told.append(json.loads(done.stdout))
    assert len({os.getpid(), *(one["pid"] for one in told)}) == 3
    assert [one["words"] for one in told] == [["a b", "é"], []]
    for one in told:
        assert one["folder"] == str(tmp_path) and one["environment"] == {"HOME": "/nowhere", "ODD": "a\nb"}
        assert one["isolated"] and one["transformers"] and not one["loaded"] and not one["left"]


def test_how_a_run_ends_is_told_and_the_next_one_begins(forking, tmp_path):
    def ends(code):
        done = forking.run(code, [], {}, str(tmp_path))
        return done.returncode, done.stdout, done.stderr.splitlines()[-1:]

    assert ends("print('so far'); raise KeyError('this')") == (1, "so far\n", ["KeyError: 'this'"])
    assert ends("import sys; sys.exit(3)") == (3, "", [])
    assert ends("import os; os.kill(os.getpid(), 9)") == (-9, "", [])
    assert ends("import sys; print(sys.stdin.read() + 'done')") == (0, "done\n", [])
