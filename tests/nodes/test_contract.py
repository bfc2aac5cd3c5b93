"""The contract of the nodes (ids, inputs, types, defaults) changes only together with the changelog."""

import hashlib
import json
import re

from workbench import ROOT

SNAPSHOT = ROOT / "tests" / "data" / "object_info.json"
NAMED = re.compile(r"^API contract: `([0-9a-f]{12})`$", re.MULTILINE)


def contract_id(snapshot: str) -> str:
    """A short name for a contract, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(json.loads(snapshot), sort_keys=True).encode()).hexdigest()[:12]


def newest_section(changelog: str) -> str:
    """The section of the newest version."""
    return changelog.split("\n## ")[1]


def named_contract(changelog: str) -> str | None:
    """The contract that the newest section names."""
    found = NAMED.search(newest_section(changelog))
    return found[1] if found else None


def test_the_changelog_names_the_contract() -> None:
    current = contract_id(SNAPSHOT.read_text("utf-8"))
    assert named_contract((ROOT / "CHANGELOG.md").read_text("utf-8")) == current, (
        "The nodes' ids, inputs, types or defaults are others than the newest section of CHANGELOG.md names. Say there "
        f"what changed and what it means for old workflows, and write the line: API contract: `{current}`"
    )


def test_any_change_of_the_contract_is_another_one() -> None:
    snapshot = json.loads(SNAPSHOT.read_text("utf-8"))
    before = contract_id(json.dumps(snapshot, indent=4))
    assert before == contract_id(SNAPSHOT.read_text("utf-8"))
    weight = snapshot["MoMAApplyAdapter"]["input"]["required"]["weight"]
    weight[1]["default"] = 0.9
    changed = contract_id(json.dumps(snapshot))
    del snapshot["MoMAApplyAdapter"]["input"]["required"]["weight"]
    assert len({before, changed, contract_id(json.dumps(snapshot))}) == 3


def test_only_the_newest_section_counts() -> None:
    old = "# Changelog\n\n## 2\n\n- New.\n\n## 1\n\nAPI contract: `0123456789ab`\n"
    assert named_contract(old) is None
    assert named_contract(old.replace("- New.", "API contract: `aaaaaaaaaaaa`")) == "aaaaaaaaaaaa"
