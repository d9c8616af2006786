"""Render a chat template, which is a program of whoever published it, within limits.

As a module: JSON with `source`, `messages` and `tokens` comes through stdin, JSON goes to stdout.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any, NoReturn

from vila_deploy.utils.module_command import module_command

CPU_SECONDS, WAIT_SECONDS, MEMORY_BYTES = 2, 60, 1 << 30


def render_within_limits(
    source: str, messages: list[dict[str, str]], tokens: dict[str, str]
) -> str | None:
    """Return what a template writes, as transformers renders it.

    Args:
        tokens: special tokens by the names that templates call them.

    Returns:
        None if it fails, takes more than 2 s or 1 GiB, or Jinja is not installed.
    """
    values = {"source": source, "messages": messages, "tokens": tokens}
    command = module_command("vila_deploy.processing.template_worker")
    try:
        done = subprocess.run(
            command, input=json.dumps(values).encode(), capture_output=True, timeout=WAIT_SECONDS
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def main() -> None:
    """Render what stdin holds; any error ends the process with another exit code than 0."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    values: dict[str, Any] = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(values["source"])
    text = template.render(
        messages=values["messages"], add_generation_prompt=True, **values["tokens"]
    )
    json.dump(text, sys.stdout)


def _raise(message: object) -> NoReturn:
    raise ValueError(str(message))


if __name__ == "__main__":
    main()
