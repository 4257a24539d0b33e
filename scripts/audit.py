"""Ask for known vulnerabilities of the packages in requirements.lock.

    python scripts/audit.py             # exit code 1: vulnerabilities are known; 3: nobody could be asked
    python scripts/audit.py --lenient   # 0 instead of 3, for machines without access to the service

Silence is not taken for an answer: a service that does not know of a vulnerability that has been public since 2019 (`CONTROL`)
knows of none, and what could not be looked up counts as not audited.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[1] / "requirements.lock"
CONTROL = "jinja2==2.10"  # CVE-2019-10906


def ask(requirements: Path, timeout: float) -> list[dict[str, Any]] | str:
    """What pip-audit says of every package, or why it says nothing."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    command += ["--no-deps", "--disable-pip", "-r", str(requirements)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        packages: list[dict[str, Any]] = json.loads(answer.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:g} s"
    except (json.JSONDecodeError, KeyError, TypeError):
        return (answer.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
    return packages


def report(control: list[dict[str, Any]] | str, packages: list[dict[str, Any]] | str) -> tuple[int, str]:
    """Exit code, and what to print.

    Args:
        control: What is known of `CONTROL`.
        packages: What is known of the packages to be audited.
    """
    if isinstance(control, str) or not any(package.get("vulns") for package in control):
        reason = control if isinstance(control, str) else f"it knows of nothing in {CONTROL}, which is vulnerable"
        return 3, f"not audited: the vulnerability service is not reachable ({reason})"
    if isinstance(packages, str):
        return 3, f"not audited: {packages}"
    bad = [f"{p['name']} {p['version']}: {v['id']}" for p in packages for v in p.get("vulns", ())]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    lines = [f"{len(packages) - len(skipped)} of {len(packages)} packages audited, {len(bad)} known vulnerabilities"]
    lines += [f"  {entry}" for entry in bad]
    if skipped or not packages:
        lines.append(f"not audited: {', '.join(skipped) or 'the list of packages is empty'}")
    return (1 if bad else 3 if skipped or not packages else 0), "\n".join(lines)


def main() -> int:
    """Run both questions; the first one fails fast where there is no service."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lenient", action="store_true", help="exit code 0 where nobody could be asked")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each of two questions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "control.txt"
        file.write_text(CONTROL + "\n")
        control = ask(file, options.timeout)
    reachable = report(control, [{"name": "control"}])[0] == 0
    code, text = report(control, ask(LOCK, options.timeout) if reachable else [])
    print(f"pip-audit: {text}")
    return 0 if code == 3 and options.lenient else code


if __name__ == "__main__":
    sys.exit(main())
