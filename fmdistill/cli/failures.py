"""What a failure is, in one line, and what to do about it."""

import errno
import re
import signal
import sys

# What takes less memory, by the stage that ran out of it.
SMALLER = {
    "caching": "teacher.batch",
    "training": "train.accumulate, which cuts the same batch into more pieces (raise it)",
    "evaluating": "points_per_batch or batch in the protocol",
}
STAGES = {
    "cache": ["caching"],
    "verify": ["caching"],
    "distill": ["training"],
    "evaluate": ["evaluating"],
    "plan": ["caching", "training"],
    "bench": ["caching"],
}


def stopped(error: BaseException) -> int | None:
    """Return the exit status of a run that a signal stopped, None where it is an error that stopped it."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    # A scheduler's signal goes to all processes of a job, and that a loader's is gone may be noticed first.
    terminated = isinstance(error, RuntimeError) and "killed by signal: Terminated" in str(error)
    return 128 + signal.SIGTERM if terminated else None


def tell_once() -> None:
    """Let no traceback tell again, from where an exception can only be ignored, that a signal stopped the run."""
    report = sys.unraisablehook
    if report.__module__ != __name__:
        sys.unraisablehook = lambda found: None if found.exc_value and stopped(found.exc_value) else report(found)


def line(error: BaseException) -> str:
    """Return the error's message in one line, with the way out of a full disk and of a name that is taken."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space, then the same command continues where it stopped"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{text}; a folder is expected there, choose another name"
    return text


def machine(error: RuntimeError, verb: str) -> str | None:
    """Return a line about a machine that is too small for the settings; None for any other error."""
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        stages = STAGES.get(verb, list(SMALLER))
        hints = "; ".join(f"while {stage}, change {SMALLER[stage]}" for stage in stages)
        return f"{str(error).splitlines()[0].partition('. ')[0]}: the GPU's memory is full; {hints}"
    if re.match(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)", str(error)):
        return (
            f"{str(error).splitlines()[0].partition('. ')[0]}: an image-loading process was killed, mostly for memory; "
            "lower train.workers, and in a container give it shared memory (docker run --ipc=host)"
        )
    return None
