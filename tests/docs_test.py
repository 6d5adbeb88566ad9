"""The pages: each command and Python block is run here or by the test that is named before it, or at least parsed."""

import ast
import functools
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple

import forked
import pytest
from conftest import ROOT, TINY, start
from PIL import Image

import dit_jax
from dit_jax.config import unknown_field
from dit_jax.diffusion import catalog, solvers
from dit_jax.diffusion.objectives import DDPM, Flow, MeanFlow

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "benchmarks/README.md"]
FENCE = re.compile(r"(?:^<!-- (tested|not run): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\(((?!https?:)[^)#\s]*)(?:#([^)\s]+))?\)")
# Why a block may not be run. Such a block is parsed.
REASONS = re.compile(r"ImageNet|TPU|GPU|published weights|(an?|half an) (hour|server)|40 minutes|another folder")
COMMANDS = [path.stem for path in (ROOT / "dit_jax").glob("*.py") if "cli.parse()" in path.read_text()]
BENCHMARKS = "speed", "miniature", "samplers", "shapes", "bounds"
MODULES = [*(f"dit_jax.{name}" for name in COMMANDS), *(f"benchmarks.{name}" for name in BENCHMARKS)]
RENAMED = ("dit_jax.benchmark", "dit_jax.reproduce")  # named where the old name is told
Block = namedtuple("Block", "page mark note language text")


def blocks(path):
    found = [Block(str(path.relative_to(ROOT)), *match) for match in FENCE.findall(path.read_text())]
    assert len(found) * 2 == len(re.findall(r"^ *```", path.read_text(), re.M)), f"{path}: a fence is not understood"
    return found


BLOCKS = [block for path in PAGES for block in blocks(path)]


def commands(text):
    """The commands of a shell block, as lists of words without the settings of the environment before them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = min((words.index(w) for w in ("&&", "&") if w in words), default=len(words))
            command = [word for i, word in enumerate(words[:end]) if i or not re.fullmatch(r"[A-Z_]+=.*", word)]
            yield [
                os.path.basename(command[0]) if "python" in command[0] or "pip" in command[0] else command[0],
                *command[1:],
            ]
            words = words[end + 1 :]


def module_of(words):
    """("dit_jax.train", flags) of a command of ours, else None."""
    if words[0] == "python" and words[1] == "-m" and words[2].startswith(("dit_jax.", "benchmarks.")):
        return words[2], [word for word in words[3:] if word != "--help"]
    return None


def prose(path):
    return FENCE.sub("", path.read_text())


def inline(path):
    """The commands in the text of a page."""
    return [shlex.split(text) for text in re.findall(r"`(python -m (?:dit_jax|benchmarks)\.[^`]*)`", prose(path))]


# Parses each of [module, flags] with the flags of that command, which is not run. Prints what is wrong, and the flags that
# there are.
PARSE = """
import json, runpy, sys
from absl import flags
from dit_jax import cli, config

class Parsed(Exception):
    pass

def parse():
    cli._parse_flags(sys.argv)
    raise Parsed

cli.parse, before, known, problems = parse, set(flags.FLAGS), set(), []
for module, argv in json.load(open(sys.argv[1])):
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    sys.argv, problem = [module, *argv], f"{module} does not parse its flags"
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
        problem = None
        if getattr(flags.FLAGS, "config", None) is not None:
            try:
                config.resolve(flags.FLAGS.config)
            except config.UserError as e:
                problem = str(e)
    except Exception as e:
        problem = f"{type(e).__name__}: {e}"
    known |= set(flags.FLAGS)
    if problem:
        problems.append(f"{module} {' '.join(argv)}: {problem}")
print(json.dumps([problems, sorted(known)]))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """What is wrong with the commands of the pages, and the names of all flags of all commands."""
    found = [module_of(words) for b in BLOCKS if b.language == "sh" for words in commands(b.text)]
    found += [module_of(words) for path in PAGES for words in inline(path)]
    found = [[module, flags] for module, flags in filter(None, found) if module not in RENAMED]
    assert {module for module, _ in found} == set(MODULES)  # none is without an example
    path = tmp_path_factory.mktemp("commands") / "commands.json"
    path.write_text(json.dumps(found))
    process = forked.Forked(PARSE, [str(path)], str(ROOT), os.environ | {"JAX_PLATFORMS": "cpu"})
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return json.loads(out)


def test_every_command_is_one_of_its_flags(parsed):
    assert not parsed[0], "\n".join(parsed[0])


def test_every_sampler_with_its_steps_can_be_made():
    """What the parser of the flags does not look into."""
    given = [dict(re.findall(r"--(sampler|steps)=(\S+)", line)) for b in BLOCKS for line in b.text.splitlines()]
    given = {(g["sampler"], g["steps"]) for g in given if len(g) == 2}
    assert len(given) > 4
    for name, steps in given:
        fitting = [o for o in (DDPM(), Flow(), MeanFlow()) if name.partition(":")[0] in catalog.fitting(o)]
        assert len(catalog.make(name, fitting[0], steps)) == int(steps), name


def test_every_flag_that_is_named_exists(parsed):
    """Also in the text, where a flag or a field of a config stands alone."""
    others = {"strict", "ckpt", "logdir", "help"}  # of other programs
    script = re.findall(r"--([a-z-]+)", (ROOT / "launch/tpu_pod.sh").read_text())
    wrong = []
    for path in PAGES:
        for name in re.findall(r"(?<![-\w])--([a-z][\w.-]*)", prose(path)):
            field = name.partition("config.")[2] if name.startswith("config.") else None
            if unknown_field(field) if field else name not in {*parsed[1], *script, *others}:
                wrong.append(f"{path.name}: --{name}")
    assert not wrong, "\n".join(wrong)


def test_every_other_command_is_a_known_one(tmp_path):
    """Installs name extras that there are, pytest and python files that there are, and the script prints its plan."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    [extras] = [n.value for n in setup.body if isinstance(n, ast.Assign) and n.targets[0].id == "extras"]
    extras = {key.value for key in extras.keys}
    table = (ROOT / "docs/index.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == extras
    for block in BLOCKS:
        for words in commands(block.text) if block.language == "sh" else ():
            if module_of(words) or words[:3] in (["python3", "-m", "venv"], ["python", "-m", "mkdocs"]):
                continue
            elif words[0] == "pip":
                for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
                    assert extra in extras, (block.page, words)
            elif words[:3] == ["python", "-m", "pytest"]:
                assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), words
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), words
            elif words[0] == "launch/tpu_pod.sh":
                (tmp_path / "gcloud").write_text("#!/bin/sh\nexit 1\n")
                (tmp_path / "gcloud").chmod(0o755)
                env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
                cut = words.index("--")
                plan = [str(ROOT / words[0]), *words[1:cut], "--dry-run", *words[cut:]]
                done = subprocess.run(plan, env=env, capture_output=True, text=True)
                assert done.returncode == 0 and "gcloud" in done.stdout, done.stderr
            else:
                assert words[0] in ("gcloud", "ssh-add") and block.mark == "not run", (block.page, words)


@functools.cache
def tree(path):
    return ast.parse((ROOT / path).read_text())


def named(path, name):
    """Whether a Python file defines this function, class, method or constant, as in "AdaLNBlock.__call__"."""
    scope = tree(path).body
    for part in name.split("."):
        for node in scope:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if getattr(node, "name", None) == part or part in [getattr(target, "id", None) for target in targets]:
                scope = getattr(node, "body", [])
                break
        else:
            return False
    return True


def test_every_block_says_how_it_is_tested():
    for block in BLOCKS:
        assert block.language in ("sh", "python", "text", "bibtex"), block
        if block.mark == "not run":
            assert REASONS.search(block.note), block
        elif block.mark == "tested":
            path, _, test = block.note.removesuffix(" with DIT_JAX_LONG=1").partition("::")
            text = (ROOT / path).read_text()
            assert not test or named(path, test), block
            for words in commands(block.text):  # and the file runs such commands
                ours = module_of(words)
                name = ours[0].split(".")[1] if ours else words[1].split("/")[0] if words[0] == "python" else ""
                assert not name or re.search(rf'["./]{name}\b|README', text), (block, name)
    for path in DOCS:  # a marker that no block follows is none
        assert len(re.findall(r"^<!-- ", path.read_text(), re.M)) == sum(bool(b.mark) for b in blocks(path)), path


def test_python_blocks_call_what_there_is():
    """Also those that are not run: functions of the package and their arguments."""
    for block in BLOCKS:
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if function.startswith("dit_jax.") and function.count(".") == 1:
                values = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(getattr(dit_jax, function.split(".")[1])).bind(*node.args, **values)


@pytest.fixture(scope="module")
def scratch(uninterrupted, tmp_path_factory):
    """A folder like a checkout, with a short run in the place of the two-minute one."""
    folder = tmp_path_factory.mktemp("scratch")
    for name in ("dit_jax", "configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(uninterrupted, folder / "runs/digits")
    return folder


@pytest.mark.slow
def test_every_block_without_a_mark_runs(scratch, monkeypatch):
    """Training is made short: a small network and two steps."""
    monkeypatch.chdir(scratch)
    monkeypatch.setattr(catalog, "SAMPLERS", dict(catalog.SAMPLERS))  # a block adds to it
    monkeypatch.setattr(solvers, "RUNGE_KUTTA", dict(solvers.RUNGE_KUTTA))
    done, short = set(), [*TINY[1:], "--config.steps=2", "--config.checkpoint.every=2"]
    for path in DOCS:
        scope = {}
        for block in blocks(path):
            if block.mark or block.language not in ("sh", "python"):
                continue
            if block.language == "python":
                exec(compile(block.text, block.page, "exec"), scope)
                continue
            for words in commands(block.text):
                module, flags = module_of(words)
                if (module, *flags) in done:
                    continue
                done.add((module, *flags))
                process = start(module.split(".")[1], *flags, *(short if "train" in module else []), cwd=scratch)
                out, err = process.communicate(timeout=200)
                assert process.returncode == 0, (block.page, words, err)
    assert len(done) > 4
    for name in ("three.png", "digits.png", "strip.png", "runs/digits/unipc/grid.png"):
        Image.open(scratch / name).load()


def slug(heading):
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_links_lead_somewhere():
    for path in PAGES:
        for target, anchor in LINK.findall(prose(path)):
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), (path.name, target)
            if anchor:
                assert anchor in [slug(h) for h in re.findall(r"^#+ (.+)$", there.read_text(), re.M)], (
                    path.name,
                    anchor,
                )


def test_the_paper_line_by_line(parsed):
    """Each row names code and a test that there are; its command is parsed with the others."""
    text = (ROOT / "docs/paper.md").read_text()
    rows = [row for row in re.findall(r"^\| (.+) \|$", text, re.M) if not re.match(r"-|in the", row)]
    assert len(rows) > 40
    for row in rows:
        _, code, tests, command = re.split(r"(?<!\\) \| ?", row)
        assert not command or command.startswith("`python -m "), row
        for cell, prefix in ((code, ""), (tests, "test_")):
            links = re.findall(r"\[`([^`]+)`\]\(\.\./([\w./]+)\)", cell)
            assert links and cell.count("](") == len(links), row
            for name, path in links:
                assert name.startswith(prefix) and (path.endswith(name) or named(path, name)), (row, name)


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cfg_interval" in (tmp_path / "python/index.html").read_text()  # the reference
    assert (tmp_path / "benchmarks/samplers/samples.png").exists()
