"""The documentation against the code: links, commands, policies, hooks, metrics, versions."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import typing

import pytest
import yaml
from pydantic import BaseModel

from disagg_plugins import __version__, hookspecs
from disagg_plugins.cli.main import build_parser
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy, load_policy
from disagg_plugins.telemetry.metrics import COUNTERS, HISTOGRAMS
from disagg_plugins.telemetry.records import HandoffRecord
from disagg_vllm.plugin import CONNECTOR
from disagg_vllm.settings import KEYS
from tests.doc_blocks import PAGES, ROOT, blocks, commands

if typing.TYPE_CHECKING:
    import argparse

LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
HOOK = re.compile(r"(disagg_(?:on|register|select|filter|score)_\w+)(?:\(([^)]*)\))?")
POLICY_KEY = re.compile(
    r"(?:fleet|scheduler|handoff|gateway|plugins|telemetry|launch)(?:\.[a-z_]+)+"
)
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:work|root|home|tmp|mnt|Users)/")

SOURCES = ("disagg_plugins", "adapters", "connectors")

MINIMAL = {
    "fleet": {"workers": [{"name": "w", "url": "http://127.0.0.1:8101", "role": "both"}]},
}

DECIDE = """
import json, sys
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.types import FleetView, RequestProfile
policy = Policy.model_validate(json.load(sys.stdin))
with PluginHost.load(policy.plugins) as host:
    host.start(policy)
    workers = [w.worker() for w in policy.fleet.workers]
    for tenant in ("batch", "web"):
        profile = RequestProfile("r", "/v1/completions", "m", 900, tenant=tenant)
        decision = Scheduler(host, policy).decide(profile, FleetView(workers, {}))
        print(json.dumps([type(decision.route).__name__, decision.reason]))
    print(json.dumps([str(f) for f in host.failures]))
"""

GUIDES = [ROOT / "migration_guides" / f"{n}.md" for n in ("vllm", "sglang", "changing_engines")]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
guides = pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)


def prose(page):
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def code_words(page):
    """Return what stands in code type in running text."""
    return CODE.findall(prose(page))


def shell_lines(page):
    """Return every command line of a page, in blocks and in running text."""
    found = [c for b in blocks(page) if b.language == "bash" for c in commands(b)]
    return found + code_words(page)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def is_absent_source(path):
    """Return whether a path is of a source folder that is not here: the wheel is tested alone."""
    folder = path.relative_to(ROOT).parts[0]
    return folder in SOURCES and not (ROOT / folder).exists()


def resolve(model: type[BaseModel], names: list[str]) -> bool:
    """Return whether a dotted key names something of the policy; lists are looked into."""
    if not names:
        return True
    field = model.model_fields.get(names[0])
    if field is None:
        return False
    inner = field.annotation
    for part in (inner, *typing.get_args(inner)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return resolve(part, names[1:])
    return len(names) == 1 or typing.get_origin(inner) is dict


@pages
def test_links_lead_somewhere(page) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists() or is_absent_source(other), target
        assert not anchor or anchor in anchors(other), target


@pages
def test_no_page_names_a_path_of_some_machine(page) -> None:
    assert MACHINE_PATH.findall(page.read_text()) == []


@pages
def test_paths_of_the_project_exist(page) -> None:
    ours = re.compile(r"(disagg_plugins|adapters|connectors|tests|migration_guides)/[\w./]*")
    for word in code_words(page):
        if ours.fullmatch(word) and "NAME" not in word:
            assert (ROOT / word).exists() or is_absent_source(ROOT / word), word


@pages
def test_make_targets_exist(page) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {m for line in shell_lines(page) for m in re.findall(r"^make ([a-z-]+)", line)}
    assert used <= targets


@functools.cache
def parser() -> argparse.ArgumentParser:
    with PluginHost.load(entry_points=False) as host:
        return build_parser(host.commands())


def parses(line: str) -> bool:
    """Return whether ``disagg`` itself understands a command line."""
    try:
        parser().parse_args(shlex.split(line)[1:])
    except SystemExit:
        return False
    return True


@pages
def test_disagg_commands_are_understood_by_the_command_itself(page, capsys) -> None:
    for block in (b for b in blocks(page) if b.language == "bash"):
        for line in commands(block):
            if line.startswith("disagg "):
                assert parses(re.split(r" [>&|]", line)[0]), capsys.readouterr().err
    for word in code_words(page):
        if re.match(r"disagg [a-z]", word):
            # Running text may name a command without what it takes.
            assert parses(word) or parses(f"{word} disagg.yaml"), word


def test_the_pages_show_every_subcommand() -> None:
    said = "\n".join(line for page in PAGES for line in shell_lines(page))
    with PluginHost.load(entry_points=False) as host:
        for name in host.commands():
            assert f"disagg {name}" in said, name


@pages
def test_policies_are_right(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")
    for block in (b for b in blocks(page) if b.language == "yaml"):
        path = tmp_path / "disagg.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **yaml.safe_load(block.text)}))
        load_policy(path)


@pages
def test_policy_keys_in_the_text_exist(page) -> None:
    record = {f"handoff.{f.name}" for f in dataclasses.fields(HandoffRecord)}
    for word in code_words(page):
        if POLICY_KEY.fullmatch(word) and word not in record:
            names = word.split(".")
            names = ["fleet", "workers", *names] if names[0] == "launch" else names
            assert resolve(Policy, names), word


@pages
def test_hooks_exist_and_have_the_arguments_that_the_page_shows(page) -> None:
    for word in code_words(page):
        for name, arguments in HOOK.findall(word):
            if name.endswith("_"):
                continue
            hook = getattr(hookspecs, name, None)
            assert hook is not None, name
            if f"{name}(" in word:
                shown = [a.strip() for a in arguments.split(",") if a.strip()]
                assert shown == list(inspect.signature(hook).parameters), word


def test_the_readme_shows_every_hook_with_its_arguments() -> None:
    hooks = [n for n in vars(hookspecs) if HOOK.fullmatch(n)]
    shown = "\n".join(code_words(ROOT / "README.md"))
    assert [n for n in hooks if f"{n}(" not in shown] == []


@pages
def test_metrics_exist(page) -> None:
    known = {f"{name}_total" for name in COUNTERS} | set(HISTOGRAMS)
    for word in code_words(page):
        if re.fullmatch(r"disagg_\w+_(total|seconds)", word):
            assert word in known, word


@guides
def test_metrics_that_the_guide_greps_for_exist(guide) -> None:
    for names in re.findall(r"grep -E '\^disagg_\(([^)]+)\)'", guide.read_text()):
        assert {f"disagg_{name}" for name in names.split("|")} <= set(COUNTERS)


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == __version__


def test_the_plugin_of_the_readme_decides(tmp_path) -> None:
    found = {b.language: b.text for b in blocks(ROOT / "README.md") if "keep" in b.text.lower()}
    project = tomllib.loads(found["toml"])["project"]
    (name, target), *others = project["entry-points"]["disagg_plugins"].items()
    assert not others
    (tmp_path / f"{target.partition(':')[0]}.py").write_text(found["python"])
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(f"[disagg_plugins]\n{name} = {target}\n")
    # The call itself is what this looks at, not how fast a busy machine answers.
    policy = {**yaml.safe_load(found["yaml"]), "fleet": {"workers": []}}
    policy["plugins"]["deadline_s"] = 10
    for role, port in (("prefill", 8101), ("decode", 8102)):
        worker = {"name": role, "url": f"http://127.0.0.1:{port}", "role": role}
        policy["fleet"]["workers"].append(worker)
    done = subprocess.run(
        [sys.executable, "-c", DECIDE],
        input=json.dumps(policy),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    batch, web, failures = (json.loads(line) for line in done.stdout.splitlines())
    assert batch == ["Local", "tenant batch stays whole"]
    assert web[0] == "Disaggregated"
    assert failures == []
    assert len(found["python"].splitlines()) <= 16


ENGINE_SERVER = re.compile(
    r"^(?:\w+=\S+ )+(?:\S+/)?(?:vllm serve|python -m (?:vllm|sglang)\.\S+ --model(?:-path)?) "
)
VLLM_ON_CPU = "python -m vllm.entrypoints.openai.api_server --model"


@guides
def test_the_guides_gpu_commands_differ_from_the_executed_ones_in_the_words_it_names(guide) -> None:
    def servers(use):
        found = [c for b in blocks(guide) if b.use == use for c in commands(b)]
        return [c for c in found if ENGINE_SERVER.match(c)]

    def plain(command):
        for cpu_only in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            command = re.sub(rf"^{cpu_only}=\S+ ", "", command)
        command = command.replace(VLLM_ON_CPU, "vllm serve")
        return re.sub(r" \$(CPU|VLLM|SGLANG)_FLAGS", "", command)

    assert all("_FLAGS " not in c for c in servers("gpu"))
    assert all(c.count("_FLAGS ") == 1 for c in servers("run"))
    assert [plain(c) for c in servers("gpu")] == [plain(c) for c in servers("run")]
    assert len(servers("gpu")) == {"changing_engines.md": 2}.get(guide.name, 3)


@functools.cache
def texts_of_the_code() -> tuple[str, ...]:
    """Return every text of the sources, with a mark where a value is put in."""
    return tuple(_texts_of_the_code())


def _texts_of_the_code():
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in node.values)
                    yield "".join(p if isinstance(p, str) else "\0" for p in parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@pytest.mark.skipif(not (ROOT / "adapters").exists(), reason="the wheel is tested alone")
@guides
def test_what_the_guide_lets_doctor_say_stands_in_the_code(guide) -> None:
    table = guide.read_text().rpartition("| symptom | what doctor says | fix |\n")[2]
    said = [word for row in table.splitlines()[1:] for word in CODE.findall(row.split(" | ")[1])]
    pieces = {piece.strip(" ()") for word in said for piece in re.split(r"\.\.\.|\bN\b", word)}
    texts = texts_of_the_code()
    assert len(said) > 4
    assert [p for p in pieces if not any(p in text for text in texts)] == []


@guides
def test_shell_blocks_of_the_guide_are_executed_or_marked_as_not(guide) -> None:
    for block in blocks(guide):
        assert block.language != "bash" or block.use in ("run", "gpu"), block.line


@pages
def test_the_engine_flag_is_one_that_the_connector_understands(page) -> None:
    for text in re.findall(r"--kv-transfer-config '([^']+)'", page.read_text()):
        flag = json.loads(text)
        assert flag["kv_connector"] == CONNECTOR
        assert flag["kv_role"] == "kv_both"
        assert set(flag["kv_connector_extra_config"]) <= set(KEYS)
