"""Whatever is killed, every row has one result in the end, its own; what cannot be made is named."""

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.newest, pytest.mark.skipif(os.name == "nt", reason="kills processes by signals")]
SECONDS = 1800
"""For a run that should end by itself: none is judged by its time."""


def rows(count: int, prompt: str = "a cup") -> list[list[str]]:
    photos = ("photo.jpg", "other.jpg")
    return [[f"r{i}", photos[i % 2], "cup", f"{prompt} {i % 5}", str(i)] for i in range(count)]


def assert_whole(place: Any, count: int) -> None:
    """Every row has one result, its key is in the picture, and the journal says so once."""
    results = place.results()
    assert len({found["id"] for found in results}) == len(results) == count
    assert {found["status"] for found in results} == {"ok"}
    painted = place.pictures()
    assert {found["picture"]: found["key"] for found in results} == painted
    said = [entry["task"] for entry in place.journal() if entry["event"] == "end" and entry["status"] == "ok"]
    assert len(said) == len(set(said))
    assert not [path for path in place.out.rglob("*.part") if "workers" not in path.parts]


def test_every_row_has_its_picture_and_a_second_run_does_nothing(place: Any) -> None:
    table = place.table(rows(30))
    assert place.do("run", str(table), own=2)[0] == 0
    assert_whole(place, 30)
    executed = place.executed()
    assert len(executed) == 30 + 2  # two photographs, each with its five prompts at once
    before = {path: path.stat().st_mtime_ns for path in (place.out / "images").iterdir()}
    assert place.do("run", str(table), own=2)[0] == 0
    assert place.executed() == executed
    assert before == {path: path.stat().st_mtime_ns for path in (place.out / "images").iterdir()}


def test_a_changed_row_and_a_lost_picture_are_made_again(place: Any) -> None:
    url, _ = place.server()
    assert place.do("run", str(place.table(rows(6))), "--server", url)[0] == 0
    keys = {found["id"]: found["key"] for found in place.results()}
    changed = rows(6)
    changed[2][4] = "99"
    (place.out / "images" / "r4.png").unlink()
    status, output = place.do("run", str(place.table(changed)), "--server", url)
    assert status == 0 and "1 finished rows are others now" in output and "1 finished files are no longer" in output
    assert sorted(place.executed()[-2:]) == ["r2", "r4"]
    now = {found["id"]: found["key"] for found in place.results()}
    assert [name for name in keys if keys[name] != now[name]] == ["r2"]
    assert place.pictures()["images/r2.png"] == now["r2"]


def kill_at_random(place: Any, count: int, kills: int, seed: int) -> int:
    """A run of own servers, whose servers, guards and drivers are killed; how many prompts that can have cost."""
    chance = random.Random(seed)
    place.variables["FAKE_SECONDS"] = "0.02"
    table = place.table(rows(count))
    process, lost = place.start("run", str(table), own=4), 0
    for _ in range(kills):
        time.sleep(chance.uniform(0.3, 1.2))
        if process.poll() is not None:
            break
        victim = chance.choice(("server", "guard", "driver"))
        running = place.running()
        if victim == "driver":
            process.kill()
            process.communicate()
            lost += 2 * 4  # of each worker what it ran, and what it had made and was not written yet
            process = place.start("run", str(table), own=4)
        elif running:
            pid = chance.choice(running)
            if victim == "guard":
                try:
                    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
                except OSError:  # it has ended by now
                    continue
                pid = int(stat.rpartition(")")[2].split()[1])
            if pid > 1 and pid != process.pid:
                lost += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    return lost


@pytest.mark.parametrize("seed", range(2))
def test_kills_cost_no_row(place: Any, seed: int) -> None:
    lost = kill_at_random(place, 60, 5, seed)
    assert_whole(place, 60)
    assert len(place.executed()) <= 60 + 10 + lost
    place.wait(lambda: not place.running())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_kills_cost_no_row(place: Any, seed: int) -> None:
    lost = kill_at_random(place, 200, 12, seed)
    assert_whole(place, 200)
    assert len(place.executed()) <= 200 + 10 + lost
    place.wait(lambda: not place.running())


def test_what_a_killed_driver_had_begun_to_write_is_removed(place: Any) -> None:
    """Also where the whole file is there by now, from another encoding of the picture."""
    place.start("run", str(place.table(rows(2))), own=1).communicate(timeout=SECONDS)
    pictures = next((place.out / "subjects").rglob("*.pictures"))
    for begun in (pictures.with_name("0" * 64 + ".pictures.part"), place.out / "images" / "gone.png.part"):
        begun.write_bytes(b"half")
    assert place.do("run", str(place.table(rows(2))), own=1)[0] == 0
    assert_whole(place, 2)


def test_a_killed_driver_leaves_no_comfyui_behind(place: Any) -> None:
    process = place.start("run", str(place.table(rows(4, "slow cup"))), own=2)
    place.wait(lambda: len(place.executed()) >= 2)
    pids = place.running()
    assert len(pids) == 2
    process.kill()
    process.communicate()
    place.wait(lambda: not place.running())


def test_a_pid_file_that_is_being_written_or_removed_is_no_server(place: Any) -> None:
    for name in ("1", "2"):
        (place.out / "workers" / name).mkdir(parents=True)
    (place.out / "workers" / "1" / "pid").write_text("", encoding="utf-8")
    (place.out / "workers" / "2" / "pid").symlink_to("removed")
    assert place.running() == []


def test_what_a_killed_driver_had_queued_is_not_run_twice(place: Any) -> None:
    """The server is not the driver's, and goes on; the next driver takes what it made."""
    url, _ = place.server()
    table = place.table(rows(2, "slow cup"))
    process = place.start("run", str(table), "--server", url, "--one-phase")
    place.wait(lambda: len(place.executed()) == 1)
    process.kill()
    process.communicate()
    assert place.do("run", str(table), "--server", url, "--one-phase")[0] == 0
    assert sorted(place.executed()) == ["r0", "r1"]
    assert_whole(place, 2)


def test_a_row_that_kills_its_server_is_poison(place: Any) -> None:
    table = place.table([*rows(8), ["bad", "photo.jpg", "cup", "crash", "1"]])
    status, output = place.do("run", str(table), "--one-phase", own=2)
    (bad,) = [found for found in place.results() if found["status"] != "ok"]
    assert status == 1 and bad["id"] == "bad" and bad["status"] == "poison"
    assert bad["message"].startswith("failed 3 times: ComfyUI ended")
    assert place.executed().count("bad") == 3 and "bad: attempt 3 of 3" in output
    workers = {e["worker"] for e in place.journal() if e.get("task") == "bad" and e.get("status") == "fault"}
    assert len(workers) == 2
    assert place.do("run", str(table), "--one-phase", own=2)[0] == 1 and place.executed().count("bad") == 3
    assert "tries 1 again" in place.do("retry", "bad")[1]
    assert place.do("run", str(table), "--one-phase", own=2)[0] == 1 and place.executed().count("bad") == 6


@pytest.mark.parametrize("word", ["answer cut", "picture cut"])
def test_a_server_that_ends_within_an_answer_is_named(place: Any, word: str) -> None:
    """Not the bytes that are missing: what the user can look for is why ComfyUI ended."""
    status, _ = place.do("run", str(place.table(rows(1, word))), "--one-phase", own=1)
    (bad,) = place.results()
    assert status == 1 and bad["message"].startswith("failed 3 times: ComfyUI ended:\n")


@pytest.mark.parametrize("word", ["crash once", "hang once", "tear once", "memory once"])
def test_a_fault_that_passes_costs_no_row(place: Any, word: str) -> None:
    table = place.table([*rows(4), ["bad", "photo.jpg", "cup", word, "1"]])
    status, output = place.do("run", str(table), "--one-phase", "--timeout", "5", own=1)
    assert status == 0 and "bad: attempt 1 of 3" in output
    assert_whole(place, 5)
    assert place.executed().count("bad") == 2


def test_a_hung_prompt_is_named(place: Any) -> None:
    status, _output = place.do("run", str(place.table(rows(1, "hang"))), "--one-phase", "--timeout", "1", own=1)
    assert status == 1
    assert "the prompt did not end within 1 s (--timeout): the server counts as hung" in place.results()[0]["message"]


def test_a_worker_on_which_all_fails_gets_no_more_and_nothing_is_lost(place: Any) -> None:
    table = place.table(rows(9, "crash"))
    status, output = place.do("run", str(table), "--one-phase", own=1)
    assert status == 4 and "3 rows in a row failed on it" in output and "9 rows are left" in output
    assert {found["status"] for found in place.results()} == {"waiting"}


BAD = [
    (["", "photo.jpg", "cup", "a", "x"], "invalid", "seed is 'x'; give whole numbers"),
    (["missing", "none.jpg", "cup", "a", "1"], "invalid", "image: there is no file"),
    (["torn", "torn.png", "cup", "a", "1"], "invalid", "the PNG ends in the middle"),
    (["text", "text.jpg", "cup", "a", "1"], "invalid", "the file is no picture"),
    (["outside", "../../secret.jpg", "cup", "a", "1"], "invalid", "lies outside of"),
    (["url", "http://127.0.0.1/a.jpg", "cup", "a", "1"], "invalid", "addresses are not fetched"),
    (["../up", "photo.jpg", "cup", "a", "1"], "invalid", "leads out of the run's folder"),
    (["r0", "photo.jpg", "cup", "a", "1"], "invalid", "is another row's"),
    (["cells", "photo.jpg", "cup", "a", "1", "more"], "invalid", "has 6 cells for 5 columns"),
    (["refused", "photo.jpg", "cup", "refuse", "1"], "refused", "Value not in list: here"),
    (["raised", "photo.jpg", "cup", "raise", "1"], "failed", "the mask is empty"),
]


def test_bad_rows_are_named_and_the_others_are_made(place: Any) -> None:
    (place.folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR")
    (place.folder / "text.jpg").write_text("no picture", encoding="utf-8")
    table = place.table([*rows(3), *(row for row, _, _ in BAD)])
    url, _ = place.server()
    status, output = place.do("check", str(table), "--server", url)
    invalid = [message for _, state, message in BAD if state == "invalid"]
    assert status == 1 and all(message in output for message in invalid) and not place.executed()
    status, _ = place.do("run", str(table), "--one-phase", "--server", url)
    results = place.results()
    assert status == 1 and [found["status"] for found in results[:3]] == ["ok"] * 3
    assert len(results) == 3 + len(BAD)
    for found, (_, state, message) in zip(results[3:], BAD, strict=True):
        assert found["status"] == state and message in found["message"], found
    assert place.executed().count("refused") == 0 and place.executed().count("raised") == 1


def test_a_failed_encoding_fails_its_rows_and_no_others(place: Any) -> None:
    table = place.table(
        [*rows(4), *(["a", "photo.jpg", "cup", "raise", s] for s in "1"), ["b", "photo.jpg", "cup", "raise", "2"]]
    )
    assert place.do("run", str(table), own=2)[0] == 1
    failed = {found["id"]: found["message"] for found in place.results() if found["status"] == "failed"}
    assert failed == dict.fromkeys("ab", "its encoding: the mask is empty")
    status, output = place.do("retry", "r0")
    assert status == 2 and "'r0' has not failed. Failed: a, b" in output
    executed = len(place.executed())
    assert "tries 1 again" in place.do("retry", "a")[1]
    assert place.do("run", str(table), own=2)[0] == 1 and len(place.executed()) == executed + 1


def test_an_encoding_that_kills_its_server_costs_none_of_those_made_with_it(place: Any) -> None:
    table = place.table([*rows(20), ["bad", "photo.jpg", "cup", "crash", "1"]])
    status, output = place.do("run", str(table), own=2)
    assert status == 1 and "6 subjects of one picture were not encoded together, and are one by one:" in output
    results = place.results()
    assert [found["id"] for found in results if found["status"] != "ok"] == ["bad"]
    assert results[-1]["status"] == "poison" and results[-1]["message"].startswith("its encoding: failed 3 times")
    ends = [entry for entry in place.journal() if entry["event"] == "end" and entry["task"].startswith("encoding:")]
    assert [entry["status"] for entry in ends].count("apart") == 6
    assert [entry["status"] for entry in ends].count("fault") == 3, "charged to the one alone"
    assert len(place.executed()) == 20 + 2 + 5 + 3
    assert place.do("run", str(table), own=2)[0] == 1 and len(place.executed()) == 20 + 2 + 5 + 3


def test_what_was_to_be_encoded_alone_still_is_when_the_driver_was_killed(place: Any) -> None:
    table = place.table([[word, "photo.jpg", "cup", f"slow {word}", "1"] for word in ("raise", "red", "blue")])
    process = place.start("run", str(table), own=1)
    place.wait(lambda: len(place.executed()) == 2)
    process.kill()
    process.communicate()
    assert place.do("run", str(table), "--only", "encode", own=1)[0] == 1
    assert len(place.executed()) == 2 + 3, "none of them together again"
    assert len(list((place.out / "subjects").rglob("*.safetensors"))) == 2


def test_what_a_killed_driver_had_encoded_together_is_taken_from_the_server(place: Any) -> None:
    url, _ = place.server()
    table = place.table(rows(3, "slow cup"))
    words = ("run", str(table), "--server", url, "--only", "encode")
    process = place.start(*words)
    place.wait(lambda: len(place.executed()) == 1)
    process.kill()
    process.communicate()
    assert place.do(*words)[0] == 0
    assert len(place.executed()) == 2, "one prompt for each photograph"
    assert len(list((place.out / "subjects").rglob("*.safetensors"))) == 3


def test_a_row_is_tried_again_with_all_its_seeds_or_one(place: Any) -> None:
    url, _ = place.server()
    table = place.table([["bad", "photo.jpg", "cup", "raise", "1..3"], ["worse", "photo.jpg", "cup", "raise", "1"]])
    words = ("run", str(table), "--one-phase", "--server", url)
    assert place.do(*words)[0] == 1 and len(place.executed()) == 4
    assert "tries 3 again" in place.do("retry", "bad")[1]
    assert place.do(*words)[0] == 1 and sorted(place.executed()[4:]) == ["bad_1", "bad_2", "bad_3"]
    assert "tries 2 again" in place.do("retry", "bad_2", "worse")[1]
    assert place.do(*words)[0] == 1 and sorted(place.executed()[7:]) == ["bad_2", "worse"]


def test_a_full_disk_stops_the_run_and_costs_no_row(place: Any, small_disk: Path) -> None:
    url, _ = place.server()
    place.out = small_disk / "out"
    table = place.table(rows(40))
    fill = small_disk / "fill"
    fill.write_bytes(bytes(760_000))
    status, output = place.do("run", str(table), "--one-phase", "--keep-free", "0", "--server", url)
    assert status == 3 and "Stopped: the disk is full" in output
    fill.unlink()
    place.out.parent.joinpath("out").mkdir(exist_ok=True)
    assert place.do("run", str(table), "--one-phase", "--keep-free", "0", "--server", url)[0] == 0
    assert_whole(place, 40)


def test_too_little_space_is_noticed_before_anything_runs(place: Any) -> None:
    url, _ = place.server()
    status, output = place.do("run", str(place.table(rows(3))), "--keep-free", str(10**9), "--server", url)
    assert status == 3 and re.search(r"the disk is full\. \d+ MB are free in .* MB are to stay free", output)
    assert not place.executed()


def test_a_server_without_room_stops_the_run(place: Any) -> None:
    table = place.table([["full", "photo.jpg", "cup", "full once", "1"], *rows(3)])
    status, output = place.do("run", str(table), "--one-phase", own=1)
    assert status == 3 and "No space left on device" in output
    assert place.do("run", str(table), "--one-phase", own=1)[0] == 0
    assert_whole(place, 4)


def test_a_second_driver_is_refused(place: Any) -> None:
    table = place.table(rows(3, "slow"))
    process = place.start("run", str(table), "--one-phase", own=1)
    place.wait(lambda: bool(place.executed()))
    status, output = place.do("run", str(table), "--one-phase", own=1)
    assert status == 2 and f"Another moma_batch works in {place.out}" in output and str(process.pid) in output
    assert "A driver works in the folder." in place.do("status")[1]
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert_whole(place, 3)
    assert "pictures: ok 3, of 3" in place.do("status")[1]


def test_ctrl_c_lets_what_runs_end(place: Any) -> None:
    table = place.table(rows(6, "slow"))
    process = place.start("run", str(table), "--one-phase", own=2)
    place.wait(lambda: len(place.executed()) == 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "Ctrl-C once more" in output
    assert [found["status"] for found in place.results()].count("ok") == 2 == len(place.executed())
    assert place.do("run", str(table), "--one-phase", own=2)[0] == 0
    assert len(place.executed()) == 6
    assert_whole(place, 6)


def test_ctrl_c_twice_ends_it_at_once(place: Any) -> None:
    url, _ = place.server()
    table = place.table([["long", "photo.jpg", "cup", "hang once", "1"], *rows(2)])
    process = place.start("run", str(table), "--one-phase", "--server", url)
    place.wait(lambda: "long" in place.executed())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "Stopping at once." in output
    assert place.do("run", str(table), "--one-phase", "--server", url)[0] == 0
    assert place.executed().count("long") == 2
    assert_whole(place, 3)


def test_a_server_that_grows_is_started_anew(place: Any) -> None:
    table = place.table(rows(6, "grow"))
    assert place.do("run", str(table), "--one-phase", "--max-memory", "120", own=1)[0] == 0
    assert_whole(place, 6)
    lines = place.log.read_text(encoding="utf-8").splitlines()
    assert len({pid for line in lines for pid in re.findall(r'"pid": (\d+)', line)}) > 1
    assert len(place.executed()) == 6


def test_a_server_that_comes_back_goes_on(place: Any) -> None:
    url, server = place.server()
    table = place.table(rows(6, "slow"))
    process = place.start("run", str(table), "--one-phase", "--server", url)
    place.wait(lambda: len(place.executed()) == 2)
    server.kill()
    server.wait()
    time.sleep(0.3)
    place.server(int(url.rpartition(":")[2]))
    assert process.wait(SECONDS) == 0
    assert_whole(place, 6)
    assert len(place.executed()) == 7
