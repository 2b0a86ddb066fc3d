import threading

import pytest

from tests.waiting import EVENT_DEADLINE_S, join, wait_until


def test_the_first_true_value_is_returned() -> None:
    values = iter([0, "", None, 3, 4])
    assert wait_until(lambda: next(values), "a value", poll_every_s=0) == 3


def test_after_the_deadline_the_message_says_what_was_awaited_and_the_error_why() -> None:
    def refuse() -> None:
        raise ConnectionRefusedError("port 1")

    with pytest.raises(TimeoutError, match=r"^waited 0 s for the server$") as caught:
        wait_until(refuse, lambda: "the server", 0, errors=(OSError,))
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_errors_that_are_not_named_are_raised_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        wait_until(lambda: 1 / 0, "a number", errors=(OSError,))


def test_a_process_that_ended_is_not_awaited() -> None:
    with pytest.raises(RuntimeError, match=r"^it ended before the first step$"):
        wait_until(lambda: False, "the first step", alive=lambda: False)


def test_what_a_process_did_last_counts_although_it_ended() -> None:
    files: list[str] = []

    def die() -> bool:
        files.append("result")
        return False

    assert wait_until(lambda: files, "a result", alive=die) == ["result"]


def test_a_thread_that_does_not_end_is_an_error() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(EVENT_DEADLINE_S,), name="stuck")
    thread.start()
    with pytest.raises(TimeoutError, match=r"^waited 0 s for the end of stuck$"):
        join(thread, 0)
    stop.set()
    join(thread)
    assert not thread.is_alive()
