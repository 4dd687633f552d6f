"""What a failure is, in one line, and what to do about it."""

import errno
import re
import signal

from fmdistill import stop

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
    """Return the number of the signal that ended the run, None if an error did."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "number", signal.SIGINT)
    # Of several processes that train together, one that a stop finds in a reduction is left by the others.
    return stop.requested() if isinstance(error, RuntimeError) and "closed by peer" in str(error) else None


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
